"""`cloudtrain launch` with the real Trainer: unmodified scripts are killed and started again, and equal the uninterrupted ones."""

from __future__ import annotations

import os
import shutil
import signal
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.launch.before import prepare
from hf_cloudtrain.storage.client import Storage
from tests.integration._lab import Lab
from tests.integration._zygote import Child
from tests.integration.test_door import lines

LAUNCHED = "tests.integration._launched"


def train(lab: Lab, machine: str, function: str = "train", **arguments: Any) -> Child:
    return lab.train(machine, function, module=LAUNCHED, **arguments)


def killed(lab: Lab, machine: str, function: str = "train", **arguments: Any) -> Child:
    child = lab.start(machine, function, module=LAUNCHED, **arguments)
    assert child.wait() == -signal.SIGKILL, child.log
    return child


def plain(lab: Lab, function: str = "train", **arguments: Any) -> Child:
    return train(lab, "plain", function, run_url=None, **arguments)


def test_law_7_a_script_without_our_code_is_killed_and_resumed_on_an_empty_disk(lab: Lab) -> None:
    plain(lab)
    first = killed(lab, "first", kill_at=6, committed=4)
    second = train(lab, "second")
    assert lines(first.log)[0] == (
        f"`cloudtrain launch` has hooked the train() of Trainer: its checkpoints go to {lab.run_url}."
    )
    assert "attempt 2: resumes from checkpoint-4 (attempt 1, exact: yes) at step 4 of 12" in second.log
    assert lab.difference("second") == 0.0
    assert lab.problems() == []
    assert "CloudTrainCallback" not in second.value["callbacks"], "it leaves when train() ends"


@pytest.mark.parametrize("given", [None, False, True, "last"])
def test_a_script_that_names_no_checkpoint_or_its_newest_gets_that_of_the_run(lab: Lab, given: Any) -> None:
    killed(lab, "first", kill_at=6, committed=4)
    # This disk has the first checkpoint only, and the half of one that no save has finished.
    killed(lab, "second", kill_at=10, committed=8)
    (lab.machine("first") / "checkpoint-6").mkdir()
    child = train(lab, "first", given=given)
    assert "attempt 3: resumes from checkpoint-8 (attempt 2, exact: yes) at step 8" in child.log
    assert ("The script names" in child.log) == (given == "last")


def test_a_different_checkpoint_that_the_script_names_is_used_and_said(lab: Lab) -> None:
    killed(lab, "first", kill_at=10, committed=8)
    child = train(lab, "first", given="checkpoint-4")
    assert "The script names the checkpoint" in child.log
    assert "attempt 2: resumes at step 4 of 12, from a checkpoint that restore() did not choose" in child.log
    assert lab.keys() == ["000001-0000000004", "000001-0000000008", "000002-0000000008", "000002-0000000012"]


def test_true_on_the_first_start_is_the_error_of_trainer(lab: Lab) -> None:
    child = lab.start("first", module=LAUNCHED, given=True)
    assert child.wait() == 1
    assert "No valid checkpoint found in output directory" in child.log


def test_half_a_checkpoint_of_a_run_without_any_does_not_stop_each_restart(lab: Lab) -> None:
    killed(lab, "first", kill_at=2)
    (lab.machine("first") / "checkpoint-4").mkdir()
    child = train(lab, "first", given="last")
    assert "checkpoint-4' is not whole, as a kill leaves it" in child.log
    assert child.value["step"] == 12


def test_a_script_that_refuses_an_output_folder_with_files_starts_again_after_a_kill_before_its_first_save(
    lab: Lab,
) -> None:
    killed(lab, "first", kill_at=2)
    assert os.listdir(lab.machine("first")) == ["_cloudtrain"]
    assert prepare(lab.run_url, [], print).folder is None
    assert os.listdir(lab.machine("first")) == []
    assert train(lab, "first").value["step"] == 12


def test_the_limit_of_the_script_holds_on_storage_over_all_attempts(lab: Lab) -> None:
    killed(lab, "first", kill_at=10, committed=8, save_total_limit=2)
    assert lab.keys() == ["000001-0000000004", "000001-0000000008"]
    child = train(lab, "second", save_total_limit=2)
    assert f"its checkpoints go to {lab.run_url}, where save_total_limit=2 holds, too." in child.log
    assert lab.keys() == ["000001-0000000008", "000002-0000000012"]


