"""SIGTERM and SIGINT in a container. Light to import: until the handler is installed, a signal is lost."""

from __future__ import annotations

import signal
from types import FrameType

STOPPED_EARLY = ("preempted", "Stopped while no command ran.")
"""State and reason of a job that was stopped before its nodes ran."""


class Stopped(BaseException):
    """The container was asked to stop, and nothing runs that handles it."""


class StopSignal:
    """Whether this container was asked to stop. The first process of a container has no default handlers."""

    def __init__(self) -> None:
        self.received = False
        self.raises = True
        """Whether the first signal raises `Stopped`. An `Agent` looks at `received` instead."""

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, True
        if first and self.raises:
            raise Stopped


def outcome(error: BaseException) -> tuple[str, str]:
    """State and reason of a job that ended with an exception."""
    return STOPPED_EARLY if isinstance(error, Stopped) else ("failed", str(error) or type(error).__name__)
