"""Where a Trainer stands, in the terms of a manifest."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState, TrainingArguments

from hf_cloudtrain.integrations.trainer.position import EpochLength, metrics, position


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)


def state_at(step: int) -> TrainerState:
    state = TrainerState(max_steps=10)
    state.global_step = step
    return state


def loader(samples: int, batch: int) -> Any:
    return torch.utils.data.DataLoader(list(range(samples)), batch_size=batch)


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


@pytest.mark.parametrize(
    ("generator", "answers"),
    [(None, [True, True, False, True]), (torch.Generator(), [True, False, False, True])],
)
def test_an_order_that_is_drawn_each_epoch(generator: Any, answers: list[bool]) -> None:
    shuffled = torch.utils.data.DataLoader(list(range(10)), batch_size=2, shuffle=True, generator=generator)
    epoch = EpochLength(shuffled)  # five steps
    assert [epoch.exactness(state_at(step), 1).exact for step in (4, 5, 6, 10)] == answers


def test_metrics_of_a_checkpoint_are_those_of_its_step_and_the_last_loss() -> None:
    state = state_at(8)
    state.best_metric = 0.5
    state.log_history = [
        {"step": 4, "epoch": 0.4, "loss": 0.9, "eval_loss": 0.8},
        {"step": 6, "epoch": 0.6, "loss": 0.7, "learning_rate": 1e-4},
        {"step": 8, "epoch": 0.8, "eval_loss": 0.6, "note": "text", "eval_nan": float("nan")},
    ]
    found = metrics(state, best=False)
    assert math.isnan(found.pop("eval_nan"))
    assert found == {"eval_loss": 0.6, "loss": 0.7}
    assert metrics(state, best=True)["best_metric"] == 0.5


def test_the_last_loss_is_the_last_one_even_if_it_is_not_finite() -> None:
    state = state_at(8)
    state.log_history = [
        {"step": 4, "loss": 0.25},
        {"step": 8, "loss": float("nan")},
        {"step": 8, "eval_loss": 0.6},
    ]
    found = metrics(state, best=False)
    assert found["eval_loss"] == 0.6
    assert math.isnan(found["loss"])
