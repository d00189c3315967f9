"""Watches over a job: starts its nodes, starts them again after a crash, and writes its record.

    starting -> running -> finished
                        -> crash: all nodes again, from the newest checkpoint, `max_restarts` times, else failed
                        -> cancelled: each node has its grace, then whatever is left is killed
                        -> told to stop itself: preempted

How a start ended is read from what the scripts wrote (outcome.py), never from the exit code of a launcher: torchrun
has one for everything.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.jobs.gang import ExitCodes, Gang
from hf_cloudtrain.jobs.logs import last_lines
from hf_cloudtrain.jobs.node.stopping import MARGIN, stop_handler
from hf_cloudtrain.jobs.records import JobRecord, JobStore, Start, State
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.preemption.sources import RUN_STOP
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.exit_record import read_end

logger = logging.getLogger(__name__)

POLL = 0.2
"""Seconds between two looks at the nodes."""
LOOK = 2.0
"""Seconds between two looks at the store."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a restart: doubled while starts make no step."""
FINAL_WRITE_TIMEOUT, PAUSE = 600.0, 5.0
"""Seconds to go on trying to write how a job ended, and between two tries."""
IDLE_STARTS = 3
"""Starts in a row that are told to stop before their first step; then the job is not started again."""
HINTS = {
    r"EADDRINUSE|[Aa]ddress already in use": (
        "A port is taken. MASTER_PORT in the environment is a free one: let the command use it, as `torchrun` without "
        "options does."
    ),
    r"No space left on device": "A disk is full.",
    r"OutOfMemoryError|out of memory": "The memory did not suffice.",
}
"""What is said after a crash, by what is in the last lines of the log."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job after one of its starts."""

    state: State | None
    """None: it is started again."""
    outcome: str
    reason: str | None
    is_crash: bool = False


