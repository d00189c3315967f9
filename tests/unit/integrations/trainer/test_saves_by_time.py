"""Saves by time, in a Trainer whose clock strikes at given steps."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from hf_cloudtrain import CloudTrainCallback
from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.preemption.save_clock import SaveClock
from hf_cloudtrain.storage.client import Storage
from tests.unit.integrations.trainer.test_exactness import Data, Model


def train(folder: Path, **arguments: Any) -> list[int]:
    """The steps of the checkpoints that a training of 9 steps has committed."""
    cloud = CloudTrainCallback(folder / "run", save_interval_seconds=600)
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model=Model(), args=args, train_dataset=Data(), eval_dataset=Data(), callbacks=[cloud])
    trainer.train(resume_from_checkpoint=cloud.restore(args))
    return [key.step for key in Catalog(Storage(str(folder / "run"))).checkpoints()]


@pytest.fixture
def strikes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the clock says after each step."""
    monkeypatch.setattr(upload_queue, "MAX_WAITING", 100)  # no save is left out for a newer one
    plan: list[bool] = []
    monkeypatch.setattr(SaveClock, "is_due", lambda clock: plan.pop(0) if plan else False)
    return plan


def test_saves_come_beside_those_of_trainer_and_the_first_line_says_so(
    tmp_path: Path, strikes: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hf_cloudtrain")
    strikes += [False, True, False, False, True]
    assert train(tmp_path, save_strategy="steps", save_steps=4) == [2, 4, 5, 8, 9]
    assert "; saves every 4 steps and every 600 s." in caplog.text


def test_saves_by_time_alone_store_the_end_of_training_too(tmp_path: Path, strikes: list[bool]) -> None:
    strikes += [False, False, False, True]
    assert train(tmp_path, save_strategy="no") == [4, 9]


def test_a_save_that_is_due_before_an_evaluation_comes_after_it(tmp_path: Path, strikes: list[bool]) -> None:
    strikes += [False, False, True]
    assert train(tmp_path, save_strategy="no", eval_strategy="epoch") == [3, 9]
    manifest = Catalog(Storage(str(tmp_path / "run"))).read(
        Catalog(Storage(str(tmp_path / "run"))).checkpoints()[0]
    )
    assert manifest.inexact_reason is None or "evaluation" not in manifest.inexact_reason


def test_without_any_saves_a_training_is_refused(tmp_path: Path) -> None:
    cloud = CloudTrainCallback(tmp_path / "run")
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"), save_strategy="no", report_to="none", use_cpu=True
    )
    with pytest.raises(ConfigurationError, match="save_interval_seconds=600"):
        cloud.restore(args)
