"""A preemption: one rank receives a notice, all save at the same step and leave, and a different machine continues."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from hf_cloudtrain.errors import PreemptedExit
from tests.integration._lab import Lab
from tests.integration._torchrun import torchrun
from tests.integration._zygote import PATIENCE, Child
from tests.integration.test_trainer_ranks import worker

LEFT = PreemptedExit.CODE
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # what, where the signal comes, the step that is saved
    "between two saves": ({}, {"step": 6}, 7),
    "at a step that is saved anyway": ({}, {"step": 3}, 4),
    "before the first step is over": ({}, {"step": 0, "event": "on_step_begin"}, 1),
    "accumulation": ({"gradient_accumulation_steps": 2, "num_train_epochs": 4}, {"step": 4}, 5),
    "a save and an evaluation an epoch": (
        {"save_strategy": "epoch", "eval_strategy": "epoch"},
        {"step": 7},
        8,
    ),
    "within an accumulation": (
        {"gradient_accumulation_steps": 2, "num_train_epochs": 4},
        {"step": 4, "event": "on_substep_end"},
        5,
    ),
    "the last step of an epoch": ({}, {"step": 5}, 6),
    "the last step of an epoch that is evaluated": ({"eval_strategy": "epoch"}, {"step": 11}, 12),
    "during an evaluation": (
        {"eval_strategy": "steps", "eval_steps": 3},
        {"step": 6, "event": "on_prediction_step"},
        6,
    ),
    "the best is loaded at the end": (
        {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True},
        {"step": 9},
        10,
    ),
}
EPOCHS = {"num_train_epochs": 3}


@pytest.mark.parametrize("name", CASES)
def test_law_7_preempted_and_resumed_in_an_empty_folder_equals_uninterrupted(lab: Lab, name: str) -> None:
    arguments, where, step = CASES[name]
    arguments = {**EPOCHS, **arguments}
    lab.plain(**arguments)
    child = lab.start("first", after=[["SignalAt", where]], **arguments)
    assert child.wait() == LEFT, child.log
    assert lab.steps()[-1] == step
    assert lab.steps().count(step) == 1
    assert "SIGTERM: saving at step" in child.log
    assert f"checkpoint-{step} is on storage." in child.log
    assert not (lab.folder / "first.safetensors").exists()  # nothing after the training runs
    lab.train("second", **arguments)
    assert lab.manifest(1, step).exact
    assert lab.difference("second") == 0.0
    seen = lab.batches("first", until=step) + lab.batches("second", after=step)
    assert seen == lab.batches("plain")
    assert lab.problems() == []


@pytest.mark.parametrize("signalled", [0, 1])
def test_law_7_one_rank_receives_the_signal_and_both_save_the_same_step(lab: Lab, signalled: int) -> None:
    arguments = {
        "per_device_train_batch_size": 1,  # 11 batches an epoch and rank, 6 steps
        "gradient_accumulation_steps": 2,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
    }
    finish(lab.start_ranks("plain", run_url=None, **arguments))
    where = {"step": 7, "rank": signalled, "times": 3}
    ranks = lab.start_ranks("first", after=[["SignalAt", where]], **arguments)
    assert [rank.wait() for rank in ranks] == [LEFT, LEFT], "\n".join(rank.log for rank in ranks)
    assert lab.steps() == [6, 9]  # received after step 7, voted at the end of 8, known at the end of 9
    assert all(lab.catalog.read(key).exact for key in lab.catalog.checkpoints())
    finish(lab.start_ranks("second", **arguments))
    assert lab.difference("second") == 0.0
    for rank in range(2):
        seen = lab.batches("first", rank=rank, until=9) + lab.batches("second", rank=rank, after=9)
        assert seen == lab.batches("plain", rank=rank)
    assert not lab.outbox("first")


@pytest.mark.slow
def test_law_7_a_launcher_that_receives_the_signal_lets_all_ranks_save_before_it_ends(lab: Lab) -> None:
    """It signals the whole group of each rank's process, and a loader worker that died of it would end the training."""
    finish(lab.start_ranks("plain", run_url=None))
    exit_file, log = lab.folder / "exit.json", lab.folder / "first.log"
    arguments = worker(lab, "first", after=[["SignalLauncherAt", {"step": 5}]], dataloader_num_workers=1)
    with torchrun(*arguments, log=log, env={"HF_CLOUDTRAIN_EXIT_FILE": str(exit_file)}) as launcher:
        assert launcher.wait(PATIENCE) == 1, log.read_text()  # whatever its workers' exit code was
    assert json.loads(exit_file.read_text())["committed"] == "000001-0000000006"
    assert lab.steps() == [4, 6]
    finish(lab.start_ranks("second"))
    assert lab.difference("second") == 0.0


