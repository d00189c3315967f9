"""Supervises a job: starts its nodes, restarts them after a crash, and writes its record.

    starting -> running -> finished
                        -> crash: all nodes again, from the newest checkpoint, `max_restarts` times, else failed
                        -> cancelled: each node has its grace, then the gang kills what is left
                        -> a signal to the supervisor: preempted

verdict.py decides how a start ended.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempts import Attempts
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.jobs.gang import ExitCodes, Gang
from hf_cloudtrain.jobs.node.stopping import MARGIN, stop_handler
from hf_cloudtrain.jobs.records import JobRecord, JobStore, Start, State
from hf_cloudtrain.jobs.start_failure import alike
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.jobs.verdict import CANCELLED, Verdict, has_saved, has_served, judge
from hf_cloudtrain.storage.client import Storage

logger = logging.getLogger(__name__)

POLL = 0.2
"""Seconds between two checks of the nodes."""
LOOK = 2.0
"""Seconds between two queries of the store."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a restart, doubled while starts make no step, or serve for less than `STEADY` seconds."""
STEADY = 60.0
FINAL_WRITE_TIMEOUT, RETRY_PAUSE = 600.0, 5.0
"""Seconds to keep trying to write how a job ended, and between two tries."""
IDLE_STARTS = 3
"""Starts in a row that are stopped before their first step; then the job is not restarted."""


