"""Where notices come from, signals aside: a file, `cloudtrain run stop` through the run's storage, and the cloud.

    watcher = NoticeWatcher(default_sources(catalog, attempt=3), on_notice)     # a thread a source, until the first notice
    watcher.start()

Each source has a thread of its own, so one that hangs delays no other and not the training. The threads end with the
process, and a forked child has none of them.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.preemption.cloud_metadata import Notice, cloud_sources
from hf_cloudtrain.runtime.threads import SafeTurn, before_exit

__all__ = ["Notice", "NoticeWatcher", "Source", "StopFile", "StopRequest", "default_sources", "pending"]

logger = logging.getLogger(__name__)

PENDING_SECONDS = 5.0
"""How long `pending` waits for all sources together; a metadata service answers within milliseconds."""
CLOSE_SECONDS = 1.0
"""How long `close` waits for looks under way: storage that hangs must not use up the time that a notice leaves."""

RUN_STOP = "`cloudtrain run stop`"
"""How the source of a person's request begins; a launcher must not start the run again after it."""


class Source(Protocol):
    """Where a notice may appear."""

    pause: float
    """Seconds between two looks."""

    def look(self) -> Notice | None:
        """A notice, if there is one now. What it raises is logged, and the next look comes as usual."""
        ...


class StopFile:
    """A file that a person or a script creates."""

    pause = 1.0

    def __init__(self, path: str) -> None:
        self._path = path

    def look(self) -> Notice | None:
        """A notice where the file exists."""
        return Notice(f"the file {self._path!r}") if os.path.exists(self._path) else None


class StopRequest:
    """`cloudtrain run stop URL`, through the run's storage.

    Args:
        attempt: the one that trains here. None before it has begun: then a request to the attempt before counts if the
            launcher has restarted this process; a person who starts the run again wants it to train.
    """

    def __init__(self, catalog: Catalog, attempt: int | None) -> None:
        self.pause = env.heartbeat()
        self._catalog = catalog
        self._attempt = attempt

    def look(self) -> Notice | None:
        """A notice where the attempt was asked to stop. Raises StorageError."""
        attempt = self._previous_attempt() if self._attempt is None else self._attempt
        if attempt is None or not self._catalog.attempts.stop_requested(attempt):
            return None
        return Notice(f"{RUN_STOP} for attempt {attempt}")

    def _previous_attempt(self) -> int | None:
        return max(self._catalog.attempts.numbers(), default=None) if env.is_restart() else None


class NoticeWatcher:
    """Looks at all sources until one has a notice, and passes that one on, once, in another thread.

    Example:
        >>> watcher = NoticeWatcher(default_sources(catalog, attempt=3), lambda notice: stop.set())
        >>> watcher.start()
        >>> train()
        >>> watcher.close()
    """

    def __init__(self, sources: Iterable[Source], on_notice: Callable[[Notice], None]) -> None:
        self._on_notice = on_notice
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._watch, args=(source,), name="cloudtrain-notice", daemon=True)
            for source in sources
        ]

    def start(self) -> None:
        """Look now, and then after each pause."""
        for thread in self._threads:
            thread.start()
        before_exit(self.close)

    def close(self) -> None:
        """Stop looking. No call of `on_notice` starts after this; one under way may still run where a source hangs."""
        with self._lock:
            self._over.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _watch(self, source: Source) -> None:
        quiet, turn = _QuietSource(source), SafeTurn(f"The watch for notices ({type(source).__name__})")
        while not self._over.is_set():
            with turn:
                notice = quiet.look()
                if notice is not None:
                    self._pass_on(notice)
            self._over.wait(source.pause)

    def _pass_on(self, notice: Notice) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
        self._on_notice(notice)  # outside the lock: it may close the watcher


def pending(sources: Iterable[Source], seconds: float = PENDING_SECONDS) -> Notice | None:
    """A notice that is pending right now, by one look at every source.

    Args:
        seconds: how long to wait for all of them; one that has not answered by then counts as quiet.
    """
    quiet_sources = [_QuietSource(source) for source in sources]
    answers: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
    for quiet in quiet_sources:
        # A daemon: a look that hangs must not keep the process alive.
        threading.Thread(
            target=lambda quiet=quiet: answers.put(quiet.look()), name="cloudtrain-notice", daemon=True
        ).start()
    deadline = time.monotonic() + seconds
    for _ in quiet_sources:
        try:
            notice = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            logger.debug("Not every source of notices answered within %s s.", seconds)
            return None
        if notice is not None:
            return notice
    return None


def default_sources(catalog: Catalog | None = None, attempt: int | None = None) -> list[Source]:
    """All sources of this process. One process a host suffices for its cloud, and one a run for the run's storage.

    Args:
        catalog: of the run; None where another process of the job watches its storage.
        attempt: the one that trains here; None before it has begun (see StopRequest).
    """
    sources: list[Source] = [*cloud_sources()]
    path = env.stop_file()
    if path is not None:
        sources.append(StopFile(path))
    if catalog is not None:
        sources.append(StopRequest(catalog, attempt))
    return sources


class _QuietSource:
    """A source whose errors are logged, once, instead of raised: they are not notices."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._reported = False

    def look(self) -> Notice | None:
        try:
            return self._source.look()
        except Exception as error:  # noqa: BLE001 - whatever a client raises, it must not end the watching
            if not self._reported:
                name = type(self._source).__name__
                logger.debug("%s could not be asked for notices: %s", name, error)
                self._reported = True
            return None