class Supervisor:
    """Runs a job to its end.

    Args:
        store: where the record is.
        record: of the job, as it is now.
        gang: its nodes.
        review: an engine's own word on what becomes of the job after a start; None: what is judged here.

    Example:
        >>> Supervisor(submission, store, record, LocalGang(submission)).run().state
        'finished'
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
        self._told: str | None = None
        """What it was told to stop by: "cancelled", or the name of a signal."""
        self._told_at = 0.0
        self._idle = 0
        self._asking: threading.Thread | None = None
        self._newest: int | None = None
        """The run's newest attempt, as the store said last."""
        self._wake = threading.Event()

    @property
    def told_by_signal(self) -> str | None:
        """Name of the signal that it was told to stop by."""
        return None if self._told == "cancelled" else self._told

    def run(self) -> JobRecord:
        """Start the nodes until the job is over; gives its last record."""
        with stop_handler(self._hear):
            try:
                return self._start_until_over()
            finally:
                self._gang.kill()

    def _start_until_over(self) -> JobRecord:
        while True:
            verdict = self._start_once()
            if verdict.state is None and self._is_told():
                verdict = dataclasses.replace(verdict, state=self._told_state())
            verdict = self._review(verdict)
            restarts = self._record.restarts + (verdict.is_crash and verdict.state is None)
            self._show(state=verdict.state or "starting", reason=verdict.reason, restarts=restarts)
            if verdict.state is not None:
                return self._record
            logger.info("%s All nodes are started again.", verdict.reason)
            self._wake.wait(min(FIRST_PAUSE * 2 ** min(self._idle, 10), LONGEST_PAUSE))

    def _start_once(self) -> Verdict:
        if self._is_told():
            return Verdict(self._told_state(), "preempted", self._told_reason())
        number = len(self._record.starts) + 1
        begun = Start(number, time.time())
        self._show(state="starting", starts=(*self._record.starts, begun))
        known = self._newest = self._newest_attempt()
        failure: str | None
        try:
            self._submission.forget_start(number)
            self._gang.start(number)
            codes, failure = self._watch(known), None
        except OSError as error:
            codes, failure = (None,) * self._submission.plan.nodes, str(error)
        self._is_told()  # cancelled, it may be, while it was told to stop by a signal
        progress = self._progress(known)
        verdict = judge(self._submission, number, codes, self._told, failure, progress.get("state"))
        self._idle = (
            0 if progress.get("productive_seconds") or _saved(self._submission, number) else self._idle + 1
        )
        if verdict.is_crash and self._record.restarts >= self._record.max_restarts:
            times = "once" if self._record.restarts == 1 else f"{self._record.restarts} times"
            spent = f" It has been started again {times}, as 'max_restarts' allows."
            verdict = dataclasses.replace(
                verdict,
                state="failed",
                reason=(verdict.reason or "") + (spent if self._record.restarts else ""),
            )
        elif verdict.state is None and not verdict.is_crash and self._idle >= IDLE_STARTS:
            reason = f"{IDLE_STARTS} starts in a row were told to stop before their first step. {verdict.reason or ''}"
            verdict = dataclasses.replace(verdict, state="preempted", reason=reason.strip())
        ended = dataclasses.replace(
            begun, ended=time.time(), outcome=verdict.outcome, reason=verdict.reason, exit_codes=codes
        )
        self._show(starts=(*self._record.starts[:-1], ended))
        return verdict

    def _watch(self, known: int | None) -> ExitCodes:
        """Wait for the nodes to end, and see to it that they do where somebody wants it."""
        asked_to_stop = False
        looked = 0.0
        while (codes := self._gang.poll()) is None:
            now = time.monotonic()
            if now - looked > LOOK:
                looked = now
                self._look()
            if (
                self._record.state == "starting"
                and None not in (known, self._newest)
                and self._newest != known
            ):
                self._show(state="running", reason=None)
            if self._told is not None and not asked_to_stop:
                asked_to_stop = True
                self._gang.stop()  # first: the store may take long to answer
                self._show(state="stopping", reason=self._told_reason())
            if asked_to_stop and now > self._told_at + self._submission.plan.grace + 3 * MARGIN:
                self._gang.kill()
            self._wake.wait(POLL)
            if self._told is not None:
                time.sleep(POLL)  # the event stays set
        return codes

    def _look(self) -> None:
        """Ask the store, and wait for no answer: one that hangs must not keep a signal from the nodes."""

        def ask() -> None:
            self._is_told()
            if self._record.state == "starting":
                self._newest = self._newest_attempt()

        if self._asking is None or not self._asking.is_alive():
            self._asking = threading.Thread(target=ask, name="cloudtrain-store", daemon=True)
            self._asking.start()

    def _is_told(self) -> bool:
        if self._is_cancelled():
            self._tell("cancelled")
        return self._told is not None

    def _is_cancelled(self) -> bool:
        if self._told != "cancelled":
            try:
                return self._store.is_cancelled(self._record.id)
            except CloudTrainError as error:
                logger.warning("%s", error)
        return False

    def _tell(self, by: str) -> None:
        if self._told is None:
            self._told_at = time.monotonic()
        self._told = by
        self._wake.set()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._told is None:
            self._tell(signal.Signals(number).name)

    def _told_state(self) -> State:
        return "cancelled" if self._told == "cancelled" else "preempted"

    def _told_reason(self) -> str:
        return "`cloudtrain job cancel`" if self._told == "cancelled" else f"{self._told} to the supervisor"

    def _progress(self, known: int | None) -> dict[str, Any]:
        """The last heartbeat of the run's newest attempt, if that began after the one that was known."""
        newest = self._newest_attempt()
        if known is None or newest is None or newest <= known:
            return {}
        try:
            return _catalog(self._submission).attempts.read_progress(newest) or {}
        except CloudTrainError as error:
            logger.warning("%s", error)
            return {}

    def _newest_attempt(self) -> int | None:
        """0 before the first; None where the storage does not answer."""
        try:
            return max(_catalog(self._submission).attempts.numbers(), default=0)
        except CloudTrainError as error:
            logger.warning("%s", error)
            return None

    def _show(self, **changes: Any) -> None:
        self._record = dataclasses.replace(self._record, **changes)
        # The last word is said until the store takes it: without it a job that has ended counts as lost.
        deadline = time.monotonic() + (FINAL_WRITE_TIMEOUT if self._record.is_over else 0.0)
        while True:
            try:
                self._record = self._store.write(self._record)
                return
            except CloudTrainError as error:
                logger.error("The record of the job could not be written. %s", error)
            if time.monotonic() >= deadline:
                return
            time.sleep(PAUSE)


