"""A schedule that was moved to a step equals one that was stepped there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR

from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.errors import PositionError
from hf_cloudtrain.resume.schedules import check_movable, check_same_schedule, move_to
from hf_cloudtrain.resume.topology import Epoch, convert


def made(*, tensor: bool = False) -> LambdaLR:
    rates = (0.1, 0.2)
    groups = [{"params": [torch.zeros(1)], "lr": torch.tensor(rate) if tensor else rate} for rate in rates]
    rules = [lambda step: 1 - step / 10, lambda step: 0.5**step]
    return LambdaLR(torch.optim.SGD(groups), rules)


def stepped(steps: int, *, tensor: bool = False) -> LambdaLR:
    scheduler = made(tensor=tensor)
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
    return scheduler


def rates(found: Iterable[Any]) -> list[float]:
    return [float(rate) for rate in found]


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(("begin", "end"), [(6, 3), (3, 6), (2, 2), (5, 0)])
def test_a_moved_schedule_continues_like_one_that_was_stepped_there(
    begin: int, end: int, tensor: bool
) -> None:
    moved, wanted = stepped(begin, tensor=tensor), stepped(end, tensor=tensor)
    held = [group["lr"] for group in moved.optimizer.param_groups]
    move_to(moved, end)
    for _ in range(3):
        assert rates(moved.get_last_lr()) == pytest.approx(rates(wanted.get_last_lr()))
        assert rates(group["lr"] for group in moved.optimizer.param_groups) == pytest.approx(
            rates(group["lr"] for group in wanted.optimizer.param_groups)
        )
        assert moved.last_epoch == wanted.last_epoch
        assert moved._step_count == wanted._step_count
        for scheduler in (moved, wanted):
            scheduler.optimizer.step()
            scheduler.step()
    if tensor:  # a captured graph refers to the tensor itself
        assert all(one is group["lr"] for one, group in zip(held, moved.optimizer.param_groups, strict=True))


def test_only_a_schedule_that_depends_on_the_step_alone_can_move() -> None:
    saved = Position(
        global_step=4, samples_seen=16, world_size=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=1, dataset_length=32,
    )  # fmt: skip
    conversion = convert(saved, replace(saved, world_size=1), Epoch(32, 16, 2), "checkpoint-4")
    check_movable(made(), conversion)
    check_same_schedule("LambdaLR", conversion)
    check_same_schedule(None, conversion)
    text = r"checkpoint-4 .* 2 processes before, 1 now\. Its learning rate schedule is a 'StepLR'"
    with pytest.raises(PositionError, match=text):
        check_movable(StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 5), conversion)
