"""What happens to a job after one of its starts, decided from the files that its nodes left behind.

The exit code of a launcher decides nothing: torchrun has the same one for every failure. The exit file of the script
(tracking/exit_record.py), the node file and, if a node was lost with both, the run's last progress on storage do.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.jobs.records import State
from hf_cloudtrain.jobs.start_failure import cannot_start, error_line, lines_of_start
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.preemption.sources import RUN_STOP
from hf_cloudtrain.tracking.exit_record import read_end

CANCELLED = "cancelled"
"""What stopped a job, if it was `cloudtrain job cancel`; otherwise it is the name of a signal."""
HINTS = {
    r"EADDRINUSE|[Aa]ddress already in use": (
        "A port is in use. Let the command use MASTER_PORT of its environment, as `torchrun` without options does."
    ),
    r"No space left on device": "A disk is full.",
    r"OutOfMemoryError|out of memory": "Out of memory.",
}
"""What to add to the reason of a crash, by a pattern in the last lines of the log."""


@dataclass(frozen=True)
class Verdict:
    """What happens to a job after one of its starts."""

    state: State | None
    """None: it is restarted."""
    outcome: str
    reason: str | None
    is_crash: bool = False
    error: str | None = None
    """The line of the log by which the supervisor recognises the same failure."""


def judge(
    submission: Submission,
    number: int,
    codes: Sequence[int | None],
    stopped_by: str | None = None,
    failure: str | None = None,
    progress: str | None = None,
) -> Verdict:
    """What happens to a job after the start of this number.

    Args:
        codes: exit codes of the nodes; None for a node that was lost.
        stopped_by: what stopped the job: `CANCELLED`, or the name of a signal.
        failure: why the nodes could not be started.
        progress: state of the attempt of this start on the run's storage, for a node that was lost with its exit file.
    """
    nodes = [read_end(submission.node_file(rank, number)) or {} for rank in range(submission.plan.nodes)]
    ends = {
        str(end["outcome"]): end for end in reversed(exit_records(submission, number)) if end.get("outcome")
    }
    if not ends and progress in ("finished", "overtaken"):
        ends[progress] = {"outcome": progress}
    commands = [node.get("exit_code") for node in nodes]
    if "finished" in ends:
        after = next((code for code in commands if code), None)
        reason = (
            None
            if after is None
            else f"The training finished, and then the command ended with exit code {after}."
        )
        return Verdict("finished", "finished", reason)
    if stopped_by is not None:
        committed = (ends.get("preempted") or ends.get("stopped") or {}).get("committed")
        saved = f"The newest checkpoint is {committed}." if committed else "Nothing was saved."
        is_cancelled = stopped_by == CANCELLED
        reason = f"Stopped by {'`cloudtrain job cancel`' if is_cancelled else stopped_by}. {saved}"
        return Verdict("cancelled" if is_cancelled else "preempted", "preempted", reason)
    if "overtaken" in ends:
        return Verdict(
            "failed", "overtaken", str(ends["overtaken"].get("reason") or "Overtaken by a newer attempt.")
        )
    if "stopped" in ends and not any(commands):
        step = ends["stopped"].get("step")
        return Verdict("finished", "stopped", f"The script ended before its last step (saved: step {step}).")
    if "preempted" in ends:
        reason = str(ends["preempted"].get("reason"))
        state: State | None = "cancelled" if reason.startswith(RUN_STOP) else None
        return Verdict(state, "preempted", f"Saved and stopped by {reason}.")
    serves = has_served(submission, number)
    if serves and 75 in codes and set(codes) <= {0, 75}:
        return Verdict(None, "preempted", "The server was stopped with its machine.")
    has_begun = bool(ends) or progress is not None or serves
    return _failed(submission, number, codes, nodes, failure, ends.get("failed", {}).get("reason"), has_begun)


def exit_records(submission: Submission, number: int) -> list[dict[str, Any]]:
    """The exit file of each node after a start; empty where there is none."""
    return [read_end(submission.exit_file(rank, number)) or {} for rank in range(submission.plan.nodes)]


def has_saved(submission: Submission, number: int) -> bool:
    """Whether the script of a start has saved."""
    return any(end.get("saved") for end in exit_records(submission, number))


def has_served(submission: Submission, number: int) -> bool:
    """Whether the command of a start was a server, and answered."""
    return any(end.get("served") for end in exit_records(submission, number))


def _failed(
    submission: Submission,
    number: int,
    codes: Sequence[int | None],
    nodes: list[dict[str, Any]],
    failure: str | None,
    reason: str | None,
    has_begun: bool,
) -> Verdict:
    """The verdict on a start that was not stopped and whose training did not end; it may not have begun either."""
    problems = [str(node["problem"]) for node in nodes if node.get("problem")]
    if any(node.get("hopeless") for node in nodes):
        return Verdict("failed", "failed", problems[0])
    if failure or problems:
        return Verdict(None, "failed", failure or problems[0], is_crash=True)
    if all(code == 0 for code in codes):
        if has_served(submission, number):
            return Verdict(None, "failed", "The server ended with exit code 0.", is_crash=True)
        return Verdict(
            "failed",
            "failed",
            "The command ended with exit code 0 and trained nothing: it never reached CloudTrainCallback, TrainLoop or init().",
        )
    rank, code, how = _crash(codes, [node.get("exit_code") for node in nodes])
    lines = lines_of_start(submission, rank, number)
    if not has_begun and (advice := cannot_start(submission, lines, code)):
        return Verdict("failed", "failed", f"{how}: {advice}")
    how = f"{how}: {reason}" if reason else f"{how}."
    error = error_line(lines) if code is not None and code > 0 else None
    return Verdict(None, "failed", how + _hint(lines), is_crash=True, error=error)


def _crash(codes: Sequence[int | None], commands: Sequence[int | None]) -> tuple[int, int | None, str]:
    """The first node that crashed, the exit code of its command, and how."""
    rank, code = next(
        ((rank, command if command is not None else code)
         for rank, (code, command) in enumerate(zip(codes, commands, strict=True)) if code not in (0, 75)),
        (0, None),
    )  # fmt: skip
    if code is None:
        return rank, None, f"Node {rank} was lost"
    if code < 0:
        return rank, code, f"The command of node {rank} was ended by {_signal_name(-code)}"
    # Of bash, whose program a signal has ended: https://www.gnu.org/software/bash/manual/html_node/Exit-Status.html
    by = f" ({_signal_name(code - 128)})" if 128 < code < 128 + signal.NSIG else ""
    return rank, code, f"The command of node {rank} ended with exit code {code}{by}"


def _hint(lines: list[str]) -> str:
    """What the last lines of a node mean, for common problems."""
    text = "\n".join(lines[-60:])
    return next((f" {advice}" for pattern, advice in HINTS.items() if re.search(pattern, text)), "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
