"""Which trainers were tested, and what a subclass or a replaced method is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_cloudtrain.checkpoints.exactness import EXACT
from hf_cloudtrain.integrations.trainer.known_trainers import KNOWN, class_name, of_trainer


class Weighted(Trainer):
    """A subclass, which may hold anything."""


def made(kind: type[Trainer], folder: Path) -> Trainer:
    arguments = Seq2SeqTrainingArguments if kind is Seq2SeqTrainer else TrainingArguments
    return kind(torch.nn.Linear(1, 1), arguments(str(folder), use_cpu=True, report_to="none"))


@pytest.mark.parametrize("kind", [Trainer, Seq2SeqTrainer])
def test_the_trainers_of_transformers_were_tested(kind: type[Trainer], tmp_path: Path) -> None:
    trainer = made(kind, tmp_path)
    assert class_name(trainer) in KNOWN
    assert of_trainer(trainer.args, trainer) == EXACT


def test_a_subclass_is_not_verified_and_named(tmp_path: Path) -> None:
    trainer = made(Weighted, tmp_path)
    found = of_trainer(trainer.args, trainer)
    assert found.exact is None
    assert "Weighted is not one of the trainers that were tested" in str(found.reason)


def test_a_replaced_method_is_not_verified(tmp_path: Path) -> None:
    trainer = made(Trainer, tmp_path)
    trainer.compute_loss = lambda *args, **kwargs: torch.zeros(())
    found = of_trainer(trainer.args, trainer)
    assert found.exact is None
    assert "compute_loss() was replaced" in str(found.reason)
