"""A disk that fails on purpose, and a process that is killed at a change of its disk.

An audit hook of the interpreter sees every change before it is made: an open for writing, a link, a rename, a removal,
a new or removed folder, a new time. Names relative to an open folder count as below the watched one.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, NoReturn

CRASH_STATUS = 137
"""Exit status of a process that `crash_now` ended: what a shell reports for SIGKILL."""

DISK_POINTS = {
    "freeze": ("os.link", 1, "*/_cloudtrain/outbox/.*"),
    "accept": ("os.rename", 1, "*/_cloudtrain/outbox/[!.]*"),
    "forget": ("os.rename", 1, "*/_cloudtrain/outbox/.gone-*"),
    "restored": ("os.rename", 0, "*/_cloudtrain/restore-*"),
}
"""Changes of an output folder by name: audit event, which of its paths, and a glob for that path.

A save freezes large files by links, and a rename accepts it. A rename removes a committed entry from the outbox. A
rename turns a verified download into `checkpoint-<step>`.
"""

_EVER = sys.maxsize


class _Watch:
    """Sees every change below a folder; subclasses decide what happens."""

    _active: ClassVar[list[_Watch]] = []
    _hooked: ClassVar[bool] = False

    def __init__(self, below: str | Path, point: str | None) -> None:
        if point is not None and point not in DISK_POINTS:
            raise ValueError(f"Unknown disk point {point!r}. Use one of: {', '.join(sorted(DISK_POINTS))}.")
        self.seen: list[str] = []
        """The changes so far, by the name of their audit event."""
        self._below = os.path.abspath(below)
        self._point = DISK_POINTS[point] if point else None
        self._lock = threading.Lock()

    def __enter__(self) -> Any:
        if not _Watch._hooked:
            # A hook cannot be removed, so there is one for all watches, which usually does nothing.
            sys.addaudithook(_on_audit_event)
            _Watch._hooked = True
        _Watch._active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _Watch._active.remove(self)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not (self._is_meant(event, arguments) and _changes_disk(event, arguments)):
            return
        with self._lock:
            self.seen.append(event)
            number = len(self.seen)
        self._act(number)

    def _act(self, number: int) -> None:
        raise NotImplementedError

    def _is_meant(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if self._point is not None and event != self._point[0]:
            return False
        given = arguments[:1] if event == "open" else arguments[:2]
        names = [os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else "" for name in given]
        if not any(
            name and (not os.path.isabs(name) or f"{name}/".startswith(f"{self._below}/")) for name in names
        ):
            return False
        return self._point is None or fnmatchcase(names[self._point[1]], self._point[2])


class CrashPoint(_Watch):
    """Ends this process without clean-up, as SIGKILL does, just before its n-th change below a folder.

    Increase n from 1 until a process ends by itself, and it was killed in every state that it can leave behind.

    Args:
        below: the folder; other changes do not count.
        at: the number of the change; None: the first if `point` is set, else only count them.
        point: count only changes of this name, see `DISK_POINTS`.

    Example:
        >>> with CrashPoint(folder) as point:
        ...     outbox.accept(source, entry)
        >>> point.seen[-3:]
        ['os.link', 'open', 'os.rename']
        >>> with CrashPoint("out", point="accept"):      # before the first save is accepted
        ...     train()
    """

    def __init__(self, below: str | Path, at: int | None = None, *, point: str | None = None) -> None:
        super().__init__(below, point)
        self._at = 1 if at is None and point is not None else at

    def _act(self, number: int) -> None:
        if number == self._at:
            crash_now()


class FaultyDisk(_Watch):
    """Refuses changes below a folder from the n-th on, as a full disk does, or one that the kernel made read-only.

    A full disk (`errno.ENOSPC`) refuses only what needs space: files opened for writing, folders, links. Bytes written
    to a file that is already open are not seen; use a small tmpfs for that.

    Args:
        below: the folder; other changes do not count or fail.
        error: an `errno`: ENOSPC, EDQUOT, EROFS, EIO.
        at: the number of the first change that fails.
        times: how many changes in a row fail.
        point: count and fail only changes of this name, see `DISK_POINTS`.

    Example:
        >>> with FaultyDisk("out", errno.EROFS, at=10) as disk:
        ...     train()
        >>> disk.refused
        3
    """

    def __init__(
        self,
        below: str | Path,
        error: int = errno.ENOSPC,
        *,
        at: int = 1,
        times: int = _EVER,
        point: str | None = None,
    ) -> None:
        super().__init__(below, point)
        self.refused = 0
        """Number of changes that have failed."""
        self._error = error
        self._first = at
        self._times = times

    def _is_meant(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if self._error in (errno.ENOSPC, errno.EDQUOT) and event not in _NEEDS_SPACE:
            return False
        return super()._is_meant(event, arguments)

    def _act(self, number: int) -> None:
        if self._first <= number < self._first + self._times:
            self.refused += 1
            raise OSError(self._error, f"{os.strerror(self._error)} (on purpose)", self._below)


def crash_now() -> NoReturn:
    """End this process as SIGKILL does."""
    os._exit(CRASH_STATUS)


_NEEDS_SPACE = {"open", "os.link", "os.symlink", "os.mkdir"}
_CHANGES = {*_NEEDS_SPACE, "os.rename", "os.remove", "os.rmdir", "os.utime", "os.truncate"}


def _on_audit_event(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in tuple(_Watch._active):
        watch._see(event, arguments)


def _changes_disk(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in _CHANGES
