"""Asynchronous saves of the real Trainer, in every trouble: what was handed over is committed, and nothing is partial."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration._lab import Lab
from tests.integration._zygote import Child

pytestmark = pytest.mark.slow

STAGED = "tests.integration._staged"
WEIGHTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
LOAD_BEST: dict[str, Any] = {
    "save_steps": 2,
    "save_total_limit": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "nearness",
    "greater_is_better": True,
    "load_best_model_at_end": True,
}
EARLY = [["EarlyStoppingCallback", {"early_stopping_patience": 1}]]
ENDS: dict[str, dict[str, Any]] = {
    "all": {},
    "each save deletes the one before": {"save_total_limit": 1},
    "the best is loaded": LOAD_BEST,
    "stops early within an epoch": {**LOAD_BEST, "before": EARLY, "num_train_epochs": 4},
    "stops early after an epoch": {
        **LOAD_BEST,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "after": EARLY,
        "num_train_epochs": 4,
    },
    "only the best is saved": {**LOAD_BEST, "save_strategy": "best"},
    "loader processes": {"dataloader_num_workers": 1},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.parametrize("name", ENDS)
def test_law_7_the_end_of_a_training_is_that_of_a_plain_one(lab: Lab, name: str) -> None:
    """Weights, best model and folders on the disk."""
    arguments = ENDS[name]
    plain = lab.plain(**arguments)
    found = train(lab, "ours", **arguments)
    assert found.value["staged"] > 0
    assert lab.difference("ours") == 0.0
    for key in ("step", "log"):
        assert found.value[key] == plain.value[key]
    assert folder_of(found.value["best"]) == folder_of(plain.value["best"])
    assert checkpoints(lab, "ours").keys() == checkpoints(lab, "plain").keys()
    assert partial(lab, "ours") == []
    assert lab.problems() == []
    assert "has ended unexpectedly" not in found.log


@pytest.mark.parametrize("name", ["the best is loaded", "stops early after an epoch"])
def test_law_7_two_ranks_end_as_plain_ones(lab: Lab, name: str) -> None:
    arguments = {**ENDS[name], "per_device_train_batch_size": 2}
    for child in lab.start_ranks("plain", run_url=None, **arguments):
        assert child.wait() == 0, child.log
    first, second = lab.start_ranks(
        "ours", "staged_train", module=STAGED, ends="no process group", **arguments
    )
    assert (first.wait(), second.wait()) == (0, 0), first.log + second.log
    assert (first.value["staged"] > 0, second.value["staged"]) == (True, 0)
    assert lab.difference("ours") == 0.0
    assert folder_of(first.value["best"]) == folder_of(second.value["best"])
    assert partial(lab, "ours", rng="rng_state_0.pth") == []
    assert lab.problems() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_law_4_a_killed_training_loses_nothing_that_its_writer_has(lab: Lab, workers: int) -> None:
    """Also while processes of its DataLoader hold its end of the socket. A new start on the disk waits for the writer."""
    lab.plain()
    first = start(lab, "ours", "hold", dataloader_num_workers=workers)
    writer = handed_over(lab, first)
    assert lab.keys() == []
    assert "checkpoint-4" not in checkpoints(lab, "ours")
    first.kill()
    second = start(lab, "ours", "", dataloader_num_workers=workers)
    lab.wait_until(lambda: "Waiting for more than 5 s to let the writer" in second.log)
    os.kill(writer, signal.SIGCONT)
    assert second.wait() == 0, second.log
    assert folder_of(second.value["restored"]) == "checkpoint-4"
    assert lab.difference("ours") == 0.0
    assert lab.keys()[0] == "000001-0000000004"
    assert (lab.problems(), partial(lab, "ours")) == ([], [])


def test_law_1_a_killed_training_and_a_killed_writer_leave_nothing_partial(lab: Lab) -> None:
    lab.plain()
    first = start(lab, "ours", "hold")
    os.kill(handed_over(lab, first), signal.SIGKILL)
    first.kill()
    second = train(lab, "ours")
    assert second.value["restored"] is None
    assert lab.difference("ours") == 0.0
    assert (lab.problems(), partial(lab, "ours")) == ([], [])


def test_a_killed_writer_is_replaced(lab: Lab) -> None:
    lab.plain()
    found = train(lab, "ours", trouble="kills the writer")
    assert "has ended unexpectedly (exit code -9)" in found.log
    assert lab.steps() == [4, 8, 12]
    assert (lab.difference("ours"), lab.problems(), partial(lab, "ours")) == (0.0, [], [])


@pytest.mark.parametrize(
    ("trouble", "code", "says"),
    [
        ("raises", 1, "a bug of the user"),
        ("exits", 3, ""),
        ("sigterm while writing", 75, "checkpoint-6 is on storage"),
        ("sigterm while staging", 75, "checkpoint-5 is on storage"),
    ],
)
def test_a_training_that_ends_early_commits_what_it_saved(
    lab: Lab, trouble: str, code: int, says: str
) -> None:
    child = start(lab, "ours", trouble)
    assert child.wait() == code, child.log
    assert says in child.log
    assert lab.steps() == [4, *(int(step) for step in re.findall(r"checkpoint-(\d) is on", child.log))]
    assert (lab.problems(), partial(lab, "ours")) == ([], [])


@pytest.mark.parametrize("parts", ["cloud", "uploads first", "emergency first"])
def test_an_emergency_save_beside_one_that_is_still_written_loses_neither(lab: Lab, parts: str) -> None:
    trouble = "preempted while the best is written"
    child = start(lab, "ours", trouble, parts=parts, **{**LOAD_BEST, "save_total_limit": None})
    assert child.wait() == 75, child.log
    last = max(lab.steps())
    assert last == 7
    assert "checkpoint-6" in checkpoints(lab, "ours")
    state = json.loads((lab.machine("ours") / f"checkpoint-{last}/trainer_state.json").read_text())
    assert (state["best_global_step"], folder_of(state["best_model_checkpoint"])) == (6, "checkpoint-6")
    assert lab.steps()[-2:] == [6, 7]
    assert (lab.problems(), partial(lab, "ours")) == ([], [])


def test_an_exception_within_a_save_leaves_the_files_that_were_saved(lab: Lab) -> None:
    child = start(lab, "ours", "fails in a save")
    assert child.wait() == 1, child.log
    assert "a bug in a save" in child.log
    assert lab.steps() == [4]
    assert {"model.safetensors", "optimizer.pt"} <= checkpoints(lab, "ours")["checkpoint-8"]
    assert "rng_state.pth" not in checkpoints(lab, "ours")["checkpoint-8"]


def test_other_saves_of_the_user_are_not_touched(lab: Lab) -> None:
    found = train(lab, "ours", trouble="user saves")
    assert found.value["staged"] == 2
    assert {"extra.pt", "of-a-thread.pt"} <= checkpoints(lab, "ours")["checkpoint-4"]
    assert (lab.problems(), partial(lab, "ours")) == ([], [])


def test_without_memory_saves_are_ordinary_and_one_line_says_so(lab: Lab) -> None:
    found = train(lab, "ours", trouble="little memory")
    assert found.value["staged"] == 0
    assert found.log.count("Saves are not asynchronous: staging needs ") == 1
    assert re.search(r" of memory, and 0 \w+ can be taken", found.log)
    assert lab.steps() == [4, 8, 12]


def test_law_5_a_full_disk_in_the_writer_fails_the_training_at_its_end(lab: Lab) -> None:
    child = start(lab, "ours", "full disk")
    assert child.wait() == 1, child.log
    for step in (4, 8):
        assert f"checkpoint-{step} could not be kept for upload: OSError: [Errno 28]" in child.log
    assert "NotCommittedError: The last checkpoint, 000001-0000000008, is not on " in child.log
    assert (lab.steps(), checkpoints(lab, "ours")) == ([], {})


def test_two_trainings_of_one_process(lab: Lab) -> None:
    lab.plain()
    child = lab.train("ours", "two_trainings", module=STAGED)
    assert child.value == {"staged": 3, "inner": 8}
    assert lab.steps() == [4, 8, 12]
    assert (lab.problems(), partial(lab, "ours"), partial(lab, "ours-inner")) == ([], [], [])


def start(lab: Lab, machine: str, trouble: str, **arguments: Any) -> Child:
    return lab.start(machine, "staged_train", module=STAGED, trouble=trouble, **arguments)


def train(lab: Lab, machine: str, **arguments: Any) -> Child:
    return lab.train(machine, "staged_train", module=STAGED, **arguments)


def handed_over(lab: Lab, child: Child) -> int:
    """The process id of the writer, once it has step 4 and the training waits."""
    held = lab.machine("ours") / "held"
    lab.wait_until(lambda: held.exists() or child.poll() is not None)
    assert held.exists(), child.log
    return int((lab.machine("ours") / "writer").read_text())


def checkpoints(lab: Lab, machine: str) -> dict[str, set[str]]:
    return {
        folder.name: {path.name for path in folder.iterdir()}
        for folder in lab.machine(machine).glob("checkpoint-*")
    }


def partial(lab: Lab, machine: str, rng: str = "rng_state.pth") -> list[str]:
    """Folders that look like a checkpoint and lack files."""
    needed = {*WEIGHTS, "trainer_state.json", "config.json"} - {"rng_state.pth"} | {rng}
    return [name for name, files in checkpoints(lab, machine).items() if not needed <= files]


def folder_of(path: str | None) -> str | None:
    return None if path is None else Path(path).name
