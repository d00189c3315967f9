"""When a machine is about to go: who says so, how the ranks agree, how much time there is, and the way out.

    told      a signal or a notice, known to this process alone (`signals.py`, `notices.py`)
    agreed    at the end of a step, by all ranks at the same one, without anybody waiting
    saved     there, by the framework's own save
    left      by all ranks together, when the last host has committed or the time is up

Nothing is saved within a step, and nothing is decided by one rank alone. A framework's adapter asks `step_ended` after
each optimizer step, saves where it says so, and calls `leave`.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import NoReturn

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.errors import CloudTrainError, OvertakenError, PeerError, PreemptedError, PreemptedExit
from hf_cloudtrain.preemption.signals import SignalWatch
from hf_cloudtrain.preemption.sources import Notice, NoticeWatcher, default_sources, pending
from hf_cloudtrain.runtime.ranks import Largest, Ranks
from hf_cloudtrain.runtime.threads import answer_in_time
from hf_cloudtrain.tracking.exit_record import Outcome, record_end

logger = logging.getLogger(__name__)

PEER_SECONDS = 5.0
"""Longest that a rank which was told waits for the others to agree. A launcher tells the survivors of a crash, too."""
INTERVAL_SECONDS = 0.25
"""Steps shorter than this ask only once in so long: asking takes a rank 0.1 ms, and wakes threads that steps compete with."""
MOST_STEPS = 16
"""Steps from one question to the next, at the most: a step may suddenly take much longer than those before."""
SLOW_STEP_SECONDS = 0.5
"""Steps of this length can pay for waiting for each other (0.5 ms), and hear what is said a whole step earlier."""
RESERVE_SECONDS = 2.0
"""What is kept of the grace time for leaving; a tenth of it, where that is less."""


class StopDecision(enum.IntEnum):
    """What all ranks do after a step; the larger one wins."""

    GO_ON = 0
    SAVE = 1
    """Save here, and leave."""
    QUIT = 2
    """A newer attempt has taken over: leave without saving."""


class Preemption:
    """Listens for notices, and brings all ranks to the same answer at the same step.

    Args:
        grace: seconds that this machine has after a notice that names none; None takes `HF_CLOUDTRAIN_GRACE`.
        within: code of the function in which training happens; outside of it, signals do what they did before.

    Example:
        >>> refuse_to_begin(checkpointer)
        >>> preemption = Preemption(checkpointer)
        >>> preemption.start()
        >>> if preemption.step_ended() is Order.SAVE:
        ...     save()
        ...     preemption.leave(step)
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        *,
        grace: float | None = None,
        within: CodeType | None = None,
    ) -> None:
        self.save_seconds: float | None = None
        """How long the last save took the training; adapters set it."""
        self._checkpointer = checkpointer
        self._ranks = checkpointer.ranks
        self._grace = env.grace(grace)
        self._signals = SignalWatch(self._hear_signal, patience=lambda: self._patience, within=within)
        self._watcher: NoticeWatcher | None = None
        self._agreement = _Agreement(self._ranks.with_group())
        self._notice: Notice | None = None
        self._relayed_by_peer = False
        self._why: str | None = None
        self._deadline = 0.0
        self._patience = 0.0

    @property
    def is_told(self) -> bool:
        """Whether this process knows of a notice."""
        return self._notice is not None

    def start(self) -> None:
        """Begin to listen, once the attempt has begun; one process a disk looks at what is not a signal."""
        attempt = self._checkpointer.attempt
        assert attempt is not None
        self._signals.start()
        if self._ranks.is_leader:
            catalog = self._checkpointer.catalog if self._ranks.is_main else None
            self._watcher = NoticeWatcher(default_sources(catalog, attempt.number), self.hear)
            self._watcher.start()

    def close(self) -> None:
        """Listen no more, and give signals back to whoever had them."""
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        self._signals.close()
        self._agreement.close()

    def hear(self, notice: Notice) -> None:
        """Take note of a notice, from any thread. The first one counts, and the shortest time."""
        seconds = self._grace_of(notice)
        deadline = time.monotonic() + seconds
        if self._notice is None:
            self._deadline = deadline
            self._patience = seconds
            self._notice = notice  # last: whoever sees it may ask how long there is
        else:
            self._deadline = min(self._deadline, deadline)

    def step_ended(self) -> StopDecision:
        """What all ranks do after this step; every rank asks at the end of every step.

        Raises:
            PeerError: this machine was told to go, and another rank does not answer: it is dead.
        """
        return self._decide(self._agreement.hear(self._mine(), lambda: self.is_told))

    def ask_now(self) -> StopDecision:
        """The same, but waiting for all ranks: for the end of an evaluation, say. Takes half a millisecond."""
        return self._decide(self._agreement.ask(self._mine(), lambda: self.is_told))

    def seconds_left(self) -> float:
        """Until the first machine goes, less what leaving takes."""
        reserve = min(RESERVE_SECONDS, self._patience / 10)
        return max(0.0, self._deadline - time.monotonic() - reserve)

    def announce(self, step: int) -> None:
        """Say what is about to happen, why, and what will be on storage in time. On all ranks."""
        told = self._ranks.each(lambda: None if self._relayed_by_peer else self._reason(), "say why it stops")
        self._why = next((reason for reason in told if reason is not None), self._why)
        if self._ranks.is_main:
            logger.warning("%s", self._plan(step))

    def leave(self, step: int, close: Callable[[str], None] = lambda state: None) -> NoReturn:
        """The way out after the save: wait for the uploads as long as there is time, and end all ranks together.

        Args:
            close: writes the last heartbeat; hears the run's state.

        Raises:
            PreemptedExit: always; in a notebook PreemptedError.
        """
        record_end(self._checkpointer, "preempted", self._reason())
        try:
            self._checkpointer.wait(self.seconds_left(), in_time=True)
            words = f"checkpoint-{step} is on storage."
        except OvertakenError as error:
            self._end("overtaken", str(error), close)
            self.close()
            raise
        except CloudTrainError as error:
            words = str(error)
        self._end("preempted", self._reason(), close)
        with contextlib.suppress(SystemExit):  # it ends anyway, and with an exit code that says why
            self._signals.call_others()
        self.close()
        _exit(self._ranks, f"Training was stopped at step {step} ({self._reason()}). {words}")

    def quit(self, close: Callable[[str], None] = lambda state: None) -> NoReturn:
        """The way out of an attempt that was overtaken: at once, and without a save.

        Raises:
            OvertakenError: always, on all ranks.
        """
        self._end("overtaken", "a newer attempt has started", close)
        self.close()
        self._checkpointer.check_not_overtaken()
        raise OvertakenError("A newer attempt of this run has started, so this one ends.")

    def _end(self, outcome: Outcome, reason: str, close: Callable[[str], None]) -> None:
        """Say how it ended: what a launcher reads first, and the heartbeat, for which storage must answer, in what is left."""
        record_end(self._checkpointer, outcome, reason)
        seconds = max(1.0, min(RESERVE_SECONDS, self._deadline - time.monotonic()))
        deadline = time.monotonic() + seconds
        with contextlib.suppress(CloudTrainError, TimeoutError):
            # Together: a launcher ends the others as soon as one process is gone.
            self._ranks.agree(
                lambda: answer_in_time(lambda: close(outcome), lambda: time.monotonic() > deadline),
                "write its last heartbeat",
            )

    def _decide(self, heard: _Heard | None) -> StopDecision:
        if heard is None:
            return StopDecision.GO_ON
        if heard.order is StopDecision.SAVE:
            if self._notice is None:
                self._relayed_by_peer = True
                self.hear(Notice("another process was told to stop", heard.seconds_left))
            self._deadline = min(self._deadline, time.monotonic() + heard.seconds_left)
        return heard.order

    def _mine(self) -> _Heard:
        if self._checkpointer.overtaken_by is not None:
            return _Heard(StopDecision.QUIT, 0.0)
        if self._notice is None:
            return _Heard(StopDecision.GO_ON, _FOREVER)
        return _Heard(StopDecision.SAVE, max(0.0, self._deadline - time.monotonic()))

    def _hear_signal(self, number: int) -> None:
        self.hear(Notice(signal.Signals(number).name, None))

    def _grace_of(self, notice: Notice) -> float:
        if notice.grace is not None:
            return notice.grace
        limit = env.shutdown_timeout() if notice.source.startswith("SIG") else None
        return self._grace if limit is None else min(self._grace, limit)

    def _reason(self) -> str:
        return self._why or (self._notice.source if self._notice is not None else "asked to stop")

    def _plan(self, step: int) -> str:
        left = self.seconds_left()
        said = f"{self._reason()}: saving at step {step}, with {left:.0f} s left."
        pace = self._checkpointer.upload_pace
        if self.save_seconds is None or pace is None:
            return f"{said} How long a save and its upload take is not known yet."
        size, rate = pace
        needed = self.save_seconds + size / rate
        verdict = (
            "it should be on storage in time"
            if needed <= left
            else "it may not be on storage in time; what is not stays in the outbox of this machine"
        )
        return (
            f"{said} The last save took {self.save_seconds:.1f} s, and {size / 1e6:.0f} MB at {rate / 1e6:.0f} MB/s take "
            f"{size / rate:.1f} s, so {verdict}."
        )