def test_a_complete_run_trains_nothing_and_the_script_goes_on(lab: Lab) -> None:
    train(lab, "first")
    again = train(lab, "second")
    assert "The run is complete" in again.log
    assert lab.difference("second", "first") == 0.0


def test_a_tracker_that_is_not_installed_is_the_error_of_trainer(lab: Lab) -> None:
    child = lab.start("first", module=LAUNCHED, report_to="clearml")
    assert child.wait() == 1
    assert "ClearMLCallback requires" in child.log
    assert lab.catalog.attempts.numbers() == []


class TestSeveralTrainings:
    @pytest.mark.parametrize("skips", [False, True])
    def test_each_has_a_run_of_its_own_also_where_a_restart_skips_the_first(
        self, lab: Lab, skips: bool
    ) -> None:
        plain(lab, "two_stages")
        first = killed(lab, "first", "two_stages", kill_at=6, committed=4)
        second = train(lab, "first", "two_stages", skips=skips)
        urls = [f"train() of Trainer: its checkpoints go to {lab.run_url}."] * (not skips)
        urls.append(
            f"train() of Trainer, training 2 of this launch: its checkpoints go to {lab.run_url}/trainer-2."
        )
        assert [line.partition("hooked the ")[2] for line in lines(second.log) if "hooked" in line] == urls
        assert first.log.count("training 2 of this launch") == 1
        two = Catalog(Storage(f"{lab.run_url}/trainer-2"))
        assert [str(key) for key in two.checkpoints()] == [
            "000001-0000000004",
            "000002-0000000008",
            "000002-0000000012",
        ]
        assert [key.step for key in lab.catalog.checkpoints()] == [4, 6]
        if not skips:
            assert lab.difference("first") == 0.0

    def test_a_second_try_after_an_error_goes_on_with_the_same_run(self, lab: Lab) -> None:
        child = train(lab, "first", "retried")
        assert child.value["step"] == 12
        assert "attempt 2: resumes from checkpoint-4" in child.log
        assert "trainer-2" not in child.log

    def test_trainers_that_never_save_have_our_callback_or_never_train_are_left_alone(self, lab: Lab) -> None:
        child = train(lab, "first", "several")
        said = [line for line in lines(child.log) if "`cloudtrain launch`" in line]
        assert said == [
            "`cloudtrain launch` leaves Trainer alone: its save_strategy is 'no', so there is no checkpoint to upload.",
            "`cloudtrain launch` leaves Trainer alone: the script uses CloudTrainCallback itself.",
        ]
        assert child.value["own"].count("CloudTrainCallback") == 1
        assert lab.catalog.attempts.numbers() == []

    def test_a_subclass_that_overrides_train_is_hooked_once(self, lab: Lab) -> None:
        child = train(lab, "first", "subclassed")
        assert child.log.count("my own train") == 1
        assert child.log.count("has hooked the train() of WithOwnTrain") == 1
        assert lab.steps() == [4, 8, 12]


def test_sigterm_saves_and_leaves_with_the_code_for_a_restart(lab: Lab) -> None:
    child = lab.start("first", module=LAUNCHED, signal_at=6)
    assert child.wait() == 75, child.log
    assert lab.steps() == [4, 6]
    assert "attempt 2: resumes from checkpoint-6 (attempt 1, exact: yes)" in train(lab, "second").log


def test_all_ranks_are_hooked_and_rank_0_says_so(lab: Lab) -> None:
    ranks = lab.start_ranks("first", module=LAUNCHED, per_device_train_batch_size=2, kill_at=6, committed=4)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL, -signal.SIGKILL]
    shutil.rmtree(lab.machine("first"))
    ranks = lab.start_ranks("first", module=LAUNCHED, per_device_train_batch_size=2)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].log
    assert ["has hooked" in rank.log for rank in ranks] == [True, False]
    assert "attempt 2: resumes from checkpoint-4 (attempt 1, exact: yes)" in ranks[0].log
