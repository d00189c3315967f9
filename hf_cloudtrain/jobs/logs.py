"""What the nodes of a job say, from the files that they say it to."""

from __future__ import annotations

import contextlib
import io
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.submission import Submission

POLL = 0.3
"""Seconds between two looks at the files."""
LONGEST = 64 * 1024
"""Characters of a line that are shown; a progress bar can be one line of megabytes."""


def follow_files(files: Mapping[str, Path], follow: bool, is_over: Callable[[], bool]) -> Iterator[str]:
    """The lines of several growing files, each with its label before it where there is more than one.

    Args:
        files: by label, such as "node 0"; one that is not there yet may come.
        follow: wait for more until `is_over`.
    """
    with contextlib.ExitStack() as opened:
        tails = [
            _Tail(f"[{label}] " if len(files) > 1 else "", path, opened) for label, path in files.items()
        ]
        while True:
            over = not follow or is_over()  # before the last look, so that nothing said until then is missed
            found = False
            for tail in tails:
                for line in tail.lines(last=over):
                    found = True
                    yield line
            if over:
                return
            if not found:
                time.sleep(POLL)


def follow_nodes(
    record: JobRecord, node_rank: int | None, follow: bool, is_over: Callable[[JobRecord], bool]
) -> Iterator[str]:
    """The lines of one node, or of all, from the files in the job's home.

    Args:
        is_over: whether a job with this record, just read, writes nothing more.
    """
    submission = Submission.load_here(record.home)
    store = JobStore(submission.store)
    ranks = range(record.nodes) if node_rank is None else [node_rank]
    files = {f"node {rank}": submission.node_log(rank) for rank in ranks}
    return follow_files(files, follow, lambda: is_over(store.read(record.id)))


def mark_start(submission: Submission, number: int) -> None:
    """Write into the log of every node that a start begins."""
    submission.log.mkdir(parents=True, exist_ok=True)
    for rank in range(submission.plan.nodes):
        with open(submission.node_log(rank), "ab") as log:
            log.write(f"--- start {number} ---\n".encode())


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a file, without reading all of a large one; none where it is not there."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, io.SEEK_END) - LONGEST))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return list(deque((_shown(line) for line in text.splitlines() if line.strip()), maxlen=count))


class _Tail:
    def __init__(self, label: str, path: Path, opened: contextlib.ExitStack) -> None:
        self._opened = opened
        self._label = label
        self._path = path
        self._file: io.BufferedReader | None = None
        self._rest = b""

    def lines(self, *, last: bool) -> Iterator[str]:
        """What has come since; an unfinished line too, if it is the last look."""
        if self._file is None:
            try:
                self._file = self._opened.enter_context(self._path.open("rb"))
            except FileNotFoundError:
                return
        while block := self._file.read(LONGEST):
            *whole, self._rest = (self._rest + block).split(b"\n")
            if len(self._rest) > LONGEST:
                whole.append(self._rest)
                self._rest = b""
            for line in whole:
                yield self._label + _shown(line.decode(errors="replace"))
        if last and self._rest:
            yield self._label + _shown(self._rest.decode(errors="replace"))
            self._rest = b""


def _shown(line: str) -> str:
    """Of a progress bar that writes over itself, the last state."""
    return line.rstrip("\r").rpartition("\r")[2][:LONGEST]
