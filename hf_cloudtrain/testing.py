"""Storage that fails on purpose, and processes that die on purpose: for tests of training scripts and of this package.

    storage = FaultyStorage("file:///tmp/run")
    storage.fail("upload", call=2)                      # the second upload is reset; the client tries again
    storage.lose_answer("create")                       # it is done, but the answer never comes
    storage.hold("upload", until=event)                 # nothing moves before event.set()
    storage.corrupt("download", path="*.safetensors")   # one bit flips on the way
    storage.crash("write", call=3)                      # the process ends as if by SIGKILL
    with storage.everywhere():
        train()

A call is one request as the client makes it, so a retry is another call. To kill a process between any two changes
of its disk, and not only at a storage call, see `CrashPoint`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, NoReturn
from unittest import mock

import xxhash

from hf_cloudtrain.backends import IncompleteUpload, ObjectInfo
from hf_cloudtrain.storage import MAX_RECORD_READ, Storage

Kind = Literal["any", "read", "write", "create", "list", "delete", "upload", "download"]
"""Which calls a fault is about. `upload` and `download` move files; `read`, `write` and `create` small records."""

CRASH_STATUS = 137
"""Exit status of a process that was crashed here: what a shell reports for SIGKILL."""

_EVER = sys.maxsize


class Call(NamedTuple):
    """One request that was made."""

    kind: str
    path: str


class FaultyStorage(Storage):
    """A Storage whose requests fail when told to, and are recorded. Arguments as `Storage`.

    Each fault counts the requests that fit it from the moment it was told: `call=2` is the second from then on, and
    `times` how many in a row it meets. Bytes go through fsspec, never through a native client, so that each request
    is seen.

    Example:
        >>> storage = FaultyStorage("memory://runs/mrpc")
        >>> storage.fail("create", path="*/checkpoints/*")
        >>> Catalog(storage).commit(manifest)          # met by the retry of the client
        True
        >>> storage.count("create", "*/checkpoints/*")
        2
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        super().__init__(url, storage_options)
        self.calls: list[Call] = []
        """All requests so far, in order."""
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()

    def fail(
        self,
        kind: Kind,
        error: Exception | None = None,
        *,
        call: int = 1,
        times: int = 1,
        path: str = "*",
    ) -> None:
        """The request is not made and raises instead.

        Args:
            error: what the client raises; None is a reset connection, which is tried again. A StorageError that is
                no StorageUnavailableError is not.
            path: glob of the object's path below the run URL.
        """
        raised = error or ConnectionResetError("connection reset on purpose")
        self._add(_Fault(kind, path, call, times, before=lambda: _raise(raised)))

    def lose_answer(self, kind: Kind, *, call: int = 1, times: int = 1, path: str = "*") -> None:
        """The request is made and succeeds, and the connection breaks before the answer."""
        error = ConnectionResetError("answer lost on purpose")
        self._add(_Fault(kind, path, call, times, after=lambda: _raise(error)))

    def hold(
        self, kind: Kind, until: threading.Event, *, call: int = 1, times: int = _EVER, path: str = "*"
    ) -> None:
        """The request waits for the event before it is made."""
        self._add(_Fault(kind, path, call, times, before=lambda: _wait(until)))

    def corrupt(
        self,
        kind: Literal["read", "write", "create", "upload", "download"],
        change: Callable[[bytes], bytes] | None = None,
        *,
        call: int = 1,
        times: int = 1,
        path: str = "*",
    ) -> None:
        """The bytes change on the way, and neither side notices.

        Args:
            change: gives the bytes that arrive; None flips one bit in the middle.
        """
        self._add(_Fault(kind, path, call, times, change=change or flip_bit))

    def crash(self, kind: Kind, *, call: int = 1, after: bool = False, path: str = "*") -> None:
        """This process ends at the request, without clean-up, as by SIGKILL; with `after`, when it is done."""
        point: dict[str, Any] = {"after" if after else "before": _crash}
        self._add(_Fault(kind, path, call, 1, **point))

    def heal(self) -> None:
        """Forget all faults; `calls` stay."""
        with self._lock:
            self._faults.clear()

    def count(self, kind: Kind = "any", path: str = "*") -> int:
        """How many requests were made that fit."""
        with self._lock:
            return sum(_fits(kind, path, call) for call in self.calls)

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[FaultyStorage]:
        """In this block, every Storage of this process for the same URL has these faults and is recorded here."""
        connect = Storage._connected
        script = self

        def connected(storage: Storage) -> Any:
            backend = connect(storage)
            return script._wrapped(storage, backend) if storage.url == script.url else backend

        with mock.patch.object(Storage, "_connected", connected):
            yield self

    def _connected(self) -> Any:
        backend = super()._connected()
        # Within `everywhere` it is wrapped already, and each request counts once.
        return backend if isinstance(backend, _FaultyBackend) else self._wrapped(self, backend)

    def _wrapped(self, storage: Storage, backend: Any) -> _FaultyBackend:
        storage._transfer = None
        return _FaultyBackend(backend, self)

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    @contextlib.contextmanager
    def _request(self, kind: str, path: str) -> Iterator[Callable[[bytes], bytes] | None]:
        """Around one request; gives how its bytes change, if they do."""
        call = Call(kind, path)
        with self._lock:
            self.calls.append(call)
            due = [fault for fault in self._faults if fault.is_due(call)]
        for fault in due:
            fault.before()
        yield next((fault.change for fault in due if fault.change), None)
        for fault in due:
            fault.after()


