"""Law 7 with the real Trainer: killed by SIGKILL and resumed on an empty disk equals uninterrupted.

The uninterrupted training is a plain one, without our callbacks, so these tests also show that the callbacks change nothing.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration._lab import Lab

BEST = {
    "save_strategy": "best",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "nearness",
    "greater_is_better": True,
}
LOAD_BEST = {**BEST, "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
STOPPING = [["EarlyStoppingCallback", {"early_stopping_patience": 3}]]
STOPPED = {**LOAD_BEST, "num_train_epochs": 3, "restore_callback_states_from_checkpoint": True}

# name: (what differs from the defaults of _attempts.py, the step of the kill, the step it resumes from)
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "save_strategy=steps": ({}, 6, 4),
    "save_strategy=epoch": ({"save_strategy": "epoch"}, 8, 6),
    "save_strategy=best": (BEST, 7, 6),
    "save_strategy=best at epochs": ({**BEST, "eval_strategy": "epoch"}, 8, 6),
    "a save at the last step of an evaluated epoch": ({"save_steps": 3, "eval_strategy": "epoch"}, 8, 6),
    "max_steps within an evaluated epoch": (
        {"save_steps": 3, "eval_strategy": "epoch", "max_steps": 9},
        8,
        6,
    ),
    "eval_on_start": ({"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 3}, 6, 4),
    "accumulation": ({"gradient_accumulation_steps": 3, "num_train_epochs": 4, "save_steps": 3}, 5, 3),
    "accumulation that does not divide the epoch": (
        {"gradient_accumulation_steps": 4, "num_train_epochs": 4, "save_steps": 3},
        5,
        3,
    ),
    "a user callback in front, which draws random numbers": ({"before": [["Jolt", {}]]}, 6, 4),
    "a user callback behind, which draws random numbers": ({"after": [["Jolt", {}]]}, 6, 4),
    "a LoRA model": ({"lora": True}, 6, 4),
    "a stream of data": ({"stream": True, "max_steps": 12}, 6, 4),
    "random masks and save_strategy=epoch": ({"masks": True, "save_strategy": "epoch"}, 8, 6),
    "data loader processes": ({"dataloader_num_workers": 1}, 6, 4),
    "load_best_model_at_end": ({**LOAD_BEST, "save_total_limit": 1}, 10, 8),
    "early stopping in front": ({**STOPPED, "before": STOPPING}, 10, 8),
    "early stopping behind": ({**STOPPED, "after": STOPPING}, 10, 8),
}


@pytest.mark.parametrize("name", CASES)
def test_law_7_resumed_equals_uninterrupted_with(lab: Lab, name: str) -> None:
    arguments, kill_at, committed = CASES[name]
    plain = lab.plain(**arguments)
    lab.killed("first", kill_at=kill_at, committed=committed, **arguments)
    resumed = lab.train("second", **arguments)
    assert resumed.value["restored"] == str(lab.machine("second") / f"checkpoint-{committed}")
    assert lab.difference("second") == 0.0
    assert [
        record for record in resumed.value["log"] if not on_start(record, name, committed)
    ] == plain.value["log"]
    seen = lab.batches("first", until=committed) + lab.batches("second", after=committed)
    assert seen == lab.batches("plain")
    assert all(lab.catalog.read(key).exact for key in lab.catalog.checkpoints())
    assert lab.steps()[-1] == plain.value["step"] or arguments.get("save_strategy") == "best"
    assert lab.problems() == []


def on_start(record: dict[str, Any], name: str, step: int) -> bool:
    """Whether it is of the evaluation that each start repeats."""
    return name == "eval_on_start" and record["step"] == step and "eval_loss" in record


class TestSaveBeforeAnEvaluation:
    """Trainer saves at the last step of an epoch before it evaluates, and a resume skips that evaluation."""

    def test_the_save_at_the_end_of_training_comes_after_the_evaluation_too(self, lab: Lab) -> None:
        lab.train("first", eval_strategy="epoch", save_steps=5)
        assert lab.steps() == [5, 10, 12]
        state = json.loads((lab.machine("first") / "checkpoint-12" / "trainer_state.json").read_text())
        assert [record["step"] for record in state["log_history"] if "eval_loss" in record] == [6, 12]
        assert "eval_loss" in lab.manifest(1, 12).metrics

    def test_a_save_that_a_later_callback_requests_is_recorded_as_inexact_and_restore_says_so(
        self, lab: Lab
    ) -> None:
        arguments = {"eval_strategy": "epoch", "save_steps": 100, "after": [["SaveAt", {"step": 6}]]}
        lab.killed("first", kill_at=8, committed=6, **arguments)
        manifest = lab.manifest(1, 6)
        assert not manifest.exact
        assert "before the evaluation at the end of the epoch" in str(manifest.inexact_reason)
        resumed = lab.train("second", **arguments)
        assert "will not equal an uninterrupted run: it was saved before the evaluation" in resumed.log


class TestBestModelOnAFreshMachine:
    def test_it_is_downloaded_survives_rotation_and_is_loaded_at_the_end(self, lab: Lab) -> None:
        """Of both: the one on this disk, and the one on storage."""
        arguments = {**LOAD_BEST, "save_total_limit": 1, "on_storage": 1}
        lab.killed("first", kill_at=10, committed=8, **arguments)
        resumed = lab.train("second", **arguments)
        assert lab.steps() == [6, 12]
        best = lab.machine("second") / "checkpoint-6"
        assert resumed.value["best"] == str(best)
        assert (best / "model.safetensors").is_file()

    def test_the_path_in_the_state_is_changed_to_this_machine_and_the_original_is_kept(
        self, lab: Lab
    ) -> None:
        arguments = {**LOAD_BEST, "save_total_limit": 2}
        lab.killed("first", kill_at=10, committed=8, **arguments)
        lab.killed("second", kill_at=9, committed=0, **arguments)
        state = (lab.machine("second") / "checkpoint-8" / "trainer_state.json").read_text()
        assert json.loads(state)["best_model_checkpoint"] == str(lab.machine("second") / "checkpoint-6")
        (original,) = lab.machine("second").glob("_cloudtrain/originals/*/trainer_state.json")
        stored = lab.catalog.storage.read("checkpoint-8/trainer_state.json")
        assert original.read_bytes() == stored
        assert json.loads(stored)["best_model_checkpoint"] == str(lab.machine("first") / "checkpoint-6")
        # Whole all the same: the next start on this machine takes it as it lies here.
        inode = (lab.machine("second") / "checkpoint-8" / "model.safetensors").stat().st_ino
        lab.killed("second", kill_at=9, committed=0, **arguments)
        assert (lab.machine("second") / "checkpoint-8" / "model.safetensors").stat().st_ino == inode
