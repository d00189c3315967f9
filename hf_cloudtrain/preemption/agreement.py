"""How all ranks agree on what to do after a step, although none of them waits for the others.

Each rank votes at the end of a step, and reads the result at the end of a later one: the votes travel while the steps between
are computed. Where steps take over half a second, waiting (0.5 ms) costs nothing in proportion, and the result is there one
step earlier. The length of the slowest rank's steps travels along, so that all ranks vote at the same steps.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable
from dataclasses import dataclass

from hf_cloudtrain.errors import PeerError
from hf_cloudtrain.runtime.ranks import Largest, Ranks

PEER_SECONDS = 5.0
"""Longest that a rank with a notice waits for the others to vote. A launcher signals the survivors of a crash, too."""
INTERVAL_SECONDS = 0.25
"""Ranks with shorter steps vote only this often: a vote costs 0.1 ms, and wakes threads that the steps compete with."""
MOST_STEPS = 16
"""Most steps from one vote to the next: a step may suddenly take much longer than those before it."""
SLOW_STEP_SECONDS = 0.5
"""With steps longer than this, ranks wait for the result (0.5 ms) and learn of a notice one step earlier."""


class StopDecision(enum.IntEnum):
    """What all ranks do after a step; the largest vote wins."""

    GO_ON = 0
    SAVE_DUE = 1
    """Save at this step, by time, and go on."""
    SAVE = 2
    """Save at this step, and leave."""
    QUIT = 3
    """A newer attempt has taken over: leave without saving."""


@dataclass(frozen=True)
class Vote:
    """What one rank wants after a step, or what all of them decided."""

    decision: StopDecision
    seconds_left: float = 1e9
    """Until the machine is taken away; the shortest time of all ranks counts."""


class Agreement:
    """The votes of all ranks, step after step.

    Example:
        >>> agreement = Agreement(ranks)
        >>> agreement.step_ended(Vote(StopDecision.GO_ON), has_notice=lambda: False)
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: Largest | None = None
        self._waits = False
        self._every = 1
        self._steps = 0
        self._voted = time.monotonic()

    def step_ended(self, mine: Vote, has_notice: Callable[[], bool]) -> Vote | None:
        """The result of the last vote or, where steps are long, of the vote at this step; None at steps without one."""
        if self._ranks.size == 1:
            return mine
        self._steps += 1
        if self._steps < self._every:
            return None
        result = self._finish(has_notice) if self._pending is not None else None
        self._begin(mine)
        return self._finish(has_notice) if self._waits else result

    def now(self, mine: Vote, has_notice: Callable[[], bool]) -> Vote:
        """The result of a vote at this moment. Waits for all ranks."""
        if self._ranks.size == 1:
            return mine
        if self._pending is not None:
            self._finish(has_notice)
        self._begin(mine)
        return self._finish(has_notice)

    def close(self) -> None:
        """Finish the vote under way: a process group must not go before it."""
        if self._pending is not None:
            with contextlib.suppress(PeerError):
                self._finish(lambda: True)

    def _begin(self, mine: Vote) -> None:
        now = time.monotonic()
        seconds, self._voted = (now - self._voted) / max(1, self._steps), now
        self._steps = 0
        self._pending = self._ranks.begin_largest([float(mine.decision), -mine.seconds_left, seconds])

    def _finish(self, has_notice: Callable[[], bool]) -> Vote:
        answer, self._pending = self._pending, None
        assert answer is not None
        deadline: float | None = None
        while not answer.done():
            now = time.monotonic()
            if has_notice():
                deadline = deadline or now + PEER_SECONDS
                if now > deadline:
                    raise PeerError(
                        "This rank received a stop request, but another rank has not finished its step within "
                        f"{PEER_SECONDS:.0f} s, so it is assumed to have crashed. Nothing is saved here; run the same "
                        "command again to resume from the newest checkpoint."
                    )
            time.sleep(0.0002)
        decision, left, seconds = answer.result()
        self._waits = seconds > SLOW_STEP_SECONDS
        self._every = max(1, min(MOST_STEPS, int(INTERVAL_SECONDS / max(seconds, 1e-6))))
        # The time left is that of the vote, which may be some steps ago.
        return Vote(StopDecision(int(decision)), max(0.0, -left - (time.monotonic() - self._voted)))
