"""Which saves of a Trainer are ordinary ones: where something reads the folder of a checkpoint as soon as it is saved."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import WandbLogModel

from hf_cloudtrain import CloudTrainCallback, EmergencySaveCallback
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.integrations.trainer import emergency, staged_saves
from hf_cloudtrain.integrations.trainer.staged_saves import READERS, TrainerSaves
from hf_cloudtrain.staging.saves import WORTH_IT, AsyncSaves
from tests.faults.late_writer import LateWriters
from tests.unit.integrations.trainer.test_exactness import Data, Model


class Plain(TrainerCallback):
    """Of a script, without a save."""


class Uploads(TrainerCallback):
    """Of a script, with one that is not known."""

    def on_save(self, *args: Any, **kwargs: Any) -> None: ...


class Harmless(Uploads):
    reads_checkpoints = False


def tracker(name: str, **values: Any) -> Any:
    """A callback of transformers as it is after its start; its package is not installed."""
    made = object.__new__(getattr(integration_utils, name))
    vars(made).update(values)
    return made


def derived(**values: Any) -> Any:
    """Of a library that derives one, and inherits the save."""
    made = object.__new__(type("Ours", (integration_utils.WandbCallback,), {}))
    vars(made).update(values)
    return made


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateWriters]:
    with LateWriters.instead_of_processes(monkeypatch) as writers:
        yield writers


def is_staged(
    checkpointer: Checkpointer, *callbacks: TrainerCallback, step: int = 5, **control: bool
) -> bool:
    """Whether a save at a step of ten is staged."""
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=callbacks))
    state = TrainerState(max_steps=10)
    state.global_step = step
    folder = checkpointer.output_dir / f"checkpoint-{step}"
    folder.mkdir(exist_ok=True)
    saves = TrainerSaves(checkpointer, WORTH_IT, trainer)
    saves.save_begins(state, TrainerControl(**control))
    torch.save(torch.zeros(3), folder / "model.pt")
    staged = saves.close()
    assert (folder / "model.pt").exists() is not staged
    saves.end()
    return staged


@pytest.mark.parametrize(
    ("callback", "reads"),
    [
        (Plain(), False),
        (Harmless(), False),
        (Uploads(), True),
        (tracker("WandbCallback", _log_model=WandbLogModel.CHECKPOINT), True),
        (tracker("WandbCallback", _log_model=WandbLogModel.END), False),
        (tracker("WandbCallback", _log_model=WandbLogModel.FALSE), False),
        (derived(_log_model=WandbLogModel.CHECKPOINT), True),
        (derived(_log_model=WandbLogModel.FALSE), False),
        (tracker("MLflowCallback", _log_artifacts=True), True),
        (tracker("MLflowCallback", _log_artifacts=False), False),
        (tracker("DagsHubCallback", _log_artifacts=True), True),
        (tracker("DagsHubCallback", _log_artifacts=False), False),
        (tracker("NeptuneCallback", _should_upload_checkpoint=True), True),
        (tracker("NeptuneCallback", _should_upload_checkpoint=False), False),
        (tracker("ClearMLCallback", _log_model=True), True),
        (tracker("ClearMLCallback", _log_model=False), False),
        (tracker("FlyteCallback", sync_checkpoints=True), True),
        (tracker("FlyteCallback", sync_checkpoints=False), False),
        (tracker("DVCLiveCallback", _log_model="all"), True),
        (tracker("DVCLiveCallback", _log_model=True), False),
        (tracker("TrackioCallback"), False),
        (tracker("SwanLabCallback"), False),
        (tracker("WandbCallback"), True),  # a release that keeps its setting elsewhere
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, TrainerCallback) else str(value),
)
def test_a_save_is_an_ordinary_one_where_a_callback_reads_it(
    checkpointer: Checkpointer, writers: LateWriters, callback: TrainerCallback, reads: bool
) -> None:
    assert is_staged(checkpointer, Plain(), callback) is not reads


def test_callbacks_of_this_package_read_nothing(
    checkpointer: Checkpointer, writers: LateWriters, tmp_path: Path
) -> None:
    ours = [kind(f"file://{tmp_path}/run") for kind in (CloudTrainCallback, EmergencySaveCallback)]
    assert is_staged(checkpointer, *ours)


def test_every_tracker_of_transformers_with_a_save_is_known_by_what_its_save_asks() -> None:
    """A new one, or a condition that a release has renamed, is to be looked at."""
    found = [kind for kind in vars(integration_utils).values() if inspect.isclass(kind)]
    found = [kind for kind in found if issubclass(kind, TrainerCallback)]
    with_save = {kind.__name__: kind for kind in found if kind.on_save is not TrainerCallback.on_save}
    assert with_save.keys() == READERS.keys()
    for name, reads in READERS.items():
        asked = set(re.findall(r"\w+", inspect.getsource(with_save[name].on_save)))
        settings = {word for word in reads.__code__.co_names if word.startswith(("_", "sync"))}
        assert settings <= asked, name


def test_a_callback_that_may_read_is_named_once_with_what_to_do(
    checkpointer: Checkpointer, writers: LateWriters, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[Uploads()]))
    saves = TrainerSaves(checkpointer, WORTH_IT, trainer)
    for _ in range(2):
        saves.save_begins(TrainerState(max_steps=10), TrainerControl())
    saves.end()
    (said,) = (message for message in caplog.messages if "not asynchronous" in message)
    assert "because Uploads may read a checkpoint in its on_save" in said
    assert "set Uploads.reads_checkpoints = False" in said


def test_the_last_save_is_an_ordinary_one(checkpointer: Checkpointer, writers: LateWriters) -> None:
    """The script reads it next."""
    assert is_staged(checkpointer, step=9)
    assert not is_staged(checkpointer, step=10)
    assert not is_staged(checkpointer, should_training_stop=True)


def _trainer(**changes: bool) -> Any:
    return SimpleNamespace(
        **{"model": torch.nn.Linear(2, 2), "is_fsdp_enabled": False, "is_deepspeed_enabled": False, **changes}
    )


@pytest.mark.parametrize(
    ("trainer", "push", "reason"),
    [
        (_trainer(), False, None),
        (_trainer(), True, "push_to_hub=True reads each checkpoint"),
        (_trainer(is_fsdp_enabled=True), False, "FSDP writes the model in parts"),
        (_trainer(is_deepspeed_enabled=True), False, "DeepSpeed writes the model in parts"),
        (None, False, "the trainer is not one of transformers"),
    ],
)
def test_a_push_to_the_hub_a_sharded_model_and_a_trainer_of_a_different_library_keep_ordinary_saves(
    checkpointer: Checkpointer,
    writers: LateWriters,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trainer: Any,
    push: bool,
    reason: str | None,
) -> None:
    monkeypatch.setattr(staged_saves, "calling_trainer", lambda: trainer)
    args: Any = SimpleNamespace(push_to_hub=push, save_only_model=False)
    saves = TrainerSaves.of(checkpointer, args, True)
    assert (saves is None) is (reason is not None)
    assert (reason or "") in caplog.text
    if saves is not None:
        saves.end()


def test_the_wait_for_the_save_before_is_part_of_what_a_save_takes(
    tmp_path: Path, writers: LateWriters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer stands still from step 3 on, until the save of step 6 has waited for a hundred seconds of a clock."""
    clock, stalls, settle = [0.0], [], AsyncSaves.settle

    def wait(self: AsyncSaves, timeout: float | None = None) -> None:
        if self._process.is_busy and not writers.may_write.is_set():
            clock[0] += 100.0
            writers.may_write.set()
        settle(self, timeout)

    monkeypatch.setattr(AsyncSaves, "settle", wait)
    monkeypatch.setattr(emergency, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(AttemptLifecycle, "saved", lambda self, seconds: stalls.append(seconds))
    writers.may_write.clear()
    args = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=3,
        save_steps=3,
        report_to="none",
        use_cpu=True,
    )
    cloud = CloudTrainCallback(str(tmp_path / "run"), async_save=True)
    Trainer(Model(), args, train_dataset=Data(), callbacks=[cloud]).train()
    assert writers.written == ["checkpoint-3", "checkpoint-6"]
    assert stalls == [0.0, 100.0]
