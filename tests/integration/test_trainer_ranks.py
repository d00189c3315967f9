"""Two processes that train together (gloo): all of them call everything, and one moves the bytes."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from tests.integration._lab import Lab
from tests.integration._torchrun import kill_family, torchrun
from tests.integration._zygote import PATIENCE, Child

MISHAPS = "tests.integration._mishaps"
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "an evaluation at each epoch, at whose end it saves": ({"save_steps": 3, "eval_strategy": "epoch"}, 5, 3),
    "accumulation": ({"gradient_accumulation_steps": 2, "num_train_epochs": 4, "save_steps": 3}, 5, 3),
}


@pytest.mark.slow
def test_law_7_torchrun_killed_and_resumed_in_an_empty_folder_equals_uninterrupted(lab: Lab) -> None:
    finish(lab.start_ranks("plain", run_url=None))
    first, second = (lab.folder / f"{machine}.log" for machine in ("first", "second"))
    holds = [["HoldAt", {"step": 4}]]
    with torchrun(*worker(lab, "first", save_steps=2, after=holds), log=first) as launcher:
        lab.wait_until(lambda: lab.steps() == [2] or launcher.poll() is not None)
        assert launcher.poll() is None, first.read_text()
        kill_family(launcher)
    with torchrun(*worker(lab, "second", save_steps=2), log=second) as launcher:
        assert launcher.wait(PATIENCE) == 0, second.read_text()
    assert lab.difference("second") == 0.0
    for rank in range(2):
        seen = lab.batches("first", rank=rank, until=2) + lab.batches("second", rank=rank, after=2)
        assert seen == lab.batches("plain", rank=rank)
    assert {entry.path for entry in lab.manifest(1, 2).files} >= {"rng_state_0.pth", "rng_state_1.pth"}
    assert lab.catalog.attempts.numbers() == [1, 2]
    assert lab.problems() == []


@pytest.mark.parametrize("name", CASES)
def test_law_7_ranks_killed_and_resumed_equal_uninterrupted_with(lab: Lab, name: str) -> None:
    arguments, kill_at, committed = CASES[name]
    finish(lab.start_ranks("plain", run_url=None, **arguments))
    ranks = lab.start_ranks("first", kill_at=kill_at, committed=committed, **arguments)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2
    finish(lab.start_ranks("second", **arguments))
    assert lab.difference("second") == 0.0
    for rank in range(2):
        seen = lab.batches("first", rank=rank, until=committed)
        seen += lab.batches("second", rank=rank, after=committed)
        assert seen == lab.batches("plain", rank=rank)
    assert all(lab.catalog.read(key).exact for key in lab.catalog.checkpoints())


def test_only_one_process_sends_requests_to_the_storage(lab: Lab) -> None:
    ranks = lab.start_ranks("first", "calls", module=MISHAPS)
    finish(ranks)
    first, second = (rank.value for rank in ranks)
    assert first["upload"] > 0
    assert first["create"] > 0
    assert second == {}
    ranks = lab.start_ranks("second", "calls", module=MISHAPS)
    finish(ranks)
    first, second = (rank.value for rank in ranks)
    assert first["download"] > 0
    assert second == {}


class TestErrorsReachAllRanks:
    def test_law_9_a_forgotten_restore(self, lab: Lab) -> None:
        finish(lab.start_ranks("first", max_steps=3))
        for output in fail(lab.start_ranks("second", max_steps=3, restore="forgotten")):
            assert "RunHasCheckpointsError: The run" in output
            assert "'loss'" not in output

    def test_law_8_a_position_that_cannot_be_converted(self, lab: Lab) -> None:
        lab.killed("first", kill_at=4, committed=3, save_steps=3)
        for output in fail(lab.start_ranks("second")):
            assert "PositionError: checkpoint-3 cannot be resumed here: 1 processes before, 2 now." in output
            assert "12 samples, 12 of them in this epoch, which is not a multiple of the 8 samples" in output

    def test_a_storage_that_cannot_be_reached(self, lab: Lab) -> None:
        (lab.folder / "run").touch()
        for output in fail(lab.start_ranks("first")):
            assert "hf_cloudtrain.errors.Storage" in output
            assert f"'{lab.folder}/run'" in output

    def test_law_5_checkpoints_that_are_not_on_storage_at_the_end(self, lab: Lab) -> None:
        env = {"HF_CLOUDTRAIN_DRAIN_TIMEOUT": "1"}
        for output in fail(lab.start_ranks("first", "outage", module=MISHAPS, first=2, last=None, env=env)):
            assert "NotCommittedError: Not on storage yet: checkpoint-6" in output
            assert f"cloudtrain checkpoint flush {lab.machine('first')}" in output

    def test_a_configuration_that_never_saves(self, lab: Lab) -> None:
        for output in fail(lab.start_ranks("first", save_strategy="no")):
            assert "ConfigurationError: save_strategy='no' never saves" in output


def worker(lab: Lab, machine: str, **arguments: Any) -> list[str]:
    """The arguments that start an attempt on that machine."""
    given = {
        "output_dir": str(lab.machine(machine)),
        "run_url": lab.run_url,
        "result": f"{lab.folder}/{machine}.safetensors",
        "seen": f"{lab.folder}/{machine}-{{rank}}.seen",
        **arguments,
    }
    return ["-m", "tests.integration._attempts", json.dumps(given)]


def finish(ranks: list[Child]) -> None:
    assert [rank.wait() for rank in ranks] == [0] * len(ranks), "\n".join(rank.log for rank in ranks)


def fail(ranks: list[Child]) -> list[str]:
    """The output of each rank, after all of them failed."""
    assert [rank.wait() for rank in ranks] == [1] * len(ranks), "\n".join(rank.log for rank in ranks)
    return [rank.log for rank in ranks]
