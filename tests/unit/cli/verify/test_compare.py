"""What counts as a difference between two runs; and the comparison runs no code that a checkpoint holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.cli.verify.compare import (
    LEFT_OUT,
    Comparison,
    FileDifference,
    _difference,
    _file_difference,
    by_step,
    kind_of,
    logged_difference,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), 0.0),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.tensor([float("inf")]), torch.tensor([float("inf")]), 0.0),
        (torch.tensor([1, 5]), torch.tensor([1, 2]), 3.0),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.5], dtype=torch.bfloat16), 0.5),
        (torch.tensor([]), torch.tensor([]), 0.0),
        (torch.tensor([1j]), torch.tensor([3j]), 2.0),
        ({"a": [1.0, (2, "x")]}, {"a": [1.0, (4, "x")]}, 2.0),
        (NAN, NAN, 0.0),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), None),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), None),
        ({"a": 1}, {"b": 1}, None),
        ([1], [1, 2], None),
        ("x", "y", None),
    ],
)
def test_the_largest_difference_of_all_numbers_is_found(
    one: Any, other: Any, difference: float | None
) -> None:
    assert _difference(one, other)[0] == difference


def test_a_file_that_would_run_code_is_not_unpickled(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in ("one", "other"):
        torch.save({"state": Runs(), "name": name}, tmp_path / f"{name}.pt")
    found, note = _file_difference(tmp_path / "one.pt", tmp_path / "other.pt")
    assert found is None
    assert "cannot be compared without unpickling" in str(note)
    assert not (tmp_path / "ran").exists()


def test_what_was_logged_is_compared_step_by_step() -> None:
    ours = [{"step": at, "loss": 0.1 * at, "eval_runtime": at} for at in range(1, 7)]
    theirs = [{**log, "eval_runtime": 0.0, "time": 5.0} for log in ours]
    assert logged_difference(ours, theirs, 3) == (6, None)
    theirs[4] = {"step": 5, "loss": 0.0}
    count, found = logged_difference(ours, theirs, 3)
    assert (count, found and (found.step, found.name, found.resumed)) == (5, (5, "loss", 0.0))


def test_a_mean_over_steps_before_and_after_the_resume_is_left_out() -> None:
    ours = [{"step": at, "loss": float(at)} for at in (4, 8, 12)]
    theirs = [{"step": 4, "loss": 4.0}, {"step": 8, "loss": 7.5}, {"step": 12, "loss": 12.0}]
    assert logged_difference(ours, theirs, 6) == (2, None)
    assert logged_difference(ours, theirs, 4)[1] is not None, "nothing is mixed where it resumed at a report"


def test_values_missing_from_before_the_kill_may_differ_and_later_ones_may_not() -> None:
    ours = [{"step": at, "loss": float(at)} for at in range(1, 7)]
    assert logged_difference(ours, ours[3:], 3) == (3, None)
    found = logged_difference(ours, ours[:5], 3)[1]
    assert found is not None
    assert (found.step, found.resumed) == (6, None)


def test_checkpoints_that_the_resume_redid_count_once() -> None:
    steps = [(1, 2), (1, 4), (1, 5), (2, 4), (2, 6)]  # the run did not resume from step 5
    keys = [CheckpointKey(*step) for step in steps]
    seen: Any = {key: str(key) for key in keys}
    assert by_step(seen, CheckpointKey(1, 2)) == {2: str(keys[0]), 4: str(keys[3]), 6: str(keys[4])}


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model.safetensors", "weights"),
        ("pytorch_model.bin", "weights"),
        ("optimizer.pt", "optimizer"),
        ("optimizer.bin", "optimizer"),
        ("scheduler.pt", "schedule"),
        ("rng_state_0.pth", "random state"),
        ("random_states_0.pkl", "random state"),
        ("checkpoint.pt", "state"),
    ],
)
def test_a_file_is_known_by_its_name(path: str, kind: str) -> None:
    assert kind_of(path) == kind
    assert not LEFT_OUT.fullmatch(path)


def test_one_difference_of_any_kind_is_enough() -> None:
    same = FileDifference("model.safetensors", "weights", 0.0)
    assert Comparison((9, 9), 3, [same]).exact
    assert not Comparison((9, 6), 3, [same]).exact
    assert not Comparison((9, 9), 3, [same, FileDifference("x.pt", "state", None, "unknown")]).exact
    assert not Comparison((9, 9), 3, [FileDifference("model.safetensors", "weights", 1e-9)]).exact
    assert not Comparison((9, 9), 3, [same], weights=6).exact
