"""stdout and stderr as a command finds them: closed (cron, daemons), full, or a pipe whose reader is gone.

None of them ends in a traceback. A closed stream is replaced; one that cannot be written ends the command with an error that
names the stream, and a pipe without a reader ends it without a word.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, NoReturn

NAMES = ("stdin", "stdout", "stderr")


class _NamedStream(io.FileIO):
    """A stream whose errors say which one it is: Python gives them no file name."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, NAMES[self.fileno()]) from None


def prepare() -> None:
    """Give this process streams that can be written to, or that say why not.

    Where one is closed, the next file that is opened would become stdout.
    """
    for number in range(len(NAMES)):
        try:
            os.fstat(number)
        except OSError:
            _write_to_nothing(number)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - lives as long as the process
    for number, name in enumerate(NAMES[1:], start=1):
        before = getattr(sys, name)
        raw = _NamedStream(number, "w", closefd=False)
        # A name that the terminal's encoding lacks is escaped instead of ending the command.
        encoding, lines = getattr(before, "encoding", "utf-8"), number == 2 or raw.isatty()
        buffer = io.BufferedWriter(raw)
        stream = io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=lines)
        setattr(sys, name, stream)


def is_of_stream(error: OSError) -> bool:
    """Whether stdout or stderr cannot be written."""
    return error.filename in NAMES


def end(error: OSError) -> NoReturn:
    """End the process after an error of stdout or stderr, with exit code 1 and without a traceback."""
    if error.errno != errno.EPIPE:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"Error: Cannot write to {error.filename}: {error.strerror}.\n")
    # Python flushes them once more when it ends, and would print a traceback of its own.
    for number, name in enumerate(NAMES[1:], start=1):
        try:
            getattr(sys, name).flush()
        except OSError:
            _write_to_nothing(number)
    sys.exit(1)


def _write_to_nothing(number: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)