def test_ranks_do_not_wait_for_a_crashed_one(lab: Lab) -> None:
    """A launcher signals the survivors of a crash, too."""
    dies = {"step": 5, "rank": 1, "signal": signal.SIGKILL}
    survivor = {"step": 5, "rank": 0}
    ranks = lab.start_ranks("first", after=[["SignalAt", dies], ["SignalAt", survivor]])
    assert ranks[1].wait() == -signal.SIGKILL
    assert ranks[0].wait() not in (0, LEFT)
    assert lab.steps() == [4]


def test_exit_file_and_heartbeat_record_the_preemption(lab: Lab) -> None:
    path = lab.folder / "exit.json"
    path.write_text("of an earlier attempt")
    env = {"HF_CLOUDTRAIN_EXIT_FILE": str(path)}
    child = lab.start("first", after=[["SignalAt", {"step": 6, "signal": signal.SIGHUP}]], env=env)
    assert child.wait() == LEFT, child.log
    output = json.loads(path.read_text())
    assert output == {
        "outcome": "preempted",
        "reason": "SIGHUP",
        "run_url": lab.run_url,
        "attempt": 1,
        "step": 7,
        "saved": "000001-0000000007",
        "committed": "000001-0000000007",
    }
    progress = lab.catalog.attempts.read_progress(1)
    assert progress is not None
    assert (progress["state"], progress["step"]) == ("preempted", 7)
    lab.train("second", env=env)
    assert json.loads(path.read_text())["outcome"] == "finished"


def test_after_a_signal_at_the_last_step_the_training_is_complete(lab: Lab) -> None:
    lab.plain()
    child = lab.train(
        "first", after=[["SignalAt", {"step": 12, "event": "on_step_begin"}], ["SignalAt", {"step": 11}]]
    )
    assert child.value["step"] == 12
    assert lab.difference("first") == 0.0


def test_an_evaluation_that_does_not_fit_into_the_time_is_skipped_and_recorded(lab: Lab) -> None:
    arguments = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 100}
    child = lab.start("first", after=[["SignalAt", {"step": 3}]], **arguments)
    assert child.wait() == LEFT, child.log
    assert lab.steps() == [4]
    manifest = lab.manifest(1, 4)
    assert not manifest.exact
    assert "the evaluation at this step was skipped for lack of time" in str(manifest.inexact_reason)
    assert "eval_loss" not in child.log


@pytest.mark.ordinary_saves
def test_a_late_upload_stays_in_the_outbox_and_the_next_start_finishes_it(lab: Lab) -> None:
    child = lab.start(
        "first",
        "outage",
        module="tests.integration._mishaps",
        first=2,
        last=None,
        after=[["SignalAt", {"step": 6}]],
        env={"HF_CLOUDTRAIN_GRACE": "2"},
    )
    assert child.wait() == LEFT, child.log
    assert "Not on storage yet: checkpoint-7" in child.log
    assert f"cloudtrain checkpoint flush {lab.machine('first')}" in child.log
    assert [entry.title for entry in lab.outbox("first")] == ["checkpoint-7", "checkpoint-4"]
    lab.plain()
    lab.train("first")
    assert lab.difference("first") == 0.0


@pytest.mark.parametrize("parts", ["uploads first", "emergency first"])
def test_the_separate_callbacks_leave_in_time_in_any_order(lab: Lab, parts: str) -> None:
    signalled = {"after": [["SignalAt", {"step": 6}]]}
    child = lab.start(
        "first",
        "outage",
        module="tests.integration._mishaps",
        first=2,
        last=None,
        parts=parts,
        env={"HF_CLOUDTRAIN_GRACE": "2", "HF_CLOUDTRAIN_EXIT_FILE": str(lab.folder / "exit.json")},
        **signalled,
    )
    assert child.wait() == LEFT, child.log
    assert "Not on storage yet: checkpoint-7" in child.log
    assert json.loads((lab.folder / "exit.json").read_text())["outcome"] == "preempted"


class TestRefused:
    def test_the_frameworks_own_save_on_sigterm(self, lab: Lab) -> None:
        output = lab.fails("first", enable_jit_checkpoint=True)
        assert "ConfigurationError: enable_jit_checkpoint=True saves on SIGTERM by itself" in output


class TestCtrlC:
    def test_the_first_saves_and_leaves(self, lab: Lab) -> None:
        child = lab.start("first", after=[["InterruptAt", {"step": 6}]])
        assert child.wait() == LEFT, child.log
        assert lab.steps()[-1] == 7

    def test_the_second_quits_at_once(self, lab: Lab) -> None:
        child = lab.start("first", after=[["InterruptAt", {"step": 6, "times": 2}]])
        assert child.wait() == -signal.SIGINT, child.log
        assert "KeyboardInterrupt" in child.log
        assert lab.steps() == [4]


def finish(ranks: list[Child]) -> None:
    assert [rank.wait() for rank in ranks] == [0] * len(ranks), "\n".join(rank.log for rank in ranks)
