"""Sources of notices that do what a test asks, and the watcher around them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from hf_cloudtrain.preemption.sources import Notice, NoticeWatcher, Source


class Silent:
    """Never gives notice; counts the looks."""

    pause = 0.01

    def __init__(self) -> None:
        self.looks = 0

    def look(self) -> Notice | None:
        self.looks += 1
        return None


class Hung(Silent):
    """Does not answer until `go_on` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def look(self) -> Notice | None:
        self.go_on.wait()
        return super().look()


class Received:
    """The notices that a watcher passed on."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []

    def __call__(self, notice: Notice) -> None:
        self.notices.append(notice)


@contextlib.contextmanager
def watching(*sources: Source, on_notice: Callable[[Notice], None]) -> Iterator[NoticeWatcher]:
    watcher = NoticeWatcher(sources, on_notice)
    watcher.start()
    try:
        yield watcher
    finally:
        watcher.close()
