"""Which trainers were tested, and what a subclass or a replaced method is worth."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_cloudtrain.checkpoints.exactness import EXACT
from hf_cloudtrain.integrations.trainer.known_trainers import (
    KNOWN,
    class_name,
    of_trainer,
    with_a_fixed_reference,
    without_a_buffer,
    without_parameters_in_the_loss,
)


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


def test_a_loss_with_parameters_of_its_own_is_not_exact() -> None:
    model = torch.nn.Linear(2, 2)
    own, of_the_model = torch.nn.Bilinear(2, 2, 1), torch.nn.Sequential(model)
    for loss, exact in ((own, False), (of_the_model, True), ({"a": of_the_model, "b": own}, False)):
        assert without_parameters_in_the_loss(None, SimpleNamespace(model=model, loss=loss)).exact is exact


def test_a_reference_model_that_follows_is_not_exact() -> None:
    assert with_a_fixed_reference(SimpleNamespace(sync_ref_model=True), None).exact is False
    assert with_a_fixed_reference(SimpleNamespace(), None) == EXACT


@pytest.mark.parametrize(
    ("changes", "epoch", "exact"),
    [
        ({}, 0.5, True),
        ({}, 1.0, False),
        ({"num_iterations": 2}, 0.5, False),
        ({"steps_per_generation": 4}, 0.5, False),
        ({"sync_ref_model": True}, 0.5, False),
        ({"use_vllm": True}, 0.5, None),
    ],
)
def test_completions_that_are_kept_for_several_steps_are_not_exact(
    changes: dict[str, object], epoch: float, exact: bool | None
) -> None:
    tested = {
        "num_iterations": 1,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "use_vllm": False,
    }
    trainer = SimpleNamespace(state=SimpleNamespace(epoch=epoch))
    assert without_a_buffer(SimpleNamespace(**{**tested, **changes}), trainer).exact is exact


@pytest.mark.parametrize(
    ("name", "arguments", "exact"),
    [
        ("trl.trainer.sft_trainer.SFTTrainer", {}, True),
        ("trl.trainer.dpo_trainer.DPOTrainer", {"sync_ref_model": True}, False),
        ("trl.trainer.kto_trainer.KTOTrainer", {"sync_ref_model": True}, False),
        ("trl.trainer.grpo_trainer.GRPOTrainer", {"num_iterations": 2}, False),
        ("trl.trainer.rloo_trainer.RLOOTrainer", {"num_iterations": 2}, False),
        ("sentence_transformers.sentence_transformer.trainer.SentenceTransformerTrainer", {}, False),
        ("sentence_transformers.cross_encoder.trainer.CrossEncoderTrainer", {}, False),
        ("sentence_transformers.sparse_encoder.trainer.SparseEncoderTrainer", {}, False),
    ],
)
def test_what_is_known_of_a_class_is_found_by_its_name(
    name: str, arguments: dict[str, object], exact: bool
) -> None:
    module, _, kind = name.rpartition(".")
    trainer = type(kind, (), {"__module__": module})()
    trainer.model, trainer.loss = (
        torch.nn.Linear(1, 1),
        torch.nn.Linear(1, 1),
    )  # a loss with parameters of its own
    assert of_trainer(SimpleNamespace(**arguments), trainer).exact is exact


def test_the_page_of_tested_trainers_names_each_of_them() -> None:
    page = (Path(__file__).parents[4] / "docs" / "trainers.md").read_text()
    assert {name for name in KNOWN if name.rpartition(".")[2] not in page} == set()
