"""Moving a learning rate schedule to a different step. Only a LambdaLR can be moved: its rate depends on the step alone."""

from __future__ import annotations

from typing import Any

from hf_cloudtrain.errors import PositionError


def is_movable(scheduler: Any) -> bool:
    """Whether the rate of the schedule depends on the step alone."""
    from torch.optim.lr_scheduler import LambdaLR

    return isinstance(scheduler, LambdaLR)


def check_same_schedule(kind: str | None, what: str, changes: str) -> None:
    """Stop if a schedule cannot be moved.

    Args:
        kind: name of its class; None if unknown.

    Raises:
        PositionError: names the schedule.
    """
    if kind not in (None, "LambdaLR"):
        raise PositionError(
            f"{what} cannot be resumed here: {changes}. Its learning rate schedule is a {kind!r}, which depends on more than "
            "the step. Use the old settings, or start a new run with a LambdaLR, such as those of transformers' "
            "get_scheduler."
        )


def check_movable(scheduler: Any, what: str, changes: str) -> None:
    """The same for a live schedule."""
    if not is_movable(scheduler):
        check_same_schedule(type(scheduler).__name__, what, changes)


def move_to(scheduler: Any, position: int) -> None:
    """Set a LambdaLR, and the rates of its optimizer, to what they are after `position` of its steps.

    As `torch.optim.lr_scheduler.LambdaLR.get_lr` computes them; calling that would warn.
    """
    import torch

    scheduler.last_epoch = position
    scheduler._step_count = position + 1
    scheduler._last_lr = []
    for group, base, rule in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        rate = base * rule(position)
        if isinstance(group["lr"], torch.Tensor):  # a captured graph may refer to it
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = float(rate)
        scheduler._last_lr.append(float(rate))
