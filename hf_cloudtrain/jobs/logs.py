"""The output of a job's nodes, from their log files."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hf_cloudtrain.jobs.records import JobRecord, JobStore
from hf_cloudtrain.jobs.submission import Submission

POLL = 0.3
"""Seconds between two reads of the files."""
MAX_LENGTH = 64 * 1024
"""Characters of a line that are shown; the line of a progress bar can have megabytes."""


def show_messages(form: str) -> None:
    """Show our own messages from INFO on, and those of other libraries from WARNING on; botocore says what it finds at each start."""
    logging.basicConfig(level=logging.WARNING, format=form)
    for name in ("hf_cloudtrain", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)


def follow_files(files: Mapping[str, Path], follow: bool, is_over: Callable[[], bool]) -> Iterator[str]:
    """The lines of growing files, each with the label of its file if there are several.

    Args:
        files: by label, such as "node 0"; a file may appear later.
        follow: wait for more lines until `is_over`.
    """
    with contextlib.ExitStack() as opened:
        tails = [
            _Tail(f"[{label}] " if len(files) > 1 else "", path, opened) for label, path in files.items()
        ]
        while True:
            over = not follow or is_over()  # before the last read, which then misses nothing
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
    """The lines of one node, or of all nodes, from the files in the job's home.

    Args:
        is_over: whether the job writes nothing more, by its newest record.
    """
    submission = Submission.load_here(record.home)
    store = JobStore(submission.store)
    ranks = range(record.nodes) if node_rank is None else [node_rank]
    files = {f"node {rank}": submission.node_log(rank) for rank in ranks}
    return follow_files(files, follow, lambda: is_over(store.read(record.id)))


def mark_start(submission: Submission, number: int) -> None:
    """Mark the beginning of a start in the log of every node."""
    submission.log.mkdir(parents=True, exist_ok=True)
    for rank in range(submission.plan.nodes):
        with open(submission.node_log(rank), "ab") as log:
            log.write(f"{start_mark(number)}\n".encode())


def start_mark(number: int) -> str:
    """The line between the output of two starts."""
    return f"--- start {number} ---"


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a file, without reading all of a large one; empty if it is missing."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, io.SEEK_END) - MAX_LENGTH))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return list(deque((_shown(line) for line in text.splitlines() if line.strip()), maxlen=count))


def joined_lines(before: list[str], now: list[str], most: int) -> list[str]:
    """Lines known so far with the last lines as they are now: what is new is added, up to four times `most`."""
    for overlap in range(min(len(before), len(now)), 0, -1):
        if before[-overlap:] == now[:overlap]:
            joined = before + now[overlap:]
            return joined if len(joined) <= 4 * most else joined[-most:]
    return now


class _Tail:
    def __init__(self, label: str, path: Path, opened: contextlib.ExitStack) -> None:
        self._opened = opened
        self._label = label
        self._path = path
        self._file: io.BufferedReader | None = None
        self._rest = b""

    def lines(self, *, last: bool) -> Iterator[str]:
        """The new lines; at the last read an unfinished line too."""
        if self._file is None:
            try:
                self._file = self._opened.enter_context(self._path.open("rb"))
            except FileNotFoundError:
                return
        while block := self._file.read(MAX_LENGTH):
            *whole, self._rest = (self._rest + block).split(b"\n")
            if len(self._rest) > MAX_LENGTH:
                whole.append(self._rest)
                self._rest = b""
            for line in whole:
                yield self._label + _shown(line.decode(errors="replace"))
        if last and self._rest:
            yield self._label + _shown(self._rest.decode(errors="replace"))
            self._rest = b""


def _shown(line: str) -> str:
    """The last state of a progress bar that overwrites itself."""
    return line.rstrip("\r").rpartition("\r")[2][:MAX_LENGTH]
