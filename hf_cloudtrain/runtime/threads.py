"""Threads of this process that must not outlive its work, and work that must come before its end."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

TURN = 0.2
"""Seconds of one wait for another thread, so that Ctrl-C is heard between them."""


def before_exit(method: Callable[[], None]) -> None:
    """Call a bound method when the interpreter ends by itself, an exception, Ctrl-C or sys.exit, while threads still work.

    `atexit` comes too late: by then no thread pool starts a thread. `concurrent.futures` itself uses the same hook.
    The object is not kept alive, and a forked child does not inherit the duty.
    """
    reference: Any = weakref.WeakMethod(method)

    def call() -> None:
        found = reference()
        if found is not None:
            found()

    at_exit(call)


def at_exit(call: Callable[[], None]) -> None:
    """As `before_exit`, for a function that needs no object."""
    pid = os.getpid()

    def call_here() -> None:
        if os.getpid() == pid:
            call()

    register = getattr(threading, "_register_atexit", atexit.register)
    register(call_here)


def answer_in_time(work: Callable[[], T], is_late: Callable[[], bool]) -> T:
    """What `work` gives or raises, done in a thread of its own; TimeoutError once `is_late` says so.

    The thread cannot be ended: it stays behind, a daemon, and whatever `work` touches must be its own from then on.
    """
    over = threading.Event()
    answers: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            answers.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
            errors.append(error)
        finally:
            over.set()

    threading.Thread(target=call, name="cloudtrain-call", daemon=True).start()
    while not over.wait(TURN):
        if is_late() and not over.is_set():
            raise TimeoutError("no answer")
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # an error that refers to its own frame is freed late, with all that it saw
    return answers[0]


def in_threads(work: Callable[[Any], Any], *groups: tuple[Sequence[Any], int]) -> list[list[Any]]:
    """Do `work` on every item of every group, each group with threads of its own; answers in order, or the first error.

    The threads are daemons: a call that hangs must not keep a process alive whose work was given up, as the threads
    of a ThreadPoolExecutor do.

    Args:
        groups: items, and how many of them may be under way at once.
    """
    answers: list[list[Any]] = [[None] * len(items) for items, _ in groups]
    errors: list[BaseException] = []

    def take(number: int, queue: Iterator[tuple[int, Any]]) -> None:
        for index, item in queue:
            if errors:
                return
            try:
                answers[number][index] = work(item)
            except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
                errors.append(error)

    threads = []
    for number, (items, workers) in enumerate(groups):
        queue = _Shared(enumerate(items))
        for _ in range(min(workers, len(items))):
            thread = threading.Thread(target=take, args=(number, queue), name="cloudtrain-io", daemon=True)
            thread.start()
            threads.append(thread)
    for thread in threads:
        while thread.is_alive():
            thread.join(TURN)
    if errors:
        raise errors[0]
    return answers


class _Shared:
    """An iterator that several threads may take from."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._lock:
            return next(self._items)