def judge(
    submission: Submission,
    number: int,
    codes: Sequence[int | None],
    told: str | None,
    failure: str | None = None,
    progress: str | None = None,
) -> Verdict:
    """What becomes of a job, from what the nodes of one start left behind.

    Args:
        codes: exit codes of the nodes; None for one that was lost.
        told: what the job was told to stop by.
        failure: why the nodes could not be started.
        progress: state of the attempt that this start began, as the run's storage has it: what a node that was lost
            with its exit file has said there counts too.
    """
    ends = [read_end(submission.exit_file(rank, number)) or {} for rank in range(submission.plan.nodes)]
    nodes = [read_end(submission.node_file(rank, number)) or {} for rank in range(submission.plan.nodes)]
    by_outcome = {str(end["outcome"]): end for end in reversed(ends) if end.get("outcome")}
    if not by_outcome and progress in ("finished", "overtaken"):
        by_outcome[progress] = {"outcome": progress}
    commands = [node.get("exit_code") for node in nodes]
    state: State | None
    if "finished" in by_outcome:
        after = [code for code in commands if code]
        reason = (
            f"The training finished, and then the command ended with exit code {after[0]}." if after else None
        )
        return Verdict("finished", "finished", reason)
    if told is not None:
        end = by_outcome.get("preempted") or by_outcome.get("stopped") or {}
        saved = (
            f"The newest checkpoint is {end['committed']}." if end.get("committed") else "Nothing was saved."
        )
        by = "`cloudtrain job cancel`" if told == "cancelled" else told
        state = "cancelled" if told == "cancelled" else "preempted"
        return Verdict(state, "preempted", f"Stopped by {by}. {saved}")
    if "overtaken" in by_outcome:
        return Verdict("failed", "overtaken", str(by_outcome["overtaken"].get("reason") or "Overtaken."))
    if "stopped" in by_outcome and not any(commands):
        step = by_outcome["stopped"].get("step")
        return Verdict("finished", "stopped", f"The script ended before its last step (saved: step {step}).")
    if "preempted" in by_outcome:
        reason = str(by_outcome["preempted"].get("reason"))
        state = "cancelled" if reason.startswith(RUN_STOP) else None
        return Verdict(state, "preempted", f"Saved and stopped by {reason}.")
    return _failed(submission, codes, nodes, by_outcome, failure)


def _failed(
    submission: Submission,
    codes: Sequence[int | None],
    nodes: list[dict[str, Any]],
    by_outcome: dict[str, dict[str, Any]],
    failure: str | None,
) -> Verdict:
    """Of a start that nobody stopped and that trained to no end."""
    problems = [str(node["problem"]) for node in nodes if node.get("problem")]
    if any(node.get("hopeless") for node in nodes):
        return Verdict("failed", "failed", problems[0])
    if failure or problems:
        return Verdict(None, "failed", failure or problems[0], is_crash=True)
    if all(code == 0 for code in codes):
        return Verdict(
            "failed",
            "failed",
            "The command ended with exit code 0 and trained nothing: no CloudTrainCallback, TrainLoop or init() has begun.",
        )
    rank, how = _crash(by_outcome, codes, [node.get("exit_code") for node in nodes])
    return Verdict(None, "failed", f"{how}{_hint(submission, rank)}", is_crash=True)


def _crash(
    by_outcome: dict[str, dict[str, Any]], codes: Sequence[int | None], commands: Sequence[int | None]
) -> tuple[int, str]:
    """The node that crashed first to be named, and how."""
    said = by_outcome.get("failed", {}).get("reason")
    rank, code = next(
        ((rank, command if command is not None else code)
         for rank, (code, command) in enumerate(zip(codes, commands, strict=True)) if code not in (0, 75)),
        (0, None),
    )  # fmt: skip
    if code is None:
        how = f"Node {rank} was lost"
    elif code < 0:
        how = f"The command of node {rank} was ended by {_signal_name(-code)}"
    else:
        how = f"The command of node {rank} ended with exit code {code}"
    return rank, f"{how}: {said}" if said else f"{how}."


def _hint(submission: Submission, rank: int) -> str:
    """What the last lines of a node tell whoever knows them."""
    said = "\n".join(last_lines(submission.node_log(rank), 60))
    return next((f" {advice}" for pattern, advice in HINTS.items() if re.search(pattern, said)), "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _saved(submission: Submission, number: int) -> bool:
    ends = [read_end(submission.exit_file(rank, number)) or {} for rank in range(submission.plan.nodes)]
    return any(end.get("saved") for end in ends)


def _catalog(submission: Submission) -> Catalog:
    return Catalog(Storage(submission.run_url, env.storage_options(None)))
