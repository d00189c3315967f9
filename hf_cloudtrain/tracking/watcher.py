"""Watching a run until it is over: what changes between two reads, and whether a new attempt will follow.

Every few seconds it reads two listings and a small record; the records of all steps only when an attempt has begun or a
checkpoint was committed. A storage error becomes part of the view, and the next read tries again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime.values import metric
from hf_cloudtrain.tracking.history import AttemptInfo, history_of
from hf_cloudtrain.tracking.status import RunState, run_state

LOOK_SECONDS = 2.0
"""Between two reads; a run sends a heartbeat every 15 s."""
MOST_LOSSES = 20_000
"""Losses that are kept; a curve in a terminal has a few hundred points."""
LAST = ("finished", "overtaken")
"""States that no new attempt follows, even if the job is still running."""


@dataclass
class View:
    """What a watcher knows about the run."""

    state: RunState
    attempts: list[AttemptInfo]
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss), ascending; a loss that is not finite is NaN or infinite."""
    goodput: float | None = None
    is_goodput_bound: bool = False
    trouble: str | None = None
    """Why the last read failed; everything else is from the one before."""

    def same_but_time(self, other: View | None) -> bool:
        """Whether the two differ in times only."""
        return other is not None and self._changing() == other._changing()

    def _changing(self) -> tuple[Any, ...]:
        now = self.state
        known = (now.state, now.attempt, now.step, now.last_committed, now.uploading)
        return (*known, self.trouble, bool(now.stalled))

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return {**self.state.record(), "goodput": self.goodput, "trouble": self.trouble}


class Watcher:
    """Reads one run repeatedly; waits for its first attempt, and between two attempts, as long as one will follow.

    Args:
        is_awaited: whether a new attempt will follow.

    Example:
        >>> for view in Watcher(catalog).views():
        ...     print(view.state.step)
    """

    def __init__(self, catalog: Catalog, is_awaited: Callable[[], bool] = bool) -> None:
        self._catalog = catalog
        self._is_awaited = is_awaited
        while not catalog.attempts.numbers() and is_awaited():
            wait()
        catalog.attempts.check_any()
        self.view = self._read_steps(run_state(catalog))
        """The newest view."""

    def views(self) -> Iterator[View]:
        """A view every `LOOK_SECONDS`, until the run is over."""
        while True:
            yield self.view
            now = self.view.state
            if now.is_over and self.view.trouble is None and (now.state in LAST or not self._is_awaited()):
                return
            wait()
            self.view = self._look()

    def _look(self) -> View:
        before = self.view
        try:
            now = run_state(self._catalog)
            known = before.state
            if now.is_over or (now.attempt, now.last_committed) != (known.attempt, known.last_committed):
                return self._read_steps(now)
        except CloudTrainError as error:  # storage is unavailable, or a record is damaged
            return replace(before, trouble=str(error))
        except Exception as error:  # noqa: BLE001 - of a client, say: the next read tries again
            return replace(before, trouble=f"{type(error).__name__}: {error}")
        losses = before.losses
        step = now.loss_step
        if now.loss is not None and step is not None and (not losses or losses[-1][0] < step):
            losses = [*losses, (step, now.loss)][-MOST_LOSSES:]
        now = _at_least(now, before.state.step if now.attempt == before.state.attempt else None)
        return View(now, before.attempts, losses, before.goodput, is_goodput_bound=before.is_goodput_bound)

    def _read_steps(self, now: RunState) -> View:
        """The view with the losses and the goodput, from the records of all steps."""
        history = history_of(self._catalog)
        reported = ((int(log["step"]), metric(log.get("loss"))) for log in history.logs)
        losses = [(step, loss) for step, loss in reported if loss is not None]
        newest = history.attempts[-1:]
        now = _at_least(now, newest[0].last_step if newest and newest[0].number == now.attempt else None)
        bound = history.is_goodput_bound
        return View(now, history.attempts, losses[-MOST_LOSSES:], history.goodput, is_goodput_bound=bound)


def _at_least(now: RunState, step: int | None) -> RunState:
    """The state with the highest step that is known: records may show more than the heartbeat."""
    return now if step is None else replace(now, step=max(step, now.step or 0))


def wait() -> None:
    """Pause until the next read."""
    time.sleep(LOOK_SECONDS)
