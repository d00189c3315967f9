"""Threads of this process that must not outlive its work, and work that must come before its end."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
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


@functools.cache
def boot_id() -> str:
    """Which life of the machine this is: another one after a power cut; empty where the system does not tell.

    https://man7.org/linux/man-pages/man5/proc_sys_kernel.5.html (random)
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


_making: set[str] = set()


def half_made_by() -> str:
    """The end of the name of a folder that this process is making: says whose it is, if it is left behind."""
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    _making.add(token)
    return token


def is_left_over(name: str) -> bool:
    """Whether the process that was making the folder of this name is no more."""
    match = re.search(r"-((\d+)-[0-9a-f]{8})$", name)
    if match is None:
        return False
    if int(match[2]) == os.getpid():
        return match[1] not in _making  # in a container every life of a training has the same number
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's
        return False
    return False


@contextlib.contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock that one process of this machine has at a time; it ends with its holder, however that ends.

    Args:
        path: the lock's file, which stays.
        patience: seconds to wait for another one.

    Raises:
        BlockingIOError: another process has it still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(TURN)
        try:
            yield
        finally:
            # Said aloud, because a forked child (a loader worker) holds the same lock open.
            fcntl.flock(file, fcntl.LOCK_UN)


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
