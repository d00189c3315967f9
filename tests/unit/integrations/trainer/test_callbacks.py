"""What the callbacks decide by themselves; the integration tests run them in a real Trainer."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_cloudtrain import CheckpointUploadCallback, CloudTrainCallback, StepTrackerCallback
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import ConfigurationError, PositionError, RunCompleteError, RunHasCheckpointsError
from hf_cloudtrain.integrations.trainer.state import EpochLength, metrics, position


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    yield f"file://{tmp_path / 'run'}"
    gc.collect()  # sessions live as long as their callbacks


def state_at(step: int, *, max_steps: int = 10, epoch: float | None = None) -> TrainerState:
    state = TrainerState(max_steps=max_steps, epoch=epoch)
    state.global_step = step
    return state


def loader(samples: int, batch: int) -> Any:
    return torch.utils.data.DataLoader(list(range(samples)), batch_size=batch)


def test_no_callback_is_made_anew_on_resume() -> None:
    """Trainer re-creates every ExportableState, and the threads of an old one would live on."""
    for kind in (CloudTrainCallback, CheckpointUploadCallback, StepTrackerCallback):
        assert issubclass(kind, TrainerCallback)
        assert not issubclass(kind, ExportableState)


def test_every_event_of_a_part_reaches_it_through_the_whole() -> None:
    for part in (CheckpointUploadCallback, StepTrackerCallback):
        events = {name for name in vars(part) if name.startswith("on_")}
        assert events <= set(vars(CloudTrainCallback))


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
        assert parts[0]._session.opened().catalog.attempts.numbers() == [1]

    def test_over_with_a_smaller_batch_is_another_attempt(
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
        assert callback._session.opened().catalog.attempts.numbers() == [1, 2]

        args.auto_find_batch_size = False
        with pytest.raises(RunHasCheckpointsError, match=r"cloud\.restore\(args\)"):
            callback.on_train_begin(args, state_at(0), TrainerControl(), train_dataloader=loader(10, 1))


def test_law_8_a_checkpoint_of_another_topology_that_was_not_restored_by_us_is_refused(
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


class TestPosition:
    def test_counts_a_short_last_batch_of_an_epoch_as_it_is(self, args: TrainingArguments) -> None:
        args.per_device_train_batch_size = 4
        epoch = EpochLength(loader(10, 4))  # batches of 4, 4 and 2
        seen = [position(args, state_at(step), epoch).samples_seen for step in range(7)]
        assert seen == [0, 4, 8, 10, 14, 18, 20]

    def test_counts_steps_where_the_data_is_a_stream(self, args: TrainingArguments) -> None:
        found = position(args, state_at(3), EpochLength(SimpleNamespace()))
        assert (found.samples_seen, found.dataset_length) == (3 * args.train_batch_size, None)

    def test_knows_the_end_of_an_epoch_with_accumulation(self) -> None:
        epoch = EpochLength(loader(10, 2))  # 5 batches, 3 steps of 2
        assert [step for step in range(1, 7) if epoch.is_whole(step, 2)] == [3, 6]


def test_metrics_of_a_checkpoint_are_those_of_its_step_and_the_last_loss() -> None:
    state = state_at(8)
    state.best_metric = 0.5
    state.log_history = [
        {"step": 4, "epoch": 0.4, "loss": 0.9, "eval_loss": 0.8},
        {"step": 6, "epoch": 0.6, "loss": 0.7, "learning_rate": 1e-4},
        {"step": 8, "epoch": 0.8, "eval_loss": 0.6, "note": "text", "eval_nan": float("nan")},
    ]
    assert metrics(state, best=False) == {"eval_loss": 0.6, "loss": 0.7}
    assert metrics(state, best=True)["best_metric"] == 0.5


def test_what_stays_on_storage_is_said_once_and_reaches_the_checkpointer(
    args: TrainingArguments, url: str
) -> None:
    cloud = CloudTrainCallback(url, save_total_limit=3, keep_every_n_steps=100)
    cloud.on_train_begin(args, state_at(0), TrainerControl(), train_dataloader=loader(10, 2))
    checkpointer = cloud._uploads._session.opened()
    assert checkpointer.policy == checkpointer._retention.policy == Policy(3, 100)
    assert checkpointer._retention.attempt == checkpointer.attempt


def test_a_limit_that_cannot_be_is_refused_before_training(url: str) -> None:
    with pytest.raises(ConfigurationError, match="save_total_limit=0"):
        CloudTrainCallback(url, save_total_limit=0)