class Supervisor:
    """Runs a job to its end.

    Args:
        store: where the record is.
        record: of the job, as it is now.
        gang: its nodes.
        review: lets an engine change the verdict on a start.
    """

    def __init__(
        self,
        submission: Submission,
        store: JobStore,
        record: JobRecord,
        gang: Gang,
        review: Callable[[Verdict], Verdict] | None = None,
    ) -> None:
        self._submission = submission
        self._store = store
        self._record = record
        self._gang = gang
        self._review = review or (lambda verdict: verdict)
        self._stopped_by: str | None = None
        """What stopped the job: `CANCELLED`, or the name of a signal."""
        self._stopped_at = 0.0
        self._idle = 0
        """Starts in a row that made no step and served nothing."""
        self._short = 0
        """Those, and starts that served for a short time only, in a row."""
        self._error: str | None = None
        """How the last start failed, if it made no step."""
        self._query: threading.Thread | None = None
        self._newest: int | None = None
        """The run's newest attempt, as last read from its storage."""
        self._serves = False
        self._wake = threading.Event()

    @property
    def stop_signal(self) -> str | None:
        """Name of the signal that stopped the supervisor."""
        return None if self._stopped_by == CANCELLED else self._stopped_by

    def run(self) -> JobRecord:
        """Start the nodes until the job is over; gives its last record."""
        with stop_handler(self._on_signal):
            try:
                return self._start_until_over()
            finally:
                self._gang.kill()

    def _start_until_over(self) -> JobRecord:
        while True:
            verdict = self._start_once()
            if verdict.state is None and self._is_stopped():
                verdict = dataclasses.replace(verdict, state=self._stopped_state())
            verdict = self._review(verdict)
            restarts = self._record.restarts + (verdict.is_crash and verdict.state is None)
            self._show(state=verdict.state or "starting", reason=verdict.reason, restarts=restarts)
            if verdict.state is not None:
                return self._record
            logger.info("%s Restarting all nodes.", verdict.reason)
            self._wake.wait(min(FIRST_PAUSE * 2 ** min(self._short, 10), LONGEST_PAUSE))

    def _start_once(self) -> Verdict:
        if self._is_stopped():
            return Verdict(self._stopped_state(), "preempted", self._stop_reason())
        number = len(self._record.starts) + 1
        begun = Start(number, time.time())
        self._show(state="starting", starts=(*self._record.starts, begun))
        known = self._newest = self._newest_attempt()
        self._serves = False
        failure: str | None
        try:
            self._submission.forget_start(number)
            self._gang.start(number)
            codes, failure = self._watch(known), None
        except OSError as error:
            codes, failure = (None,) * self._submission.plan.nodes, str(error)
        self._is_stopped()  # the user may have cancelled the job after a signal stopped it
        verdict = self._judge(number, codes, failure, known)
        ended = dataclasses.replace(
            begun, ended=time.time(), outcome=verdict.outcome, reason=verdict.reason, exit_codes=codes
        )
        self._show(starts=(*self._record.starts[:-1], ended))
        return verdict

    def _judge(self, number: int, codes: ExitCodes, failure: str | None, known: int | None) -> Verdict:
        """The verdict on a start, within the limits on restarts."""
        progress = self._progress(known)
        verdict = judge(self._submission, number, codes, self._stopped_by, failure, progress.get("state"))
        has_steps = progress.get("productive_seconds") or has_saved(self._submission, number)
        serves = has_served(self._submission, number)
        is_steady = time.time() - self._record.starts[-1].began >= STEADY
        self._idle = 0 if has_steps or serves else self._idle + 1
        self._short = 0 if has_steps or (serves and is_steady) else self._short + 1
        restarts, reason = self._record.restarts, verdict.reason or ""
        before, self._error = self._error, verdict.error if self._idle and known is not None else None
        if verdict.is_crash and verdict.state is None and alike(self._error, before):
            reason += f" Two starts in a row failed alike before their first step: {self._error}"
            return dataclasses.replace(verdict, state="failed", reason=reason)
        if verdict.is_crash and restarts >= self._record.max_restarts:
            if restarts:
                reason += f" It was restarted {restarts} time{'s' if restarts > 1 else ''}, the limit set by 'max_restarts'."
            return dataclasses.replace(verdict, state="failed", reason=reason)
        if verdict.state is None and not verdict.is_crash and self._idle >= IDLE_STARTS:
            reason = f"{IDLE_STARTS} starts in a row were stopped before their first step. {reason}".strip()
            return dataclasses.replace(verdict, state="preempted", reason=reason)
        return verdict

    def _watch(self, known: int | None) -> ExitCodes:
        """Wait for the nodes to end; stop them when the job is cancelled or a signal arrives."""
        is_asked = False
        looked = 0.0
        while (codes := self._gang.poll()) is None:
            now = time.monotonic()
            if now - looked > LOOK:
                looked = now
                self._look()
            is_new = None not in (known, self._newest) and self._newest != known
            if self._record.state == "starting" and (is_new or self._serves):
                self._show(state="running", reason=None)
            if self._stopped_by is not None and not is_asked:
                is_asked = True
                self._gang.stop()  # first: the store may take long to answer
                self._show(state="stopping", reason=self._stop_reason())
            if is_asked and now > self._stopped_at + self._submission.plan.grace + 3 * MARGIN:
                self._gang.kill()
            self._wake.wait(POLL)
            if self._stopped_by is not None:
                time.sleep(POLL)  # the event stays set
        return codes

    def _look(self) -> None:
        """Query the store in the background: if it hangs, a signal must still reach the nodes."""

        def query() -> None:
            self._is_stopped()
            if self._record.state == "starting":
                self._serves = has_served(self._submission, len(self._record.starts))
                self._newest = self._newest_attempt()

        if self._query is None or not self._query.is_alive():
            self._query = threading.Thread(target=query, name="cloudtrain-store", daemon=True)
            self._query.start()

    def _is_stopped(self) -> bool:
        """Whether a signal or, by the store, the user has stopped the job."""
        if self._stopped_by != CANCELLED:
            try:
                if self._store.is_cancelled(self._record.id):
                    self._stop(CANCELLED)
            except CloudTrainError as error:
                logger.warning("%s", error)
        return self._stopped_by is not None

    def _stop(self, by: str) -> None:
        if self._stopped_by is None:
            self._stopped_at = time.monotonic()
        self._stopped_by = by
        self._wake.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopped_by is None:
            self._stop(signal.Signals(number).name)

    def _stopped_state(self) -> State:
        return "cancelled" if self._stopped_by == CANCELLED else "preempted"

    def _stop_reason(self) -> str:
        is_cancelled = self._stopped_by == CANCELLED
        return "`cloudtrain job cancel`" if is_cancelled else f"{self._stopped_by} to the supervisor"

    def _progress(self, known: int | None) -> dict[str, Any]:
        """The last progress of the run's newest attempt, if that began after the known one."""
        newest = self._newest_attempt()
        if known is None or newest is None or newest <= known:
            return {}
        try:
            return self._attempts.read_progress(newest) or {}
        except CloudTrainError as error:
            logger.warning("%s", error)
            return {}

    def _newest_attempt(self) -> int | None:
        """0 before the first attempt; None if the storage fails."""
        try:
            return max(self._attempts.numbers(), default=0)
        except CloudTrainError as error:
            logger.warning("%s", error)
            return None

    @property
    def _attempts(self) -> Attempts:
        return Catalog(Storage(self._submission.run_url, env.storage_options(None))).attempts

    def _show(self, **changes: Any) -> None:
        self._record = dataclasses.replace(self._record, **changes)
        # How the job ended is retried until the store accepts it: without it the job counts as lost.
        deadline = time.monotonic() + (FINAL_WRITE_TIMEOUT if self._record.is_over else 0.0)
        while True:
            try:
                self._record = self._store.write(self._record)
                return
            except CloudTrainError as error:
                logger.error("The record of the job could not be written. %s", error)
            if time.monotonic() >= deadline:
                return
            time.sleep(RETRY_PAUSE)
