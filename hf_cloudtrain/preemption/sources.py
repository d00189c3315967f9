"""Who may want the training to save and stop, signals aside: a file, a person through storage, the cloud.

    sources = default_sources(catalog, attempt=3)
    watcher = NoticeWatcher(sources, on_notice)     a thread a source, until the first notice
    watcher.start()

A source is looked at where nobody waits for it: each has a thread of its own, so one that hangs keeps no other from
being heard. The threads end with the process, and a forked child has none.
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
from hf_cloudtrain.runtime.threads import before_exit

__all__ = ["Notice", "NoticeWatcher", "Source", "StopFile", "StopRequest", "default_sources", "pending"]

logger = logging.getLogger(__name__)

PENDING_SECONDS = 5.0
"""How long `pending` waits for all sources together; a metadata service answers within milliseconds."""
CLOSE_SECONDS = 1.0
"""How long `close` waits for looks under way: a storage that hangs must not eat the time that a notice leaves."""

RUN_STOP = "`cloudtrain run stop`"
"""How the reason of a person begins, whom nobody should gainsay by starting the run again."""


class Source(Protocol):
    """Somebody who may give notice."""

    pause: float
    """Seconds between two looks."""

    def look(self) -> Notice | None:
        """A notice, if there is one now. What it raises is logged, and it is looked at again."""
        ...


class StopFile:
    """A file that somebody makes, wherever the training can see it."""

    pause = 1.0

    def __init__(self, path: str) -> None:
        self._path = path

    def look(self) -> Notice | None:
        """A notice where the file exists."""
        return Notice(f"the file {self._path!r}") if os.path.exists(self._path) else None


class StopRequest:
    """`cloudtrain run stop URL`, through the run's storage.

    Args:
        attempt: the one that trains here. None before it has begun: then the request to the attempt before counts, if
            the launcher has started it again; a person who starts the run again wants it to train.
    """

    def __init__(self, catalog: Catalog, attempt: int | None) -> None:
        self.pause = env.heartbeat()
        self._catalog = catalog
        self._attempt = attempt

    def look(self) -> Notice | None:
        """A notice where the attempt was asked to stop. Raises StorageError."""
        attempt = self._before() if self._attempt is None else self._attempt
        if attempt is None or not self._catalog.stop_requested(attempt):
            return None
        return Notice(f"{RUN_STOP} for attempt {attempt}")

    def _before(self) -> int | None:
        return max(self._catalog.attempt_numbers(), default=None) if env.is_restart() else None


class NoticeWatcher:
    """Looks at sources until one of them gives notice, which `on_notice` hears once, in another thread.

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
        """Look now, and go on."""
        for thread in self._threads:
            thread.start()
        before_exit(self.close)

    def close(self) -> None:
        """Look no more. `on_notice` is not called after this, but may still be at work if a source hangs meanwhile."""
        with self._lock:
            self._over.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _watch(self, source: Source) -> None:
        looker = _Looker(source)
        while not self._over.is_set():
            notice = looker.look()
            if notice is not None:
                self._tell(notice)
            self._over.wait(source.pause)

    def _tell(self, notice: Notice) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
        self._on_notice(notice)  # outside the lock: it may close the watcher


def pending(sources: Iterable[Source], seconds: float = PENDING_SECONDS) -> Notice | None:
    """A notice that stands right now, by one look at every source.

    Args:
        seconds: how long to wait for all of them; one that has not answered by then has none.
    """
    lookers = [_Looker(source) for source in sources]
    answers: queue.SimpleQueue[Notice | None] = queue.SimpleQueue()
    for looker in lookers:
        # A daemon: a look that hangs must not keep the process alive.
        look = threading.Thread(
            target=lambda looker=looker: answers.put(looker.look()), name="cloudtrain-notice", daemon=True
        )
        look.start()
    deadline = time.monotonic() + seconds
    for _ in lookers:
        try:
            notice = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            logger.debug("Not every source of notices answered within %s s.", seconds)
            return None
        if notice is not None:
            return notice
    return None


def default_sources(catalog: Catalog | None = None, attempt: int | None = None) -> list[Source]:
    """Everybody who may give notice here. One process a host is enough to listen to its cloud, and one a run to its storage.

    Args:
        catalog: of the run; None where another process of the job listens to its storage.
        attempt: the one that trains here; None before it has begun (see StopRequest).
    """
    sources: list[Source] = [*cloud_sources()]
    path = env.stop_file()
    if path is not None:
        sources.append(StopFile(path))
    if catalog is not None:
        sources.append(StopRequest(catalog, attempt))
    return sources


class _Looker:
    """Looks at one source; trouble is no notice, and is told once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._told = False

    def look(self) -> Notice | None:
        try:
            return self._source.look()
        except Exception as error:  # noqa: BLE001 - whatever a client raises, it must not end the listening
            if not self._told:
                name = type(self._source).__name__
                logger.debug("%s does not say whether there is a notice: %s", name, error)
                self._told = True
            return None
