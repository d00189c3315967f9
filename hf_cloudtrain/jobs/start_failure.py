"""Why a command failed, by its exit code and the last lines of its log: what no restart can mend, and what is the same again."""

from __future__ import annotations

import re

from hf_cloudtrain.jobs.logs import last_lines, start_mark
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.runtime.redaction import redact

LINES = 200
"""Last lines of a log that are searched: torchrun's own report of a failure has about 30."""
LONGEST = 300
"""Characters of a line of the log in the reason of a failure."""

_NO_COMMAND, _NOT_EXECUTABLE = 127, 126
"""Exit codes of bash: https://www.gnu.org/software/bash/manual/html_node/Exit-Status.html."""
_MISSING_COMMAND = re.compile(r"([^\s:]+): (?:command )?not found")
_REFUSED_FILE = re.compile(r"([^\s:]+): (?:Permission denied|Is a directory|cannot execute)")
_MISSING_FILE = re.compile(r"can't open file '(.+?)': \[Errno 2\]")
_MISSING_FOLDER = re.compile(r"cd: (.+?): No such file or directory")
_ERROR = re.compile(r"\w(?:Error|Exception|Exit)\b")
_OF_TORCHRUN = re.compile(r"ChildFailedError|SignalException|error_file|\bFAILED\b")
_PASSES = re.compile(
    r"connect|timed? ?out|temporar|unavailable|refused|reset by peer|too many requests|throttl|resolution|"
    r"address already in use|EADDRINUSE|rendezvous|NCCL|No space left|out of memory",
    re.IGNORECASE,
)
"""Failures that may be gone at the next start."""


def lines_of_start(submission: Submission, rank: int, number: int) -> list[str]:
    """The last lines that a node wrote in one start."""
    lines = last_lines(submission.node_log(rank), LINES)
    mark = start_mark(number)
    return lines[len(lines) - lines[::-1].index(mark) :] if mark in lines else lines


def cannot_start(submission: Submission, lines: list[str], code: int | None) -> str | None:
    """What to mend where a command could not start at all, so that each start fails alike; None for other failures."""
    text = "\n".join(lines)
    if code == _NO_COMMAND:
        found = _MISSING_COMMAND.findall(text)
        what = f"{found[-1]!r} was not found" if found else "a program of it was not found"
        return f"{what}. Correct 'job_setting.docker.command', or install the program in its 'setup'."
    if code == _NOT_EXECUTABLE:
        found = _REFUSED_FILE.findall(text)
        what = f"{found[-1]!r} cannot be executed" if found else "a program of it cannot be executed"
        return f"{what}. Make it executable (chmod +x), or call it with bash or python."
    for pattern in (_MISSING_FILE, _MISSING_FOLDER):
        if code and code > 0 and (found := pattern.findall(text)):
            return f"{found[-1]!r} does not exist. {_where(submission)} Correct 'job_setting.docker.command'."
    return None


def error_line(lines: list[str]) -> str | None:
    """The line by which `alike` recognises a failure; None where the next start may be better."""
    of_torchrun = [line for line in lines if _OF_TORCHRUN.search(line)]
    errors = [line for line in lines if _ERROR.search(line) and line not in of_torchrun]
    if not errors and of_torchrun:
        return None  # its report is the same for every failure, such as a SIGKILL
    found = next(iter(reversed(errors or lines)), None)
    if found is None or _PASSES.search(found):
        return None
    return redact(found)[:LONGEST]


def alike(one: str | None, other: str | None) -> bool:
    """Whether two starts failed with the same error; process ids, ports and times may differ."""
    numbers = re.compile(r"\d+")
    return None not in (one, other) and numbers.sub("", one or "") == numbers.sub("", other or "")


def _where(submission: Submission) -> str:
    if submission.has_workspace:
        return f"The command starts in {submission.start_folder!r}, the folder given with -d."
    return "The job was submitted without its folder: -d DIR."
