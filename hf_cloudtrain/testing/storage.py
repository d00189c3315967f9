"""Faults on purpose, for tests of training scripts and of this package: docs/testing.md shows how.

    storage = FaultyStorage("file:///tmp/run")
    storage.fail("upload", call=2)                      # the second upload is reset; the client tries again
    storage.fail("commit")                              # so is the write of a manifest: requests have names, see POINTS
    storage.lose_answer("create")                       # it is done, but the answer never comes
    storage.slow("upload", seconds=0.5)                 # each takes so much longer
    storage.hang("read")                                # no answer, ever
    storage.hold("upload", until=event)                 # nothing moves before event.set()
    storage.corrupt("download", path="*.safetensors")   # one bit flips on the way
    storage.lie("missing", "read")                      # "not found", though it is there; also: exists, late, size
    storage.crash("commit", after=True)                 # the process ends as if by SIGKILL
    with storage.everywhere():
        train()

A call is one request as the client makes it, so a retry is another call. `CrashPoint` kills a process between any two
changes of its disk, and not only at a storage call; `FaultyDisk` is a disk that fills up or can only be read.
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

from hf_cloudtrain.storage.backend import IncompleteUpload, ObjectInfo
from hf_cloudtrain.storage.client import MAX_RECORD_READ, Storage
from hf_cloudtrain.storage.digest import Digest
from hf_cloudtrain.testing.disk import crash_now

Kind = Literal["any", "read", "write", "create", "list", "delete", "copy", "upload", "download"]
"""Which calls a fault is about. `upload` and `download` move files; `read`, `write` and `create` small records."""

Point = Literal[
    "attempt", "claim", "files", "arrival", "part", "commit", "pointer", "heartbeat", "steps",
    "newest", "manifest", "fetch", "retire",
]  # fmt: skip
"""A request by its place in the life of a checkpoint."""

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
"""Where a `Point` is: kind of the request, and glob of its path. Attempt, then save (claim, files, arrival, part of one
host, commit, pointer), then restore (newest, manifest, fetch), and the delete of a manifest."""

Lie = Literal["missing", "exists", "late", "size"]
"""What a storage says that is not so."""

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
        """The request is not made and raises instead.

        Args:
            error: what the client raises; None is a reset connection, which is tried again. A StorageError that is
                no StorageUnavailableError is not.
            path: glob of the object's path below the run URL.
        """
        raised = error or ConnectionResetError("connection reset on purpose")
        self._add(_Fault(kind, path, call, times, before=lambda: _raise(raised)))

    def lose_answer(self, kind: Kind | Point, *, call: int = 1, times: int = 1, path: str = "*") -> None:
        """The request is made and succeeds, and the connection breaks before the answer."""
        error = ConnectionResetError("answer lost on purpose")
        self._add(_Fault(kind, path, call, times, after=lambda: _raise(error)))

    def slow(
        self, kind: Kind | Point, seconds: float, *, call: int = 1, times: int = _EVER, path: str = "*"
    ) -> None:
        """The request waits for so long before it is made."""
        self._add(_Fault(kind, path, call, times, before=lambda: time.sleep(seconds)))

    def hang(self, kind: Kind | Point, *, call: int = 1, times: int = 1, path: str = "*") -> None:
        """The request is not made and never answered; `heal` breaks its connection."""
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

    def lie(
        self, what: Lie, kind: Kind | Point = "any", *, call: int = 1, times: int = 1, path: str = "*"
    ) -> None:
        """The storage answers what is not so.

        Args:
            what: `missing`: "not found" for what is there, and listings are empty. `exists`: a create is refused although
                nothing is there. `late`: a listing as it was when this was told. `size`: in a listing, one byte less.
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
        """This process ends at the request, without clean-up, as by SIGKILL; with `after`, when it is done."""
        point: dict[str, Any] = {"after" if after else "before": crash_now}
        self._add(_Fault(kind, path, call, 1, **point))

    def heal(self) -> None:
        """Forget all faults, and break what hangs; `calls` stay."""
        with self._lock:
            self._faults.clear()
            hung, self._hung = self._hung, []
        for event in hung:
            event.set()

    def count(self, kind: Kind | Point = "any", path: str = "*") -> int:
        """How many requests were made that fit."""
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
        # Within `everywhere` it is wrapped already, and each request counts once.
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
        """Around one request; gives how its bytes change, or its listing, if they do."""
        call = Call(kind, path)
        with self._lock:
            self.calls.append(call)
            due = [fault for fault in self._faults if fault.is_due(call)]
        for fault in due:
            fault.before()
            if (fault.lie, kind) == ("exists", "create"):
                raise FileExistsError(f"'{path}' exists, as is said on purpose")
            if fault.lie == "missing" and kind in ("read", "download"):
                raise FileNotFoundError(f"'{path}' does not exist, as is said on purpose")
        changes = (fault.change_listing if kind == "list" else fault.change for fault in due)
        yield next((change for change in changes if change), None)
        for fault in due:
            fault.after()


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
    lie: Lie | None = None
    change_listing: Callable[[list[ObjectInfo]], list[ObjectInfo]] | None = None
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
        with self._script._request("list", prefix) as change:
            found: list[ObjectInfo] = self._backend.list(prefix)
            return change(found) if change else found

    def delete(self, path: str) -> None:
        with self._script._request("delete", path):
            self._backend.delete(path)

    def copy(self, source: str, path: str) -> None:
        with self._script._request("copy", path):
            self._backend.copy(source, path)

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
            received = Digest()
            received.update(data)
            return str(received)


def _fits(kind: str, path: str, call: Call) -> bool:
    return kind in ("any", call.kind) and fnmatchcase(call.path, path)


def _raise(error: Exception) -> NoReturn:
    raise error


def _wait(until: threading.Event) -> None:
    until.wait()


def _hang(until: threading.Event) -> None:
    until.wait()
    raise ConnectionResetError("a request that hung was broken off")


def _resolved(kind: str, path: str) -> tuple[str, str]:
    """Kind and path of a request that may be told by the name of its point."""
    if kind in POINTS:
        kind, where = POINTS[kind]
        return kind, where if path == "*" else path
    if kind not in get_args(Kind):
        raise ValueError(
            f"{kind!r} is no kind of request. There are: {', '.join((*get_args(Kind), *POINTS))}."
        )
    return kind, path
