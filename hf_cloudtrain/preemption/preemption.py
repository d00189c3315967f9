"""What one process does about a preemption: it takes note of notices, votes after each step, and leaves after the save.

    notified   a signal or another notice reaches one process (`signals.py`, `sources.py`)
    agreed     after a step, all ranks decide to save at the same one (`agreement.py`)
    saved      there, by the framework's own save
    left       by all ranks together, when the last host has committed or the time is up

Nothing is saved within a step, and no rank decides alone.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable
from types import CodeType
from typing import NoReturn

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.errors import CloudTrainError, OvertakenError, PreemptedError, PreemptedExit
from hf_cloudtrain.preemption.agreement import Agreement, StopDecision, Vote
from hf_cloudtrain.preemption.save_clock import SaveClock
from hf_cloudtrain.preemption.signals import SignalWatch
from hf_cloudtrain.preemption.sources import Notice, NoticeWatcher, default_sources, pending
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.runtime.text import size_text
from hf_cloudtrain.runtime.threads import answer_in_time
from hf_cloudtrain.tracking.exit_record import Outcome, record_end

logger = logging.getLogger(__name__)

RESERVE_SECONDS = 2.0
"""Part of the grace time that is kept for leaving; a tenth of the grace time, where that is less."""

_GO_ON, _SAVE_DUE = Vote(StopDecision.GO_ON), Vote(StopDecision.SAVE_DUE)


class Preemption:
    """Waits for notices in the background, and lets all ranks take the same decision at the same step.

    Args:
        grace: seconds that this machine has after a notice that names no time; None takes `HF_CLOUDTRAIN_GRACE`.
        within: code of the function in which training happens; outside of it, signals do what they did before.

    Example:
        >>> check_no_pending_notice(checkpointer)
        >>> preemption = Preemption(checkpointer)
        >>> preemption.start()
        >>> if preemption.step_ended() is StopDecision.SAVE:
        ...     save()
        ...     preemption.leave(step)
    """

    def __init__(
        self, checkpointer: Checkpointer, *, grace: float | None = None, within: CodeType | None = None
    ) -> None:
        self.save_seconds: float | None = None
        """How long the last save held up the training; the integrations set it."""
        self.clock: SaveClock | None = None
        """When a save by time is due; rank 0's counts."""
        self._checkpointer = checkpointer
        self._ranks = checkpointer.ranks
        self._grace = env.grace(grace)
        self._signals = SignalWatch(self._receive_signal, patience=lambda: self._patience, within=within)
        self._watcher: NoticeWatcher | None = None
        self._agreement = Agreement(self._ranks.with_group())
        self._notice: Notice | None = None
        self._relayed_by_peer = False
        self._agreed_reason: str | None = None
        self._deadline = 0.0
        self._patience = 0.0

    def start(self) -> None:
        """Install the signal handlers, once the attempt has begun; one process a disk watches the other sources."""
        attempt = self._checkpointer.attempt
        assert attempt is not None, "begin() comes first"
        self._signals.start()
        if self._ranks.is_leader:
            catalog = self._checkpointer.catalog if self._ranks.is_main else None
            self._watcher = NoticeWatcher(default_sources(catalog, attempt.number), self.receive)
            self._watcher.start()

    def close(self) -> None:
        """Stop watching, and restore the signal handlers that were installed before."""
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        self._signals.close()
        self._agreement.close()

    def receive(self, notice: Notice) -> None:
        """Take note of a notice, in any thread. The first one gives the reason; the shortest time counts."""
        seconds = self._grace_of(notice)
        deadline = time.monotonic() + seconds
        if self._notice is None:
            self._deadline = deadline
            self._patience = seconds
            self._notice = notice  # last: a thread that sees it may ask how much time is left
        else:
            self._deadline = min(self._deadline, deadline)

    def step_ended(self) -> StopDecision:
        """What all ranks do after this step; every rank calls it after every step.

        Raises:
            PeerError: this rank has a notice, and another one does not vote: it is assumed to have crashed.
        """
        return self._decide(self._agreement.step_ended(self._vote(), lambda: self.has_notice))

    def decide_now(self) -> StopDecision:
        """The same, waiting half a millisecond for all ranks: after an evaluation, say."""
        return self._decide(self._agreement.now(self._vote(), lambda: self.has_notice))

    def seconds_left(self) -> float:
        """Until the first machine is taken away, less the time that leaving takes."""
        reserve = min(RESERVE_SECONDS, self._patience / 10)
        return max(0.0, self._deadline - time.monotonic() - reserve)

    def announce(self, step: int) -> None:
        """Log the reason, the step of the save, and whether its upload should finish in time. On all ranks."""
        reasons = self._ranks.each(
            lambda: None if self._relayed_by_peer else self._reason(), "report why it stops"
        )
        self._agreed_reason = next((reason for reason in reasons if reason is not None), self._agreed_reason)
        if self._ranks.is_main:
            logger.warning("%s", self._plan(step))

    def leave(self, step: int, close: Callable[[Outcome], None] = lambda outcome: None) -> NoReturn:
        """Wait for the uploads as long as there is time, and end all ranks together. Called after the save.

        Args:
            close: writes the last heartbeat, given how the attempt ended.

        Raises:
            PreemptedExit: always; in a notebook PreemptedError.
        """
        record_end(self._checkpointer, "preempted", self._reason())
        try:
            self._checkpointer.wait(self.seconds_left(), in_time=True)
            result = f"checkpoint-{step} is on storage."
        except OvertakenError as error:
            self._end("overtaken", str(error), close)
            self.close()
            raise
        except CloudTrainError as error:
            result = str(error)
        self._end("preempted", self._reason(), close)
        with contextlib.suppress(SystemExit):  # the process ends anyway, with an exit code that has a meaning
            self._signals.call_previous()
        self.close()
        _exit(self._ranks, f"Training was stopped at step {step} ({self._reason()}). {result}")

    def quit(self, close: Callable[[Outcome], None] = lambda outcome: None) -> NoReturn:
        """End an attempt that was overtaken: at once, without a save.

        Raises:
            OvertakenError: always, on all ranks.
        """
        self._end("overtaken", "a newer attempt has started", close)
        self.close()
        self._checkpointer.check_not_overtaken()
        raise OvertakenError("A newer attempt of this run has started; stopping this attempt.")

    def _end(self, outcome: Outcome, reason: str, close: Callable[[Outcome], None]) -> None:
        """Write the exit file, and then the last heartbeat if the storage takes it in the time that is left."""
        record_end(self._checkpointer, outcome, reason)
        seconds = max(1.0, min(RESERVE_SECONDS, self._deadline - time.monotonic()))
        deadline = time.monotonic() + seconds
        with contextlib.suppress(CloudTrainError, TimeoutError):
            # Together: a launcher ends the others as soon as one process is gone.
            self._ranks.agree(
                lambda: answer_in_time(lambda: close(outcome), lambda: time.monotonic() > deadline),
                "write its last heartbeat",
            )

    def _decide(self, result: Vote | None) -> StopDecision:
        if result is None:
            return StopDecision.GO_ON
        if result.decision is StopDecision.SAVE:
            if self._notice is None:
                self._relayed_by_peer = True
                self.receive(Notice("another rank received the stop request", result.seconds_left))
            self._deadline = min(self._deadline, time.monotonic() + result.seconds_left)
        return result.decision

    def _vote(self) -> Vote:
        if self._checkpointer.overtaken_by is not None:
            return Vote(StopDecision.QUIT, 0.0)
        if self._notice is None:
            due = self._ranks.is_main and self.clock is not None and self.clock.is_due()
            return _SAVE_DUE if due else _GO_ON
        return Vote(StopDecision.SAVE, max(0.0, self._deadline - time.monotonic()))

    @property
    def has_notice(self) -> bool:
        """Whether this rank has a notice."""
        return self._notice is not None

    def _receive_signal(self, number: int) -> None:
        self.receive(Notice(signal.Signals(number).name, None))

    def _grace_of(self, notice: Notice) -> float:
        if notice.grace is not None:
            return notice.grace
        limit = env.shutdown_timeout() if notice.source.startswith("SIG") else None
        return self._grace if limit is None else min(self._grace, limit)

    def _reason(self) -> str:
        return self._agreed_reason or (self._notice.source if self._notice else "asked to stop")

    def _plan(self, step: int) -> str:
        left = self.seconds_left()
        plan = f"{self._reason()}: saving at step {step}, with {left:.0f} s left."
        pace = self._checkpointer.uploads.pace
        if self.save_seconds is None or pace is None:
            return f"{plan} It is not known yet how long a save and its upload take."
        size, rate = pace
        needed = self.save_seconds + size / rate
        verdict = (
            "it should be on storage in time"
            if needed <= left
            else "it may not be on storage in time; what is missing then stays in the outbox of this machine"
        )
        return (
            f"{plan} The last save took {self.save_seconds:.1f} s, and {size_text(size)} at {size_text(round(rate))}/s take "
            f"{size / rate:.1f} s, so {verdict}."
        )


def check_no_pending_notice(checkpointer: Checkpointer) -> None:
    """Stop a training that would start while a notice is pending, on all ranks.

    Raises:
        PreemptedExit, PreemptedError: this machine is being preempted, or a stop was requested.
    """
    ranks = checkpointer.ranks

    def look() -> Notice | None:
        return pending(default_sources(checkpointer.catalog if ranks.is_main else None))

    found = [notice for notice in ranks.each_leader(look, "look for notices") if notice is not None]
    if found:
        record_end(checkpointer, "preempted", found[0].source)
        _exit(ranks, f"This machine is being preempted ({found[0].source}); not starting training.")


def in_notebook() -> bool:
    """Whether cells of a notebook run in this process."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def _exit(ranks: Ranks, text: str) -> NoReturn:
    if in_notebook():
        raise PreemptedError(text)
    if ranks.is_main:
        logger.warning("%s Run the same command again to resume from the newest checkpoint.", text)
    raise PreemptedExit
