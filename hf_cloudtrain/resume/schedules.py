"""Moving a learning rate schedule to a different step. Only a LambdaLR can be moved: its rate depends on the step alone."""

from __future__ import annotations

from typing import Any

from hf_cloudtrain.resume.topology import Conversion


def check_same_schedule(kind: str | None, conversion: Conversion) -> None:
    """Raise PositionError if a schedule of this class cannot be moved; None if its class is unknown."""
    if kind not in (None, "LambdaLR"):
        raise conversion.refusal(
            f"Its learning rate schedule is a {kind!r}, which depends on more than the step; only a LambdaLR, such as those "
            "of transformers' get_scheduler, can be moved."
        )


def check_movable(scheduler: Any, conversion: Conversion) -> None:
    """Raise PositionError if a live schedule cannot be moved."""
    from torch.optim.lr_scheduler import LambdaLR

    if not isinstance(scheduler, LambdaLR):
        check_same_schedule(type(scheduler).__name__, conversion)


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
