"""Progress of a transfer, and the bar that appears once it has taken a second."""

from __future__ import annotations

import threading
import time
from typing import Any

QUIET_SECONDS = 1.0
"""A transfer that ends within this time shows no bar."""


class Progress:
    """Bytes of one transfer: written by the threads that move them, read by the bar."""

    def __init__(self) -> None:
        self.title = ""
        self.total = 0
        self.done = 0
        self.bar: Bar | None = None
        self._lock = threading.Lock()

    def begin(self, title: str, total: int) -> None:
        """Begin a transfer of `total` bytes."""
        self.title, self.total, self.done = title, total, 0

    def add(self, count: int) -> None:
        """Count bytes that were moved; a negative number subtracts a failed try."""
        with self._lock:
            self.done += count
        bar = self.bar  # another thread may remove it
        if bar is not None:
            bar.update()


class Bar:
    """A tqdm bar over a Progress, on a terminal and in notebooks: `with Bar(progress): progress.add(…)`."""

    def __init__(self, progress: Progress, *, hidden: bool = False) -> None:
        self._progress = progress
        self._hidden = hidden
        self._started = time.monotonic()
        self._bar: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Bar:  # noqa: PYI034 - typing.Self needs Python 3.11
        self._progress.bar = self
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.bar = None
        if self._bar is not None:
            self._draw()
            self._bar.close()

    def update(self) -> None:
        """Draw the bar, if it is due."""
        if not self._hidden and (self._bar is not None or time.monotonic() - self._started > QUIET_SECONDS):
            with self._lock:
                self._draw()

    def _draw(self) -> None:
        if self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(unit="B", unit_scale=True)  # powers of ten, as sizes everywhere
        progress = self._progress
        if self._bar.total != progress.total or self._bar.desc != f"{progress.title}: ":
            self._bar.reset(progress.total)
            self._bar.set_description(progress.title, refresh=False)
        self._bar.update(progress.done - self._bar.n)
