"""A storage that fails on purpose, for tests of training scripts and of this package.

A call is one request, so a retry is one more call. `CrashPoint` kills a process between any two changes of its disk,
not only at a storage call; `FaultyDisk` is a disk that is full or read-only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import IO, Any, Literal, NamedTuple, NoReturn, get_args
from unittest import mock

from hf_cloudtrain.storage.backend import Backend, IncompleteUpload, ObjectInfo
from hf_cloudtrain.storage.client import MAX_RECORD_READ, Storage
from hf_cloudtrain.storage.digest import Digest
from hf_cloudtrain.testing.disk import crash_now

Kind = Literal["any", "read", "write", "create", "list", "delete", "copy", "upload", "download"]
"""The calls that a fault affects. `upload` and `download` move files; `read`, `write`, `create` move small records."""

Point = Literal[
    "attempt", "claim", "files", "arrival", "part", "commit", "pointer", "heartbeat", "steps",
    "newest", "manifest", "fetch", "retire",
]  # fmt: skip
"""A request by its purpose in the life of a checkpoint."""

POINTS: dict[str, tuple[Kind, str]] = {
    "attempt": ("create", ".cloudtrain/attempts/*"),
    "claim": ("create", ".cloudtrain/claims/*"),
    "files": ("upload", "checkpoint-*"),
    "arrival": ("list", "checkpoint-*"),
    "part": ("write", ".cloudtrain/parts/*"),
    "commit": ("create", ".cloudtrain/checkpoints/*"),
    "pointer": ("write", ".cloudtrain/[bl]?st.json"),
    "heartbeat": ("write", ".cloudtrain/progress/*"),
    "steps": ("write", ".cloudtrain/steps/*"),
    "newest": ("list", ".cloudtrain/checkpoints"),
    "manifest": ("read", ".cloudtrain/checkpoints/*"),
    "fetch": ("download", "checkpoint-*"),
    "retire": ("delete", ".cloudtrain/checkpoints/*"),
}
"""Kind of the request and glob of its path, for each `Point`: the attempt, a save (claim, files, arrival, part of one
host, commit, pointer), a restore (newest, manifest, fetch), and the deletion of a manifest."""

Lie = Literal["missing", "exists", "late", "size"]
"""A wrong answer of a storage."""

_EVER = sys.maxsize


class Call(NamedTuple):
    """One request that was made."""

    kind: str
    path: str


class FaultyStorage(Storage):
    """A Storage that records its requests, and whose requests fail as configured. Arguments as `Storage`.

    Each fault counts the matching requests from the moment it is added: `call=2` affects the second one, and `times` is
    the number of requests in a row that it affects. Bytes move through fsspec, never through a native client, so that
    each request is seen.

    Example:
        >>> storage = FaultyStorage("memory://runs/mrpc")
        >>> storage.fail("create", path="*/checkpoints/*")
        >>> Catalog(storage).commit(manifest)          # succeeds at the retry
        True
        >>> storage.count("create", "*/checkpoints/*")
        2
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        super().__init__(url, storage_options)
        self.calls: list[Call] = []
        """All requests so far, in order."""
        self._faults: list[_Fault] = []
        self._hung: list[threading.Event] = []
        self._lock = threading.Lock()

    def fail(
        self,
        kind: Kind | Point,
        error: Exception | None = None,
        *,
        call: int = 1,
        times: int = 1,
        path: str = "*",
    ) -> None:
        """The request is not made and raises an error.

        Args:
            error: the error of the client; None: a reset connection. Of the errors of this package, only a
                StorageUnavailableError is tried again.
            path: glob of the object's path below the run URL.
        """
        raised = error or ConnectionResetError("connection reset on purpose")
        self._add(_Fault(kind, path, call, times, before=lambda: _raise(raised)))

    def lose_answer(self, kind: Kind | Point, *, call: int = 1, times: int = 1, path: str = "*") -> None:
        """The request succeeds, and the connection breaks before the answer."""
        error = ConnectionResetError("answer lost on purpose")
        self._add(_Fault(kind, path, call, times, after=lambda: _raise(error)))

    def slow(
        self, kind: Kind | Point, seconds: float, *, call: int = 1, times: int = _EVER, path: str = "*"
    ) -> None:
        """The request waits before it is made."""
        self._add(_Fault(kind, path, call, times, before=lambda: time.sleep(seconds)))

    def hang(self, kind: Kind | Point, *, call: int = 1, times: int = 1, path: str = "*") -> None:
        """The request is not made and is never answered; `heal` breaks its connection."""
        until = threading.Event()
        self._hung.append(until)
        self._add(_Fault(kind, path, call, times, before=lambda: _hang(until)))

    def hold(
        self,
        kind: Kind | Point,
        until: threading.Event,
        *,
        call: int = 1,
        times: int = _EVER,
        path: str = "*",
    ) -> None:
        """The request waits for the event before it is made."""
        self._add(_Fault(kind, path, call, times, before=until.wait))

    def corrupt(
        self,
        kind: Literal["read", "write", "create", "upload", "download"],
        change: Callable[[bytes], bytes] | None = None,
        *,
        call: int = 1,
        times: int = 1,
        path: str = "*",
    ) -> None:
        """The bytes change in transit, and neither side notices.

        Args:
            change: turns the bytes that were sent into those that arrive; None flips one bit in the middle.
        """
        self._add(_Fault(kind, path, call, times, change=change or flip_bit))

    def lie(
        self, what: Lie, kind: Kind | Point = "any", *, call: int = 1, times: int = 1, path: str = "*"
    ) -> None:
        """The storage gives a wrong answer.

        Args:
            what: `missing`: "not found" although the object exists, and empty listings. `exists`: a create is refused
                although no object exists. `late`: listings show only the objects of now. `size`: listings show one
                byte less.
        """
        if what == "late":
            before = {info.path for info in self._connected()._backend.list("")}
            change: Any = lambda found: [info for info in found if info.path in before]  # noqa: E731
        elif what == "size":
            change = lambda found: [dataclasses.replace(info, size=info.size - 1) for info in found]  # noqa: E731
        else:
            change = lambda found: []  # noqa: E731
        self._add(_Fault(kind, path, call, times, lie=what, change_listing=change))

    def crash(self, kind: Kind | Point, *, call: int = 1, after: bool = False, path: str = "*") -> None:
        """This process ends before the request, or `after` it, without clean-up, as SIGKILL does."""
        point: dict[str, Any] = {"after" if after else "before": crash_now}
        self._add(_Fault(kind, path, call, 1, **point))

    def heal(self) -> None:
        """Remove all faults and break the connections that hang; `calls` stays as it is."""
        with self._lock:
            self._faults.clear()
            hung, self._hung = self._hung, []
        for event in hung:
            event.set()

    def count(self, kind: Kind | Point = "any", path: str = "*") -> int:
        """The number of matching requests so far."""
        plain, where = _resolved(kind, path)
        with self._lock:
            return sum(_fits(plain, where, call) for call in self.calls)

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
        # Within `everywhere` it is wrapped already, and each request must count once.
        return backend if isinstance(backend, _FaultyBackend) else self._wrapped(self, backend)

    def _wrapped(self, storage: Storage, backend: Any) -> _FaultyBackend:
        storage._transfer = None
        return _FaultyBackend(backend, self)

    def _add(self, fault: _Fault) -> None:
        fault.kind, fault.path = _resolved(fault.kind, fault.path)
        with self._lock:
            self._faults.append(fault)

    @contextlib.contextmanager
    def _request(self, kind: str, path: str) -> Iterator[Callable[[Any], Any] | None]:
        """Wraps one request; yields the change of its bytes or of its listing, if there is one."""
        call = Call(kind, path)
        with self._lock:
            self.calls.append(call)
            due = [fault for fault in self._faults if fault.is_due(call)]
        for fault in due:
            fault.before()
            if (fault.lie, kind) == ("exists", "create"):
                raise FileExistsError(f"'{path}' exists (wrong on purpose)")
            if fault.lie == "missing" and kind in ("read", "download"):
                raise FileNotFoundError(f"'{path}' does not exist (wrong on purpose)")
        changes = (fault.change_listing if kind == "list" else fault.change for fault in due)
        yield next((change for change in changes if change), None)
        for fault in due:
            fault.after()


