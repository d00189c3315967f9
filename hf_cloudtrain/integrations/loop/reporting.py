"""What a loop reports: on its bar, in the records of the run, in the accelerator's trackers, and in log.json.

Logged values are kept as they come, and read every logging interval: no step waits for the device.
"""

from __future__ import annotations

import logging
import math
import numbers
import os
import sys
from typing import Any

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.integrations.loop.state import LoopState
from hf_cloudtrain.integrations.loop.trackers import LoopTrackers

logger = logging.getLogger(__name__)

_WIDE = 100
"""Columns of a terminal on which a bar has room for the time, the rate, and what was logged."""
_NARROW_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"
"""On a narrower one tqdm cuts the end of the line, where the newest values are."""


class LoopReport:
    """Reports on the main process; on the others it only drops what was logged.

    Args:
        logging_steps: optimizer steps between two reports.
    """

    def __init__(self, accelerator: Any, lifecycle: AttemptLifecycle, logging_steps: int) -> None:
        self.log = LoopLog()
        self.trackers = LoopTrackers(accelerator, lifecycle)
        self._accelerator = accelerator
        self._lifecycle = lifecycle
        self._is_main = lifecycle.checkpointer.ranks.is_main
        self._logging_steps = logging_steps
        self._warned = False

    def bar(self, epoch: int, phase: str, total: int | None, done: int) -> Any:
        """The bar of one pass over a loader."""
        return train_bar(epoch, phase, total, done, hidden=not self._is_main)

    def begin_step(self) -> None:
        """Training on a batch begins."""
        if (tracker := self._lifecycle.tracker) is not None:
            tracker.begin_step()

    def end_step(self, step: int, bar: Any) -> None:
        """An optimizer step is over; every `logging_steps` of them, the logged values are read and reported."""
        if (tracker := self._lifecycle.tracker) is not None:
            tracker.end_step(step)
        if step % self._logging_steps:
            return
        if not self._is_main:
            self.log.forget()
            return
        rate = self._learning_rate()
        means = self.log.interval()
        bar.set_postfix(shown({**means, **({} if rate is None else {"lr": rate})}), refresh=False)
        self._record(step, {**means, **({} if rate is None else {"learning_rate": rate})})

    def expect(self, total_steps: int | None, samples_per_step: int | None) -> None:
        """The training has so many steps in all."""
        if (tracker := self._lifecycle.tracker) is not None:
            tracker.expect(total_steps, samples_per_step)

    def pause(self, why: str = "pause") -> None:
        """The time from now to the next step does not count as step time."""
        if (tracker := self._lifecycle.tracker) is not None:
            tracker.pause(why)

    def saved(self) -> None:
        """Store the records soon: what leads to a checkpoint should not be lost."""
        if (tracker := self._lifecycle.tracker) is not None:
            tracker.flush_soon()

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Report the metrics of an evaluation."""
        if metrics and self._is_main:
            self._record(step, as_eval(metrics))

    def close_epoch(self, state: LoopState, metrics: dict[str, float]) -> None:
        """Add the record of a finished epoch to the state."""
        if not self._is_main:
            self.log.forget()
            return
        train = self.log.epoch()
        state.log.append({"epoch": state.epoch, "step": state.step, "train": train, "valid": metrics})

    def _record(self, step: int, record: dict[str, float]) -> None:
        if (tracker := self._lifecycle.tracker) is not None:
            tracker.log(step, record)
        try:
            self.trackers.log(record, step)
        except Exception as error:  # noqa: BLE001 - a tracker that is down must not end a training
            log = logger.debug if self._warned else logger.warning
            log(
                "A tracker of the accelerator failed; training continues. %s: %s", type(error).__name__, error
            )
            self._warned = True

    def _learning_rate(self) -> float | None:
        schedulers, optimizers = self._accelerator._schedulers, self._accelerator._optimizers
        if schedulers:
            return float(schedulers[0].get_last_lr()[0])
        return float(optimizers[0].param_groups[0]["lr"]) if optimizers else None


class LoopLog:
    """Logged values, without a device sync a step: tensors are kept detached until they are read.

    Example:
        >>> log = LoopLog()
        >>> log.add({"loss": loss})                    # a tensor on any device
        >>> log.interval()                             # means since the last call; waits for the device
        {'loss': 0.53}
    """

    def __init__(self) -> None:
        self._unread: dict[str, list[Any]] = {}
        self._interval: dict[str, list[float]] = {}
        self._epoch: dict[str, list[float]] = {}

    def add(self, values: dict[str, Any]) -> None:
        """Note values of one step."""
        for name, value in values.items():
            if not hasattr(value, "detach") and not isinstance(value, numbers.Real):
                raise ConfigurationError(
                    f"log({name}={value!r}) is neither a number nor a tensor. Log numbers and tensors only."
                )
            kept = value.detach() if hasattr(value, "detach") else value
            self._unread.setdefault(name, []).append(kept)

    def interval(self) -> dict[str, float]:
        """Means of the values since the last call."""
        self._read()
        means, self._interval = _means(self._interval), {}
        return means

    def epoch(self) -> dict[str, float]:
        """Means of the values of this epoch; the next one begins."""
        self._read()
        means, self._epoch = _means(self._epoch), {}
        return means

    def forget(self) -> None:
        """Drop what is unread: on processes that report nothing."""
        self._unread.clear()

    def state_dict(self) -> dict[str, Any]:
        """Sums so far, for a checkpoint."""
        self._read()
        return {"interval": self._interval, "epoch": self._epoch}

    def load_state_dict(self, state: Any) -> None:
        """Continue from sums that `state_dict` returned; damaged ones are dropped, because nothing depends on them."""
        state = state if isinstance(state, dict) else {}
        self._interval = _sums(state.get("interval"))
        self._epoch = _sums(state.get("epoch"))

    def _read(self) -> None:
        for name, values in self._unread.items():
            for value in _numbers(values):
                for sums in (self._interval, self._epoch):
                    total = sums.setdefault(name, [0.0, 0])
                    total[0] += value
                    total[1] += 1
        self._unread.clear()


def train_bar(epoch: int, phase: str, total: int | None, done: int, *, hidden: bool) -> Any:
    """The bar of one pass over a loader, on a terminal and in notebooks: `[Epoch 0] [TRAIN]:  12%|█▏        | 520/4387`."""
    from tqdm.auto import tqdm

    try:
        narrow = os.get_terminal_size(sys.stderr.fileno()).columns < _WIDE
    except (OSError, ValueError):  # not a terminal
        narrow = False
    form = _NARROW_BAR if narrow and total else None
    return tqdm(desc=f"[Epoch {epoch}] [{phase}]", total=total, initial=done, disable=hidden, bar_format=form)


def saves(save_steps: int | None, clock: object | None) -> str:
    """How often a loop saves, for the first line.

    Args:
        clock: of its saves by time.
    """
    every = "" if save_steps is None else f"every {save_steps} steps"
    return f"saves {' and '.join(filter(None, (every, str(clock or ''), 'at the end of each epoch')))}"


def shown(values: dict[str, float]) -> dict[str, str]:
    """Numbers in the space that a bar has: `2.56`, `7.8e-6`."""
    return {name: f"{value:.3g}".replace("e-0", "e-") for name, value in values.items()}


def number(value: Any) -> float:
    """A metric as a number; NaN where it is not one."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def as_eval(metrics: dict[str, float]) -> dict[str, float]:
    """Named as Trainer names the metrics of an evaluation, to tell them from the training's loss."""
    return {name if name.startswith("eval_") else f"eval_{name}": value for name, value in metrics.items()}


def _numbers(values: list[Any]) -> list[float]:
    """Values as numbers, with one wait for the device, not one each."""
    tensors = [value for value in values if hasattr(value, "detach")]
    if not tensors:
        return [float(value) for value in values]
    import torch

    # A mean takes 5 us, and most losses are one number already.
    single = [tensor.float() if tensor.ndim == 0 else tensor.float().mean() for tensor in tensors]
    read = iter(torch.stack(single).tolist())
    return [next(read) if hasattr(value, "detach") else float(value) for value in values]


def _means(sums: dict[str, list[float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items() if count}


def _sums(value: Any) -> dict[str, list[float]]:
    found = {}
    for name, pair in value.items() if isinstance(value, dict) else ():
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, (int, float)) for one in pair):
            found[str(name)] = [float(pair[0]), pair[1]]
    return found