class CrashPoint:
    """Ends this process, without clean-up, as by SIGKILL, just before its n-th change below a folder.

    A change is an open for writing, a link, a rename, a removal, a new or removed folder, or a new time: what can be
    seen after a crash. Sweep n from 1 until a process ends by itself, and it was killed in every state it can leave.
    Names relative to an open folder count as below it.

    Args:
        below: only changes in here count.
        at: which one; None only counts them.

    Example:
        >>> with CrashPoint(folder) as point:
        ...     outbox.accept(source, entry)
        >>> point.seen[-3:]
        ['os.link', 'open', 'os.rename']
    """

    _active: CrashPoint | None = None
    _listening = False

    def __init__(self, below: str | Path, at: int | None = None) -> None:
        self.seen: list[str] = []
        """The changes so far, by the name of their audit event."""
        self._below = os.path.abspath(below)
        self._at = at
        self._lock = threading.Lock()

    def __enter__(self) -> CrashPoint:  # noqa: PYI034 - typing.Self came with Python 3.11
        if not CrashPoint._listening:
            # A hook cannot be taken away again, so there is one for all, which does nothing most of the time.
            sys.addaudithook(_listen)
            CrashPoint._listening = True
        CrashPoint._active = self
        return self

    def __exit__(self, *_: object) -> None:
        CrashPoint._active = None

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not (_changes_disk(event, arguments) and self._is_below(event, arguments)):
            return
        with self._lock:
            self.seen.append(event)
            if len(self.seen) == self._at:
                _crash()

    def _is_below(self, event: str, arguments: tuple[Any, ...]) -> bool:
        names = arguments[:1] if event == "open" else arguments[:2]
        paths = (os.fsdecode(name) for name in names if isinstance(name, (str, bytes, os.PathLike)))
        return any(not os.path.isabs(path) or f"{path}/".startswith(f"{self._below}/") for path in paths)


def flip_bit(data: bytes) -> bytes:
    """The same bytes with one bit flipped in the middle; what is empty gets a byte."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"\0"


@dataclass
class _Fault:
    kind: str
    path: str
    first: int
    times: int
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None
    change: Callable[[bytes], bytes] | None = None
    seen: int = 0

    def is_due(self, call: Call) -> bool:
        if not _fits(self.kind, self.path, call):
            return False
        self.seen += 1
        return self.first <= self.seen < self.first + self.times


class _FaultyBackend:
    """Between a Storage and its client: makes each request of the script's, then the client's."""

    def __init__(self, backend: Any, script: FaultyStorage) -> None:
        self._backend = backend
        self._script = script

    def read(self, path: str, limit: int) -> bytes:
        with self._script._request("read", path) as change:
            data: bytes = self._backend.read(path, limit)
            return change(data) if change else data

    def write(self, path: str, data: bytes) -> None:
        with self._script._request("write", path) as change:
            self._backend.write(path, change(data) if change else data)

    def create(self, path: str, data: bytes) -> None:
        with self._script._request("create", path) as change:
            self._backend.create(path, change(data) if change else data)

    def list(self, prefix: str) -> list[ObjectInfo]:
        with self._script._request("list", prefix):
            found: list[ObjectInfo] = self._backend.list(prefix)
            return found

    def delete(self, path: str) -> None:
        with self._script._request("delete", path):
            self._backend.delete(path)

    def incomplete(self) -> Sequence[IncompleteUpload]:
        with self._script._request("list", ""):
            found: Sequence[IncompleteUpload] = self._backend.incomplete()
            return found

    def abort(self, upload: IncompleteUpload) -> None:
        with self._script._request("delete", upload.path):
            self._backend.abort(upload)

    def upload(self, source: IO[bytes], path: str, on_bytes: Callable[[int], None]) -> str:
        with self._script._request("upload", path) as change:
            digest: str = self._backend.upload(source, path, on_bytes)
            if change:
                self._backend.write(path, change(self._backend.read(path, MAX_RECORD_READ)))
            return digest

    def download(self, path: str, target: IO[bytes], size: int, on_bytes: Callable[[int], None]) -> str:
        with self._script._request("download", path) as change:
            if change is None:
                digest: str = self._backend.download(path, target, size, on_bytes)
                return digest
            data = change(self._backend.read(path, MAX_RECORD_READ))
            target.write(data)
            on_bytes(len(data))
            return xxhash.xxh3_128(data).hexdigest()


def _fits(kind: str, path: str, call: Call) -> bool:
    return kind in ("any", call.kind) and fnmatchcase(call.path, path)


def _raise(error: Exception) -> NoReturn:
    raise error


def _wait(until: threading.Event) -> None:
    until.wait()


def _crash() -> NoReturn:
    os._exit(CRASH_STATUS)


_CHANGES = {
    "os.link",
    "os.symlink",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.utime",
    "os.truncate",
}


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    point = CrashPoint._active
    if point is not None:
        point._hear(event, arguments)


def _changes_disk(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in _CHANGES