def flip_bit(data: bytes) -> bytes:
    """The same bytes with one bit flipped in the middle; empty bytes become one zero byte."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else b"\0"


@dataclass
class _Fault:
    kind: str
    path: str
    first: int
    times: int
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    change: Callable[[bytes], bytes] | None = None
    lie: Lie | None = None
    change_listing: Callable[[list[ObjectInfo]], list[ObjectInfo]] | None = None
    seen: int = 0

    def is_due(self, call: Call) -> bool:
        if not _fits(self.kind, self.path, call):
            return False
        self.seen += 1
        return self.first <= self.seen < self.first + self.times


class _FaultyBackend:
    """Stands between a Storage and its back end, and applies the faults of the script to each request."""

    def __init__(self, backend: Backend, script: FaultyStorage) -> None:
        self._backend = backend
        self._script = script

    def read(self, path: str, limit: int) -> bytes:
        with self._script._request("read", path) as change:
            data = self._backend.read(path, limit)
            return change(data) if change else data

    def write(self, path: str, data: bytes, page: str | None = None) -> None:
        with self._script._request("write", path) as change:
            self._backend.write(path, change(data) if change else data, page)

    def create(self, path: str, data: bytes) -> None:
        with self._script._request("create", path) as change:
            self._backend.create(path, change(data) if change else data)

    def list(self, prefix: str) -> list[ObjectInfo]:
        with self._script._request("list", prefix) as change:
            found = self._backend.list(prefix)
            return change(found) if change else found

    def delete(self, path: str) -> None:
        with self._script._request("delete", path):
            self._backend.delete(path)

    def copy(self, source: str, path: str) -> None:
        with self._script._request("copy", path):
            self._backend.copy(source, path)

    def incomplete(self) -> Sequence[IncompleteUpload]:
        with self._script._request("list", ""):
            return self._backend.incomplete()

    def abort(self, upload: IncompleteUpload) -> None:
        with self._script._request("delete", upload.path):
            self._backend.abort(upload)

    def upload(self, source: IO[bytes], path: str, on_bytes: Callable[[int], None]) -> str:
        with self._script._request("upload", path) as change:
            digest = self._backend.upload(source, path, on_bytes)
            if change:
                self._backend.write(path, change(self._backend.read(path, MAX_RECORD_READ)))
            return digest

    def download(self, path: str, target: IO[bytes], size: int, on_bytes: Callable[[int], None]) -> str:
        with self._script._request("download", path) as change:
            if change is None:
                return self._backend.download(path, target, size, on_bytes)
            data = change(self._backend.read(path, MAX_RECORD_READ))
            target.write(data)
            on_bytes(len(data))
            received = Digest()
            received.update(data)
            return str(received)


def _fits(kind: str, path: str, call: Call) -> bool:
    return kind in ("any", call.kind) and fnmatchcase(call.path, path)


def _raise(error: Exception) -> NoReturn:
    raise error


def _hang(until: threading.Event) -> None:
    until.wait()
    raise ConnectionResetError("the connection of a request that hung was closed")


def _resolved(kind: str, path: str) -> tuple[str, str]:
    """Kind and path of a request, which may be given by the name of a point."""
    if kind in POINTS:
        kind, where = POINTS[kind]
        return kind, where if path == "*" else path
    if kind not in get_args(Kind):
        raise ValueError(f"Unknown request {kind!r}. Use one of: {', '.join((*get_args(Kind), *POINTS))}.")
    return kind, path