def check_no_pending_notice(checkpointer: Checkpointer) -> None:
    """Stop a training that would begin while a notice is pending, on all ranks.

    Raises:
        PreemptedExit, PreemptedError: this machine is about to go.
    """
    ranks = checkpointer.ranks

    def look() -> Notice | None:
        return pending(default_sources(checkpointer.catalog if ranks.is_main else None))

    found = [notice for notice in ranks.each_leader(look, "look for notices") if notice is not None]
    if found:
        record_end(checkpointer, "preempted", found[0].source)
        _exit(ranks, f"This machine is about to go ({found[0].source}), so training does not begin here.")


def _exit(ranks: Ranks, words: str) -> NoReturn:
    if _is_notebook():
        raise PreemptedError(words)
    if ranks.is_main:
        logger.warning("%s Start the same command again to go on from the newest checkpoint.", words)
    raise PreemptedExit


_FOREVER = 1e9


@dataclass(frozen=True)
class _Heard:
    """What ranks say at the end of a step."""

    order: StopDecision
    seconds_left: float


class _Agreement:
    """All ranks say something at the end of a step, and hear the next time what all of them said.

    Nobody waits, because the answer travels while the next steps are computed. Where steps are long, waiting (0.5 ms)
    costs nothing in proportion and the answer comes a step earlier. The length of the longest rank's steps travels along,
    so that all of them ask at the same steps.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: Largest | None = None
        self._waits = False
        self._every = 1
        self._steps = 0
        self._last = time.monotonic()

    def hear(self, mine: _Heard, is_told: Callable[[], bool]) -> _Heard | None:
        """What all ranks said when they were asked last or, where steps are long, what they say now; None between."""
        if self._ranks.size == 1:
            return mine
        self._steps += 1
        if self._steps < self._every:
            return None
        heard = self._finish(is_told) if self._pending is not None else None
        self._begin(mine)
        return self._finish(is_told) if self._waits else heard

    def ask(self, mine: _Heard, is_told: Callable[[], bool]) -> _Heard | None:
        """What all ranks say now."""
        if self._ranks.size == 1:
            return mine
        if self._pending is not None:
            self._finish(is_told)
        self._begin(mine)
        return self._finish(is_told)

    def close(self) -> None:
        """Let what is under way end: a group may not go while it is."""
        if self._pending is not None:
            with contextlib.suppress(PeerError):
                self._finish(lambda: True)

    def _begin(self, mine: _Heard) -> None:
        now = time.monotonic()
        seconds, self._last = (now - self._last) / max(1, self._steps), now
        self._steps = 0
        self._pending = self._ranks.begin_largest([float(mine.order), -mine.seconds_left, seconds])

    def _finish(self, is_told: Callable[[], bool]) -> _Heard:
        answer, self._pending = self._pending, None
        assert answer is not None
        deadline: float | None = None
        while not answer.is_there():
            now = time.monotonic()
            if is_told():
                deadline = deadline or now + PEER_SECONDS
                if now > deadline:
                    raise PeerError(
                        f"This process was told to stop, and another rank has not come to the end of its step within "
                        f"{PEER_SECONDS:.0f} s, so it is taken for dead. Nothing is saved here; start the run again to go "
                        "on from the newest checkpoint."
                    )
            time.sleep(0.0002)
        order, left, seconds = answer.get()
        self._waits = seconds > SLOW_STEP_SECONDS
        self._every = max(1, min(MOST_STEPS, int(INTERVAL_SECONDS / max(seconds, 1e-6))))
        # What was left when it was said, which may be some steps ago.
        return _Heard(StopDecision(int(order)), max(0.0, -left - (time.monotonic() - self._last)))


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None
