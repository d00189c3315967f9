"""Work in threads of this process: in parallel, with a time limit, in turns that survive errors, later, or before the end."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

from hf_cloudtrain.runtime.redaction import redact

logger = logging.getLogger(__name__)
T = TypeVar("T")

TURN = 0.2
"""Seconds of one wait for another thread. Ctrl-C takes effect between two waits."""


def before_exit(method: Callable[[], None]) -> None:
    """Call a bound method while threads still run, when the script ends or an exception, Ctrl-C or sys.exit ends it.

    `atexit` is too late: no thread pool starts a thread then. `concurrent.futures` uses the same hook. The object is
    not kept alive, and a forked child does not call the method.
    """
    reference: Any = weakref.WeakMethod(method)

    def call() -> None:
        found = reference()
        if found is not None:
            found()

    at_exit(call)


def at_exit(call: Callable[[], None]) -> None:
    """As `before_exit`, for a function. Ctrl-C or an error ends only this one; those registered before are called next."""
    pid = os.getpid()

    def call_here() -> None:
        if os.getpid() != pid:
            return
        try:
            call()
        except KeyboardInterrupt:
            return
        except Exception as error:  # the others may have uploads to finish
            logger.warning("A task at the end of the process failed: %s", _text(error))
            logger.debug("The failed task", exc_info=error)

    register = getattr(threading, "_register_atexit", atexit.register)
    register(call_here)


class SafeTurn:
    """A turn of a background thread: an unexpected error ends the turn, not the thread, and is logged once by its name.

    Args:
        what: what the thread does, as the subject of the warning.

    Example:
        >>> turn = SafeTurn("The heartbeat")
        >>> while not closed.wait(15.0):
        ...     with turn:
        ...         beat()
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._seen: set[str] = set()

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        name = type(error).__name__
        say = logger.debug if name in self._seen else logger.warning
        self._seen.add(name)
        say("%s met an unexpected error and continues, as does the training: %s", self._what, _text(error))
        logger.debug("The unexpected error", exc_info=error)
        return True


class Background:
    """Does one work after another in a daemon thread of its own; their errors are logged.

    The start of a thread waits until that thread runs, which takes milliseconds on a busy machine. Here only the first work
    waits for it. The thread ends when this object is closed, or is garbage.

    Args:
        what: what the thread does, as the subject of a warning.

    Example:
        >>> background = Background("The removal of old files")
        >>> background.add(partial(shutil.rmtree, folder, True))
        >>> background.settle(1.0)
    """

    def __init__(self, what: str) -> None:
        self._turn = SafeTurn(what)
        self._works: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        """The last one, also after `close`."""
        self._end: weakref.finalize[..., Background] | None = None
        """Lets the thread end after its work; None where none takes work."""
        self._pid = 0
        self._lock = threading.Lock()

    def add(self, work: Callable[[], object]) -> None:
        """Let it be done after those before."""
        with self._lock:
            if self._pid != os.getpid():  # a fork has no threads of its parent
                self._pid, self._thread, self._end = os.getpid(), None, None
            if self._end is None:
                self._works = SimpleQueue()
                given = self._works, self._turn, self._thread  # not `self`, which it would keep alive
                thread = threading.Thread(target=_do, args=given, name="cloudtrain-background", daemon=True)
                thread.start()
                self._thread, self._end = thread, weakref.finalize(self, self._works.put, None)
                self._end.atexit = False
            self._works.put(work)

    def close(self) -> None:
        """End the thread after the work that was added; later work starts a new one."""
        with self._lock:
            if self._end is not None:
                self._end()
                self._end = None

    def settle(self, timeout: float) -> None:
        """Wait for what was added so far, as many seconds at most; also after `close`."""
        with self._lock:
            if self._thread is None or self._pid != os.getpid():
                return
            wait_for: Callable[[float], object] = self._thread.join
            if self._end is not None:
                done = threading.Event()
                self._works.put(done.set)
                wait_for = done.wait
        wait_for(timeout)


def _do(
    works: SimpleQueue[Callable[[], object] | None], turn: SafeTurn, before: threading.Thread | None
) -> None:
    if before is not None:
        before.join()
    while (work := works.get()) is not None:
        with turn:
            work()
        del work  # it may keep the Background alive


def _text(error: BaseException) -> str:
    # An error may have a text that cannot be made; `traceback` says so instead of raising.
    return redact("".join(traceback.format_exception_only(type(error), error)).strip())


def answer_in_time(work: Callable[[], T], is_late: Callable[[], bool]) -> T:
    """The answer or the error of `work`, which runs in a thread of its own; TimeoutError once `is_late` returns True.

    The thread cannot be ended: it keeps running as a daemon, so from then on nothing else may use the objects of
    `work`.
    """
    task = in_thread(work)
    while not wait([task], TURN).done:
        if is_late() and not task.done():
            raise TimeoutError("no answer")
    try:
        return task.result()
    finally:
        del task  # an error that refers to its own frame keeps all objects of the frame alive


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a daemon thread of its own."""
    task: Future[T] = Future()
    threading.Thread(target=_call, args=(work, task), name="cloudtrain-call", daemon=True).start()
    return task


def _call(work: Callable[[], T], task: Future[T]) -> None:
    try:
        task.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised again by the thread that asks for the result
        task.set_exception(error)
        # The error refers to this frame: without the frame's variables, it keeps neither itself nor `work` alive.
        del task, work


def in_threads(work: Callable[[Any], Any], *groups: tuple[Sequence[Any], int]) -> list[list[Any]]:
    """Call `work` on every item of every group, each group with its own threads; answers in order, or the first error.

    The threads are daemons, unlike those of a ThreadPoolExecutor: a call that hangs must not keep the process alive.

    Args:
        groups: items, and how many of them to work on at once.
    """
    answers: list[list[Any]] = [[None] * len(items) for items, _ in groups]
    errors: list[BaseException] = []

    def take(found: list[Any], queue: deque[tuple[int, Any]]) -> None:
        while queue and not errors:
            try:
                index, item = queue.popleft()
            except IndexError:  # another thread took the last item
                return
            try:
                found[index] = work(item)
            except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
                errors.append(error)

    threads = []
    for found, (items, workers) in zip(answers, groups, strict=True):
        queue = deque(enumerate(items))
        for _ in range(min(workers, len(items))):
            thread = threading.Thread(target=take, args=(found, queue), name="cloudtrain-io", daemon=True)
            thread.start()
            threads.append(thread)
    for thread in threads:
        while thread.is_alive():
            thread.join(TURN)
    if errors:
        raise errors[0]
    return answers
