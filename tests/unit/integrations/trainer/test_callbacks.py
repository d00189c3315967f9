"""What the callbacks decide by themselves; the integration tests run them in a real Trainer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_cloudtrain import CheckpointUploadCallback, CloudTrainCallback, StepTrackerCallback
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import ConfigurationError, PositionError, RunCompleteError, RunHasCheckpointsError
from tests.faults.runs import wait_until, write_checkpoint


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path / 'run'}"


def state_at(step: int, *, max_steps: int = 10, epoch: float | None = None) -> TrainerState:
    state = TrainerState(max_steps=max_steps, epoch=epoch)
    state.global_step = step
    return state


def loader(samples: int, batch: int) -> Any:
    return torch.utils.data.DataLoader(list(range(samples)), batch_size=batch)


def test_trainer_creates_no_callback_again_on_resume() -> None:
    """It does so with every ExportableState, and the threads of the old one would stay."""
    for kind in (CloudTrainCallback, CheckpointUploadCallback, StepTrackerCallback):
        assert issubclass(kind, TrainerCallback)
        assert not issubclass(kind, ExportableState)


def test_trainings_that_have_ended_leave_no_thread(args: TrainingArguments, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    for number in range(3):
        callback, state, control = (
            CloudTrainCallback(str(tmp_path / f"run{number}")),
            state_at(0),
            TrainerControl(),
        )
        callback.on_train_begin(args, state, control, train_dataloader=loader(10, 2))
        write_checkpoint(tmp_path / "out", 10)
        state.global_step = 10
        callback.on_save(args, state, control)
        callback.on_train_end(args, state, control)

    def left() -> list[str]:
        return [thread.name for thread in set(threading.enumerate()) - before if "cloudtrain" in thread.name]

    wait_until(lambda: not left(), "the end of the threads")


EVENTS = sorted(name for name in dir(TrainerCallback) if name.startswith("on_"))


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_of_trainer_reaches_every_part(url: str, event: str) -> None:
    calls: list[tuple[int, Any, Any]] = []

    class Part:
        def __init__(self, number: int) -> None:
            setattr(self, event, lambda *args, **kwargs: calls.append((number, args, kwargs)))

    callback = CloudTrainCallback(url)
    assert len(callback._parts) == 3
    callback._parts = tuple(Part(number) for number in range(3))  # type: ignore[assignment]
    assert getattr(callback, event)("args", "state", "control", logs={}) is None
    order = [0, 1, 2] if event in ("on_train_begin", "on_save") else [2, 1, 0]
    assert calls == [(number, ("args", "state", "control"), {"logs": {}}) for number in order]


class TestSaveAtTheEndOfAnEpoch:
    def begun(self, args: TrainingArguments, url: str) -> CheckpointUploadCallback:
        callback = CheckpointUploadCallback(url)
        callback.on_train_begin(args, state_at(0), TrainerControl(), train_dataloader=loader(10, 2))
        return callback

    def test_is_held_back_until_the_evaluation_is_over(self, args: TrainingArguments, url: str) -> None:
        args.eval_strategy = "epoch"
        callback, control = self.begun(args, url), TrainerControl(should_save=True)
        callback.on_step_end(args, state_at(5, epoch=1.0), control)
        assert not control.should_save
        callback.on_epoch_end(args, state_at(5, epoch=1.0), control)
        assert control.should_save

    @pytest.mark.parametrize(("strategy", "epoch"), [("epoch", 0.8), ("steps", 1.0), ("no", 1.0)])
    def test_is_not_held_back_where_no_evaluation_follows(
        self, args: TrainingArguments, url: str, strategy: str, epoch: float
    ) -> None:
        args.eval_strategy = strategy
        callback, control = self.begun(args, url), TrainerControl(should_save=True)
        callback.on_step_end(args, state_at(4, epoch=epoch), control)
        assert control.should_save
        control.should_save = False
        callback.on_epoch_end(args, state_at(5, epoch=1.0), control)
        assert not control.should_save


class TestStart:
    def test_that_never_saves_is_refused(self, args: TrainingArguments, url: str) -> None:
        args.save_strategy = "no"
        with pytest.raises(ConfigurationError, match="save_strategy='no'"):
            CloudTrainCallback(url).restore(args)

    def test_of_a_search_is_refused_with_what_to_do(self, args: TrainingArguments, url: str) -> None:
        state = state_at(0)
        state.is_hyper_param_search = True
        with pytest.raises(ConfigurationError, match="Give each trial its own Trainer"):
            CloudTrainCallback(url).on_train_begin(args, state, TrainerControl())

    def test_without_a_url_names_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_CLOUDTRAIN_RUN_URL", raising=False)
        with pytest.raises(ConfigurationError, match="HF_CLOUDTRAIN_RUN_URL"):
            CloudTrainCallback()

    def test_of_a_process_that_would_train_alone_is_refused(
        self, args: TrainingArguments, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigurationError, match="use_cpu=True"):
            CloudTrainCallback(url).restore(args)

    def test_of_a_complete_run_in_the_middle_of_an_epoch_is_refused(
        self, args: TrainingArguments, url: str
    ) -> None:
        callback = CheckpointUploadCallback(url)
        with pytest.raises(RunCompleteError, match="step 3 of 3"):
            callback.on_train_begin(
                args, state_at(3, max_steps=3), TrainerControl(), train_dataloader=loader(10, 2)
            )

    def test_of_the_parts_for_one_url_is_one_attempt(self, args: TrainingArguments, url: str) -> None:
        parts = (CheckpointUploadCallback(url), StepTrackerCallback(url))
        state = state_at(0)
        for part in parts:
            part.on_train_begin(args, state, TrainerControl(), train_dataloader=loader(10, 2))
        assert parts[0]._session is parts[1]._session
        assert parts[0]._session.checkpointer.catalog.attempts.numbers() == [1]

    def test_with_a_smaller_batch_after_out_of_memory_is_a_new_attempt(
        self, args: TrainingArguments, url: str, tmp_path: Path
    ) -> None:
        args.auto_find_batch_size = True
        callback = CheckpointUploadCallback(url)
        callback.on_train_begin(args, state_at(0), TrainerControl(), train_dataloader=loader(10, 2))
        saved = tmp_path / "out/checkpoint-5"
        saved.mkdir(parents=True)
        (saved / "model.safetensors").write_bytes(b"weights")
        callback.on_save(args, state_at(5), TrainerControl())
        callback.wait()
        callback.on_train_begin(args, state_at(0), TrainerControl(), train_dataloader=loader(10, 1))
        assert callback._session.checkpointer.catalog.attempts.numbers() == [1, 2]

        args.auto_find_batch_size = False
        with pytest.raises(RunHasCheckpointsError, match=r"cloud\.restore\(args\)"):
            callback.on_train_begin(args, state_at(0), TrainerControl(), train_dataloader=loader(10, 1))


def test_law_8_a_checkpoint_of_a_different_topology_is_refused_unless_restore_converted_it(
    args: TrainingArguments, url: str, tmp_path: Path
) -> None:
    callback = CheckpointUploadCallback(url)
    callback.on_train_begin(args, state_at(0), TrainerControl(), train_dataloader=loader(80, 8))
    saved = tmp_path / "out/checkpoint-4"
    saved.mkdir(parents=True)
    (saved / "model.safetensors").write_bytes(b"weights")
    callback.on_save(args, state_at(4), TrainerControl())
    callback.wait()
    args.gradient_accumulation_steps = 2
    with pytest.raises(
        PositionError, match=r"1 batches per optimizer step before, 2 now.* cloud\.restore\(args\)"
    ):
        callback.on_train_begin(args, state_at(4), TrainerControl(), train_dataloader=loader(80, 8))
    args.gradient_accumulation_steps = 1
    callback.on_train_begin(args, state_at(4), TrainerControl(), train_dataloader=loader(80, 8))


def test_the_retention_policy_reaches_the_checkpointer(args: TrainingArguments, url: str) -> None:
    cloud = CloudTrainCallback(url, save_total_limit=3, keep_every_n_steps=100)
    cloud.on_train_begin(args, state_at(0), TrainerControl(), train_dataloader=loader(10, 2))
    checkpointer = cloud._uploads._session.checkpointer
    assert checkpointer.policy == checkpointer._retention.policy == Policy(3, 100)
    assert checkpointer._retention.attempt == checkpointer.attempt


def test_an_impossible_save_total_limit_is_refused_before_training(url: str) -> None:
    with pytest.raises(ConfigurationError, match="save_total_limit=0"):
        CloudTrainCallback(url, save_total_limit=0)
