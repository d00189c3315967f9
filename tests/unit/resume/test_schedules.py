"""A schedule that was moved to a step equals one that was stepped there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR

from hf_cloudtrain.errors import PositionError
from hf_cloudtrain.resume.schedules import check_same_schedule, is_movable, move_to


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
    assert is_movable(made())
    assert not is_movable(StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 5))
    check_same_schedule("LambdaLR", "checkpoint-5", "2 processes before, 1 now")
    check_same_schedule(None, "checkpoint-5", "2 processes before, 1 now")
    with pytest.raises(
        PositionError, match=r"2 processes before, 1 now\. Its learning rate schedule is a 'StepLR'"
    ):
        check_same_schedule("StepLR", "checkpoint-5", "2 processes before, 1 now")
