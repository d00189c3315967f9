"""A training that ends before its last planned step, by early stopping or another callback, and what the next start does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.paths import COMPLETE
from hf_cloudtrain.tracking.status import run_state
from tests.integration._lab import Lab

WORSE_EACH_TIME: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "metric_for_best_model": "nearness",
    "greater_is_better": False,
}
PATIENT = [["EarlyStoppingCallback", {"early_stopping_patience": 1}]]
STOPPED: dict[str, Any] = {
    **WORSE_EACH_TIME,
    "greater_is_better": True,
    "num_train_epochs": 4,
    "before": PATIENT,
}
"""The best metric comes at step 4 (of 24); it ends after step 8 or 12, within an epoch of 6."""
FIRST_STEP = "'loss'"


def stop_at(step: int, **arguments: Any) -> dict[str, Any]:
    return {**arguments, "after": [["StopAt", {"step": step}]]}


class TestEarlyStopping:
    @pytest.mark.parametrize("restored_state", [True, False])
    def test_a_run_that_it_ended_is_complete_on_every_machine(self, lab: Lab, restored_state: bool) -> None:
        arguments = {**STOPPED, "restore_callback_states_from_checkpoint": restored_state}
        first = lab.train("first", **arguments)
        assert first.value["step"] % 6
        assert first.value["step"] < 24
        for machine in ("second", "third"):
            again = lab.train(machine, **arguments)
            assert (
                f"The run is complete: a callback ended training at step {first.value['step']} of 24"
                in again.log
            )
            assert "plan more epochs or steps than before, or start over with fresh=True" in again.log
            assert FIRST_STEP not in again.log
            assert (again.value["step"], again.value["best"]) == (
                first.value["step"],
                str(lab.machine(machine) / "checkpoint-4"),
            )
            assert lab.difference(machine, "first") == 0.0
        assert run_state(lab.catalog).state == "finished"

    def test_the_restored_file_says_its_own_step_again(self, lab: Lab) -> None:
        first = lab.train("first", **STOPPED)
        lab.train("second", **STOPPED)
        (state,) = lab.machine("second").glob(f"checkpoint-{first.value['step']}/trainer_state.json")
        assert json.loads(state.read_text())["global_step"] == first.value["step"]

    def test_more_epochs_train_on_and_are_complete_only_at_their_end(self, lab: Lab) -> None:
        first = lab.train("first", **STOPPED)
        more = {**STOPPED, "num_train_epochs": 5, "before": []}
        lab.killed("second", kill_at=first.value["step"] + 6, committed=first.value["step"] + 4, **more)
        third = lab.train(
            "third", **{**more, "num_train_epochs": 4}
        )  # a newer attempt saved, so the record is void
        assert (third.value["step"], FIRST_STEP in third.log) == (24, True)

    def test_a_fresh_start_trains(self, lab: Lab) -> None:
        lab.train("first", **STOPPED)
        again = lab.train("second", fresh=True, **STOPPED)
        assert FIRST_STEP in again.log

    def test_a_run_of_an_earlier_version_without_the_record_trains_on(self, lab: Lab) -> None:
        first = lab.train("first", **STOPPED)
        lab.catalog.storage.delete([COMPLETE])
        again = lab.train("second", **STOPPED)
        assert FIRST_STEP in again.log
        assert again.value["step"] > first.value["step"]

    def test_a_damaged_record_does_not_count(self, lab: Lab) -> None:
        lab.train("first", **STOPPED)
        lab.catalog.storage.write(COMPLETE, b'{"attempt": "x"')
        assert FIRST_STEP in lab.train("second", **STOPPED).log


class TestAnyCallback:
    def test_that_stops_on_a_stream_ends_the_run(self, lab: Lab) -> None:
        arguments = stop_at(6, stream=True, max_steps=20)
        lab.train("first", **arguments)
        again = lab.train("second", **arguments)
        assert "ended training at step 6 of 20, and its newest checkpoint is of step 4" in again.log
        assert FIRST_STEP not in again.log
        assert lab.train("third", **{**arguments, "max_steps": 21, "after": []}).value["step"] == 21

    def test_that_stops_while_a_notice_is_pending_does_not_end_the_run(self, lab: Lab) -> None:
        lab.train("first", after=[["StopAt", {"step": 6}], ["SignalAt", {"step": 6}]])
        assert lab.train("second").value["step"] == 12

    def test_that_stops_before_the_first_save_ends_well_with_a_warning(self, lab: Lab) -> None:
        child = lab.train("first", **stop_at(3, save_steps=500))
        assert (
            "A callback ended training at step 3 of 12, and the steps after its start are in no checkpoint."
            in child.log
        )
        assert "cloud.save(folder, name='final')" in child.log
        assert lab.difference("first", "first") == 0.0  # it came to the line that saves the model
        assert (lab.steps(), run_state(lab.catalog).state) == ([], "finished")
        assert lab.train("second", **stop_at(3, save_steps=500)).value["step"] == 3

    def test_no_callback_leaves_no_record(self, lab: Lab) -> None:
        lab.train("first")
        assert not lab.catalog.exists(COMPLETE)


class TestBestCheckpoint:
    """Trainer forgets the best checkpoint where its folder is not on this disk, although nothing loads it at the end."""

    @pytest.mark.parametrize("strategy", ["steps", "best"])
    def test_is_brought_to_a_new_machine(self, lab: Lab, strategy: str) -> None:
        arguments = {**WORSE_EACH_TIME, "greater_is_better": True, "save_strategy": strategy, "eval_steps": 2}
        plain = lab.plain(**arguments)
        lab.killed("first", kill_at=9, committed=6 if strategy == "best" else 8, **arguments)
        second = lab.train("second", **arguments)
        assert "does not exist anymore" not in second.log
        best = plain.value["best"].rpartition("/")[2]
        assert second.value["best"] == str(lab.machine("second") / best)
        assert (lab.machine("second") / best / "model.safetensors").is_file()
        assert not [record for record in second.log.splitlines() if "not on storage" in record]

    def test_that_was_never_saved_is_not_missed(self, lab: Lab) -> None:
        arguments = {**WORSE_EACH_TIME, "greater_is_better": True, "save_steps": 8}
        lab.killed("first", kill_at=9, committed=8, **arguments)
        second = lab.train("second", **arguments)
        assert second.value["best"] is None
        assert "best checkpoint" not in second.log
