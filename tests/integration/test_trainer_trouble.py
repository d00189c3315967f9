"""Mistakes that a user may make with the real Trainer, and failures that may happen."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.tracking.history import read_history
from tests.integration._lab import Lab
from tests.proxy import Proxy, s3_error
from tests.servers import MotoServer

MISHAPS = "tests.integration._mishaps"
FIRST_STEP = "'loss'"
"""Trainer prints it after a step."""
SOON = 30.0
"""Seconds in which a process ends on a slow and busy machine, if nothing delays it."""


class TestRefusedBeforeTheFirstStep:
    def test_a_configuration_that_never_saves(self, lab: Lab) -> None:
        output = lab.fails("first", save_strategy="no")
        assert "ConfigurationError: save_strategy='no' never saves a checkpoint" in output
        assert FIRST_STEP not in output

    @pytest.mark.parametrize("restore", ["forgotten", "dropped"])
    def test_law_9_step_0_on_a_run_that_has_checkpoints(self, lab: Lab, restore: str) -> None:
        lab.train("first")
        output = lab.fails("first", restore=restore)
        assert "RunHasCheckpointsError" in output
        assert "trainer.train(resume_from_checkpoint=cloud.restore(args))" in output
        assert FIRST_STEP not in output
        assert lab.catalog.attempts.numbers() == [1]
        # Nothing is changed: the corrected script finds everything as it was.
        assert (lab.machine("first") / "checkpoint-12" / "model.safetensors").is_file()

    def test_a_trial_of_a_hyperparameter_search(self, lab: Lab) -> None:
        output = lab.fails("first", "search", module=MISHAPS)
        assert "A hyperparameter search trains many runs, but a run URL names one" in output
        assert FIRST_STEP not in output
        assert lab.catalog.attempts.numbers() == []

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"per_device_train_batch_size": 3}, "4 samples per batch and process before, 3 now"),
            ({"gradient_accumulation_steps": 3}, "1 batches per optimizer step before, 3 now"),
        ],
    )
    def test_law_8_a_batch_or_accumulation_that_cannot_be_converted(
        self, lab: Lab, change: dict[str, int], text: str
    ) -> None:
        lab.killed("first", kill_at=6, committed=4)
        output = lab.fails("second", **change)
        assert f"PositionError: checkpoint-4 cannot be resumed here: {text}" in output
        assert FIRST_STEP not in output
        assert not (lab.machine("second") / "checkpoint-4").exists()

    def test_an_output_dir_that_cannot_be_written_to(self, lab: Lab) -> None:
        lab.killed("first", kill_at=6, committed=4)
        (lab.folder / "file").touch()
        output = lab.fails("file/out", "restores_only", module=MISHAPS)
        assert f"output_dir '{lab.machine('file/out')}' cannot be written to" in output

    def test_a_bucket_that_does_not_exist(self, lab: Lab, moto: MotoServer) -> None:
        output = lab.fails("first", run_url="s3://no-such-bucket/run", env=on(moto))
        assert "ObjectNotFoundError" in output
        assert "no-such-bucket" in output
        assert FIRST_STEP not in output

    def test_a_bucket_that_may_only_be_read(self, lab: Lab, moto: MotoServer) -> None:
        with Proxy(moto.endpoint) as proxy:
            proxy.rules.append(
                lambda call, _: s3_error(403, "AccessDenied") if call.method == "PUT" else None
            )
            run_url = f"s3://{moto.make_bucket()}/run"
            output = lab.fails("first", run_url=run_url, env=on(moto, endpoint_url=proxy.endpoint))
        assert "StoragePermissionError" in output
        assert FIRST_STEP not in output


class TestCallbacks:
    @pytest.mark.parametrize("parts", ["uploads", "both"])
    def test_separate_callbacks_are_one_attempt_and_resume(self, lab: Lab, parts: str) -> None:
        lab.killed("first", kill_at=6, committed=4, parts=parts)
        assert lab.train("second", parts=parts).value["restored"]
        assert lab.catalog.attempts.numbers() == [1, 2]
        assert lab.steps() == [4, 8, 12]

    def test_steps_alone_are_tracked_and_upload_nothing(self, lab: Lab) -> None:
        lab.train("first", parts="steps", save_strategy="no")
        history = read_history(lab.run_url)
        assert sorted(history.step_seconds) == list(range(1, 13))
        assert [(info.state, info.last_step) for info in history.attempts] == [("finished", 12)]
        assert lab.steps() == []

    def test_curves_do_not_double_after_a_resume(self, lab: Lab) -> None:
        lab.killed("first", kill_at=7, committed=4)
        value = lab.train("second").value
        history = read_history(lab.run_url)
        logged = [(log["step"], log["loss"]) for log in history.logs if "loss" in log]
        assert logged == [(log["step"], log["loss"]) for log in value["log"]]
        assert [info.first_step for info in history.attempts] == [0, 4]

    def test_the_run_url_may_come_from_the_environment(self, lab: Lab) -> None:
        lab.train("first", env={"HF_CLOUDTRAIN_RUN_URL": lab.run_url})
        assert lab.steps() == [4, 8, 12]

    def test_each_save_of_a_final_model_has_a_manifest_of_its_own(self, lab: Lab) -> None:
        value = lab.train("first", "saves_model", module=MISHAPS, times=2).value
        assert value["urls"] == [f"{lab.run_url}/final", f"{lab.run_url}/final.2"]
        manifest = NamedFolders(lab.catalog).read(NamedFolders(lab.catalog).keys()[0])
        assert {entry.path for entry in manifest.files} >= {"config.json", "model.safetensors"}
        assert lab.steps()[-1] == 12


class TestStartsAgain:
    @pytest.mark.ordinary_saves
    def test_a_fresh_start_ranks_above_what_the_run_had_and_keeps_it(self, lab: Lab) -> None:
        lab.train("first")
        lab.killed("second", kill_at=6, committed=4, fresh=True)
        assert lab.keys() == [
            "000001-0000000004",
            "000001-0000000008",
            "000001-0000000012",
            "000002-0000000004",
        ]
        assert lab.problems() == []
        assert lab.train("third").value["restored"] == str(lab.machine("third") / "checkpoint-4")

    def test_a_complete_run_says_so_and_trains_nothing(self, lab: Lab) -> None:
        lab.train("first")
        again = lab.train("second")
        assert "The run is complete: step 12 of 12. Nothing is trained." in again.log
        assert FIRST_STEP not in again.log
        assert lab.difference("second", "first") == 0.0
        assert lab.steps() == [4, 8, 12]

    def test_a_run_complete_within_an_epoch_is_not_trained_on(self, lab: Lab) -> None:
        lab.train("first", max_steps=9)
        again = lab.train("second", max_steps=9)
        assert "The run is complete: step 9 of 9. Nothing is trained." in again.log
        assert FIRST_STEP not in again.log
        assert again.value["step"] == 9
        assert lab.difference("second", "first") == 0.0
        assert lab.steps() == [4, 8, 9]

    def test_law_9_a_second_train_of_the_same_trainer_is_not_a_fresh_start(self, lab: Lab) -> None:
        output = lab.fails("first", "trains_again", module=MISHAPS)
        assert "RunHasCheckpointsError" in output
        assert lab.steps() == [4, 8, 12]

    def test_law_9_a_notebook_that_forgets_to_restore_after_an_error(self, lab: Lab) -> None:
        first = {"after": [["FailAt", {"step": 6}]]}
        output = lab.fails("first", "notebook", module=MISHAPS, first=first, second={"restore": "forgotten"})
        assert "RunHasCheckpointsError" in output

    def test_a_notebook_continues_in_a_different_folder_after_an_error(self, lab: Lab) -> None:
        first = {"after": [["FailAt", {"step": 6}]]}
        second = {"output_dir": str(lab.machine("second"))}
        value = lab.train("first", "notebook", module=MISHAPS, first=first, second=second).value
        assert value["first"] == "ZeroDivisionError('a bug of the user')"
        assert value["restored"] == str(lab.machine("second") / "checkpoint-4")
        assert lab.catalog.attempts.numbers() == [1, 2]

    @pytest.mark.parametrize("at", [1, 6])
    def test_auto_find_batch_size_makes_a_new_attempt(self, lab: Lab, at: int) -> None:
        lab.train("first", "out_of_memory", module=MISHAPS, at=at)
        assert lab.catalog.attempts.numbers() == [1, 2]
        newest = lab.catalog.newest()
        assert newest
        assert newest.attempt == 2
        position = lab.catalog.read(newest).position
        assert position.per_device_train_batch_size < 4
        assert position.samples_seen == 44
        assert lab.problems() == []


class TestStaleFiles:
    def test_local_checkpoints_of_a_different_history_are_moved_aside_and_never_used(self, lab: Lab) -> None:
        lab.killed("first", kill_at=6, committed=4)
        stale = lab.machine("first") / "checkpoint-999"
        stale.mkdir()
        (stale / "model.safetensors").write_bytes(b"of another run")
        again = lab.train("first")
        assert again.value["restored"] == str(lab.machine("first") / "checkpoint-4")
        assert not stale.exists()
        moved = lab.machine("first") / "_cloudtrain" / "stale" / "checkpoint-999"
        assert (moved / "model.safetensors").read_bytes() == b"of another run"
        assert lab.steps() == [4, 8, 12]

    def test_an_incomplete_local_checkpoint_is_not_used(self, lab: Lab) -> None:
        lab.plain()
        lab.killed("first", kill_at=6, committed=4)
        (lab.machine("first") / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
        lab.train("first")
        assert lab.difference("first") == 0.0

    def test_a_random_state_of_a_training_on_more_ranks_is_not_uploaded(self, lab: Lab) -> None:
        litter = {"step": 2, "path": "checkpoint-4/rng_state_3.pth"}
        lab.train("first", before=[["Litter", litter]])
        paths = {entry.path for entry in lab.manifest(1, 4).files}
        assert "rng_state.pth" in paths
        assert "rng_state_3.pth" not in paths
        assert (lab.machine("first") / litter["path"]).is_file()


class TestInexact:
    def test_save_only_model_warns_is_recorded_and_restore_says_so(self, lab: Lab) -> None:
        lab.plain()
        first = lab.killed("first", kill_at=6, committed=4, save_only_model=True)
        assert "A resume will not equal an uninterrupted run: save_only_model=True leaves out" in first.log
        assert not lab.manifest(1, 4).exact
        second = lab.train("second", save_only_model=True)
        assert "will not equal an uninterrupted run: save_only_model=True leaves out" in second.log
        assert lab.difference("second") > 0.0  # else the 0.0 of the other tests would prove nothing

    def test_callbacks_whose_state_is_not_restored_are_recorded(self, lab: Lab) -> None:
        stopping = ["EarlyStoppingCallback", {"early_stopping_patience": 3}]
        arguments: dict[str, Any] = {
            "eval_strategy": "steps",
            "eval_steps": 4,
            "metric_for_best_model": "nearness",
            "greater_is_better": True,
            "load_best_model_at_end": True,
            "before": [stopping],
        }
        lab.train("first", **arguments)
        assert lab.manifest(1, 4).exact, "it is as it was made"
        assert "EarlyStoppingCallback" in str(lab.manifest(1, 8).inexact_reason)


class TestSlowAndBrokenStorage:
    def test_law_4_rotation_while_an_upload_is_slow_loses_nothing(self, lab: Lab) -> None:
        arguments = {"save_steps": 2, "save_total_limit": 1, "waiting": 2}
        child = lab.train("first", "slow_upload", module=MISHAPS, until=11, **arguments)
        assert [path.name for path in lab.machine("first").glob("checkpoint-*")] == ["checkpoint-12"]
        # The first was under way, and the newest counts; those that waited in between were dropped, and the log says so.
        steps = lab.steps()
        assert (steps[0], steps[-1]) == (2, 12)
        assert 4 not in steps
        assert "checkpoint-4 is not uploaded: uploads are slower than saves" in child.log
        assert lab.problems() == []
        assert lab.outbox("first") == []

    @pytest.mark.ordinary_saves
    def test_law_4_the_next_start_commits_what_a_kill_left_in_the_outbox(self, lab: Lab) -> None:
        lab.plain()
        child = lab.start("first", "slow_upload", module=MISHAPS, until=-1, kill_at=6)
        assert child.wait() == -signal.SIGKILL
        assert lab.keys() == []
        assert [str(entry.key) for entry in lab.outbox("first")] == ["000001-0000000004"]
        again = lab.train("first")
        assert "Finishing the upload of checkpoint-4, saved here before." in again.log
        assert lab.keys() == ["000001-0000000004", "000002-0000000008", "000002-0000000012"]
        assert lab.difference("first") == 0.0

    @pytest.mark.ordinary_saves
    def test_after_an_outage_during_training_everything_is_committed_at_the_end(self, lab: Lab) -> None:
        jolts = {"after": [["Jolt", {}]]}
        plain = lab.plain(**jolts)
        child = lab.train("first", "outage", module=MISHAPS, first=3, last=11, **jolts)
        assert "The upload of checkpoint-4 failed and will be tried again; training continues." in child.log
        assert lab.steps()[-1] == 12
        assert lab.problems() == []
        assert lab.difference("first") == 0.0
        assert child.value["log"] == plain.value["log"]

    def test_law_5_an_outage_until_the_end_is_an_error_that_names_the_command(self, lab: Lab) -> None:
        output = lab.fails(
            "first", "outage", module=MISHAPS, first=5, last=None, env={"HF_CLOUDTRAIN_DRAIN_TIMEOUT": "1"}
        )
        assert "NotCommittedError: Not on storage yet: checkpoint-12" in output
        assert f"cloudtrain checkpoint flush {lab.machine('first')}" in output
        assert lab.train("first").value["step"] == 12
        assert lab.steps()[-1] == 12

    def test_law_5_the_deadline_ends_the_process_even_if_an_upload_hangs(self, lab: Lab) -> None:
        env = {"HF_CLOUDTRAIN_DRAIN_TIMEOUT": "1"}
        child = lab.start("first", "slow_upload", module=MISHAPS, until=-1, env=env)
        assert child.wait(SOON) == 1
        assert "NotCommittedError: Not on storage yet: checkpoint-12" in child.log


class TestLaw5EndsEarly:
    @pytest.mark.ordinary_saves
    def test_an_exception_in_training_drains_what_was_saved(self, lab: Lab) -> None:
        fails = {"after": [["FailAt", {"step": 6}]]}
        output = lab.fails("first", "slow_upload", module=MISHAPS, until=None, **fails)
        assert "ZeroDivisionError: a bug of the user" in output
        assert "Training ended early. Finishing the upload" in output
        assert lab.steps() == [4]
        assert lab.problems() == []

    @pytest.mark.ordinary_saves
    def test_ctrl_c_twice_drains_what_was_saved(self, lab: Lab) -> None:
        interrupted = {"after": [["InterruptAt", {"step": 6, "times": 2}]]}
        child = lab.start("first", "slow_upload", module=MISHAPS, until=None, **interrupted)
        assert child.wait() == -signal.SIGINT
        assert "KeyboardInterrupt" in child.log
        assert "Training ended early. Finishing the upload" in child.log
        assert lab.steps() == [4]

    @pytest.mark.slow  # on a busy machine about one run in ten handles the first Ctrl-C too late
    @pytest.mark.ordinary_saves
    def test_a_third_ctrl_c_names_the_command_that_finishes_it(self, lab: Lab) -> None:
        interrupted = {"after": [["InterruptAt", {"step": 6, "times": 2}]]}
        child = lab.start("first", "slow_upload", module=MISHAPS, until=-1, **interrupted)
        lab.wait_until(lambda: "Training ended early" in child.log)
        child.interrupt()
        lab.wait_until(lambda: f"cloudtrain checkpoint flush {lab.machine('first')}" in child.log)
        assert child.wait(SOON) == -signal.SIGINT
        assert [entry.title for entry in lab.outbox("first")] == ["checkpoint-4"]


def on(server: MotoServer, **options: str) -> dict[str, str]:
    return {"HF_CLOUDTRAIN_STORAGE_OPTIONS": json.dumps({**server.storage_options, **options})}
