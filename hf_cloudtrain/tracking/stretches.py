"""When the steps of an attempt were finished, and the periods without a finished step."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

SLOW_STEP = 10.0
"""A step that takes at least a second and so many times the median is a stall."""
SLOW_STEP_SECONDS = 1.0
MOST_STRETCHES = 500
"""Pauses, and stalls, of one attempt that are kept: the longest."""


@dataclass(frozen=True)
class Stretch:
    """A time of one attempt in which no step was finished."""

    why: str
    """`start`, `evaluation`, `save`, `pause`, or `stall`: a step that took far longer than the others."""
    step: int
    """The last finished step; of a stall, the slow one. In the attempt's own step numbers."""
    began: float
    seconds: float


class StepClock:
    """When each step of an attempt was finished, from the times in its records and the durations of the steps.

    Args:
        started: of the attempt, seconds since 1970, as all times here.
        last_seen: its last sign of life.
        anchors: (step, when it was finished, when the next one started).
        seconds: duration of each step.
    """

    def __init__(
        self,
        started: float,
        last_seen: float,
        anchors: list[tuple[int, float, float]],
        seconds: dict[int, float],
    ) -> None:
        self._started, self._last_seen = started, last_seen
        self._anchors = sorted(anchors)
        self._seconds = seconds
        self._steps = sorted(seconds)
        self._sums = [0.0, *accumulate(seconds[step] for step in self._steps)]

    def time_of(self, step: float) -> float:
        """When a step was finished, within the attempt."""
        last = bisect_right(self._anchors, (step, math.inf, math.inf)) - 1
        anchor, done, next_began = self._anchors[max(0, last)]
        after = bisect_right(self._steps, anchor), bisect_right(self._steps, step)
        time = next_began + self._sums[after[1]] - self._sums[after[0]] if after[1] > after[0] else done
        return min(max(time, self._started), self._last_seen)

    def stalls(self) -> list[Stretch]:
        """The steps that took far longer than the others."""
        if len(self._steps) < 2:
            return []
        usual = sorted(self._seconds.values())[len(self._seconds) // 2]
        limit = max(SLOW_STEP_SECONDS, SLOW_STEP * usual)
        return [
            Stretch("stall", step, max(self._started, self.time_of(step) - seconds), seconds)
            for step, seconds in self._seconds.items()
            if seconds > limit
        ]


def longest(stretches: list[Stretch]) -> list[Stretch]:
    """Those that are kept of one attempt."""
    return sorted(stretches, key=lambda stretch: -stretch.seconds)[:MOST_STRETCHES]
