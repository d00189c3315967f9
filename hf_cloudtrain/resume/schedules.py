"""Moving a learning rate's schedule to another step. Only a LambdaLR can go there: its rate is a function of the step alone."""

from __future__ import annotations

from typing import Any

from hf_cloudtrain.errors import PositionError


def is_movable(scheduler: Any) -> bool:
    """Whether the schedule's rate depends on the number of steps alone."""
    from torch.optim.lr_scheduler import LambdaLR

    return isinstance(scheduler, LambdaLR)


def check_same_schedule(kind: str | None, what: str, changes: str) -> None:
    """Stop where a schedule cannot be moved.

    Args:
        kind: name of its class; None where it is not known.

    Raises:
        PositionError: names the schedule.
    """
    if kind not in (None, "LambdaLR"):
        raise PositionError(
            f"{what} cannot be resumed here: {changes}. Its learning rate follows {kind!r}, which remembers more than the "
            "number of steps. Use the same numbers, or a schedule that is a LambdaLR, as those of transformers' "
            "get_scheduler are, in a run of its own."
        )


def check_movable(scheduler: Any, what: str, changes: str) -> None:
    """The same, for a live schedule."""
    if not is_movable(scheduler):
        check_same_schedule(type(scheduler).__name__, what, changes)


def move_to(scheduler: Any, position: int) -> None:
    """Set a LambdaLR, and the rates of its optimizer, as they are after `position` steps of it.

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
        if isinstance(group["lr"], torch.Tensor):  # others may hold it
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = float(rate)
        scheduler._last_lr.append(float(rate))
