"""What a loop tells: on its bar, in the records of the run, in the accelerator's trackers, and in log.json."""

from __future__ import annotations

import logging
from typing import Any

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.integrations.loop.log import LoopLog, shown
from hf_cloudtrain.integrations.loop.state import LoopState
from hf_cloudtrain.tracking.tracker import StepTracker

logger = logging.getLogger(__name__)


class LoopReport:
    """Tells what happens, on the main process; on the others it only forgets.

    Args:
        logging_steps: optimizer steps between two reports.
    """

    def __init__(self, accelerator: Any, checkpointer: Checkpointer, logging_steps: int) -> None:
        self.log = LoopLog()
        self._accelerator = accelerator
        self._checkpointer = checkpointer
        self._logging_steps = logging_steps
        self._tracker: StepTracker | None = None
        self._warned = False

    def start(self, first_step: int, total_steps: int | None, samples_per_step: int | None) -> None:
        """Begin the heartbeat of the attempt, once."""
        checkpointer = self._checkpointer
        if self._tracker is not None or checkpointer.attempt is None or not checkpointer.ranks.is_main:
            return
        self._tracker = StepTracker(
            checkpointer.catalog,
            checkpointer.attempt.number,
            first_step=first_step,
            total_steps=total_steps,
            samples_per_step=samples_per_step,
            uploads=checkpointer.uploads,
            ownership=checkpointer.ownership,
        )
        earlier = _running.get(checkpointer)
        if earlier is not None:
            earlier.close("stopped")  # the cell of a notebook was interrupted, and is run again
        _running[checkpointer] = self._tracker
        self._tracker.start()

    def begin_step(self) -> None:
        """A batch is there, and training on it begins."""
        if self._tracker is not None:
            self._tracker.begin_step()

    def end_step(self, step: int, bar: Any) -> None:
        """An optimizer step is over; every `logging_steps` of them, what was logged is read and told."""
        if self._tracker is not None:
            self._tracker.end_step(step)
        if step % self._logging_steps:
            return
        if not self._checkpointer.ranks.is_main:
            self.log.forget()
            return
        rate = self._learning_rate()
        means = self.log.interval()
        bar.set_postfix(shown({**means, **({} if rate is None else {"lr": rate})}), refresh=False)
        self._tell(step, {**means, **({} if rate is None else {"learning_rate": rate})})

    def pause(self, why: str = "pause") -> None:
        """What comes now is no step time."""
        if self._tracker is not None:
            self._tracker.pause(why)

    def saved(self) -> None:
        """Store the records soon: what leads to a checkpoint should not be lost."""
        if self._tracker is not None:
            self._tracker.flush_soon()

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Tell what an evaluation found."""
        if metrics and self._checkpointer.ranks.is_main:
            self._tell(step, as_eval(metrics))

    def close_epoch(self, state: LoopState, metrics: dict[str, float]) -> None:
        """Add the record of a finished epoch to the state."""
        if not self._checkpointer.ranks.is_main:
            self.log.forget()
            return
        state.log.append(
            {"epoch": state.epoch, "step": state.step, "train": self.log.epoch(), "valid": metrics}
        )

    def close(self, state: str) -> None:
        """Write the last heartbeat. `state` is `finished`, `failed` or `stopped`."""
        if self._tracker is not None:
            self._tracker.close(state)
            self._tracker = None

    def _tell(self, step: int, record: dict[str, float]) -> None:
        if self._tracker is not None:
            self._tracker.log(step, record)
        try:
            self._accelerator.log(record, step=step)
        except Exception as error:  # noqa: BLE001 - a tracker that is down must not end a training
            say = logger.debug if self._warned else logger.warning
            say(
                "A tracker of the accelerator failed, and training goes on: %s: %s",
                type(error).__name__,
                error,
            )
            self._warned = True

    def _learning_rate(self) -> float | None:
        schedulers, optimizers = self._accelerator._schedulers, self._accelerator._optimizers
        if schedulers:
            return float(schedulers[0].get_last_lr()[0])
        return float(optimizers[0].param_groups[0]["lr"]) if optimizers else None


_running: dict[Checkpointer, StepTracker] = {}
"""The tracker of the last attempt at each run in this process."""


def as_eval(metrics: dict[str, float]) -> dict[str, float]:
    """Named as Trainer names what an evaluation found, so that it is not taken for the training's loss."""
    return {name if name.startswith("eval_") else f"eval_{name}": value for name, value in metrics.items()}
