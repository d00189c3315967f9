"""Saves by time: when the next one is due."""

from __future__ import annotations

import statistics
import time
from collections import deque

from hf_cloudtrain.errors import ConfigurationError

FIRST_SECONDS = 60.0
"""Until the first save, where only a share of the time is given: how long a save takes is not known before."""
MEASURED = 5
"""Saves whose median length counts."""


class SaveClock:
    """When a save is due, by the time since the last one.

    Args:
        interval_seconds: between the end of a save and the next one.
        overhead: share of the time that saves may take, such as 0.02; the interval follows from how long the last saves held up
            training. With an interval as well, a save is due when both allow it.

    Raises:
        ConfigurationError: a number that cannot be meant.

    Example:
        >>> clock = SaveClock(interval_seconds=600)
        >>> clock.is_due()
        False
    """

    def __init__(self, interval_seconds: float | None = None, overhead: float | None = None) -> None:
        if interval_seconds is not None and not (_is_number(interval_seconds) and interval_seconds > 0):
            raise ConfigurationError(
                f"save_interval_seconds={interval_seconds!r} must be a positive number of seconds."
            )
        if overhead is not None and not (_is_number(overhead) and 0 < overhead < 1):
            raise ConfigurationError(
                f"save_overhead={overhead!r} must be between 0 and 1, such as 0.02 for 2 % of the time."
            )
        self._interval = interval_seconds
        self._overhead = overhead
        self._stalls: deque[float] = deque(maxlen=MEASURED)
        self._since = time.monotonic()

    @classmethod
    def of(cls, interval_seconds: float | None, overhead: float | None) -> SaveClock | None:
        """The clock for these arguments; None if there are none."""
        return None if interval_seconds is None and overhead is None else cls(interval_seconds, overhead)

    def begin(self) -> None:
        """Training begins, or goes on after something that is not a save."""
        self._since = time.monotonic()

    def saved(self, stall: float | None) -> None:
        """Note a save of any kind, and for how many seconds it held up training."""
        if stall is not None:
            self._stalls.append(stall)
        self.begin()

    def is_due(self) -> bool:
        """Whether a save is due; says so once, until the next interval is over."""
        due = time.monotonic() - self._since >= self.seconds
        if due:
            self.begin()  # the ranks agree on the step while training goes on
        return due

    @property
    def seconds(self) -> float:
        """From one save to the next."""
        by_overhead = 0.0
        if self._overhead is not None:
            stall = statistics.median(self._stalls) if self._stalls else None
            by_overhead = FIRST_SECONDS if stall is None else stall * (1 / self._overhead - 1)
            if stall is None and self._interval is not None:
                by_overhead = 0.0
        return max(self._interval or 0.0, by_overhead)

    def __str__(self) -> str:
        parts = []
        if self._interval is not None:
            parts.append(f"every {self._interval:g} s")
        if self._overhead is not None:
            parts.append(f"for at most {self._overhead * 100:g} % of the time")
        return ", ".join(parts)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
