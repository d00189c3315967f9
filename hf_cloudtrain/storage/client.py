"""The storage location of one run: the only way to it for all other rooms.

fsspec names things: URLs, options, listings, small records, every protocol it knows. A native client moves the bytes of
large files where there is one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from hf_cloudtrain.errors import ObjectNotFoundError, ObjectTruncatedError, StorageError
from hf_cloudtrain.runtime.redaction import redact, secrets_in, secrets_of_environment
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.backend import Backend, IncompleteUpload, ObjectInfo
from hf_cloudtrain.storage.failures import explain
from hf_cloudtrain.storage.fsspec_backend import connect
from hf_cloudtrain.storage.names import META
from hf_cloudtrain.storage.native import NativeTransfer, native_transfer
from hf_cloudtrain.storage.retries import Retries
from hf_cloudtrain.storage.silence import SILENT_RATE, ByteCount, answer_unless_silent
from hf_cloudtrain.storage.urls import normal_url, protocol_of

T = TypeVar("T")

READS_AT_ONCE = 8
"""Small records that callers read in parallel: they wait for answers, not for bandwidth."""

DELETES_AT_ONCE = 8

MAX_RECORD_READ = 64 * 2**20
"""Bytes of the largest record that is read into memory."""

PROBES = f"{META}/probes"
"""Folder of the small objects that `check` writes; small, because `check` lists it."""

LISTED_AFTER = (1.0, 4.0)
"""Seconds before a listing is made again."""


class Storage:
    """The storage location of one run. Paths are relative to its URL and '/'-separated; any thread may call.

    Args:
        url: any fsspec URL or a folder.
        storage_options: the arguments of fsspec's file system for this protocol.

    Raises:
        ConfigurationError: the URL cannot be used.

    Example:
        >>> storage = Storage("s3://bucket/runs/mrpc")
        >>> storage.check()
        >>> storage.create(".cloudtrain/attempts/000001.json", b"{}")
        True
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None) -> None:
        self._full_url = normal_url(url)
        self.url = redact(self._full_url)
        self.exclusive: bool | None = None
        """Whether the storage honours exclusive create; None before `check`."""
        self._options = dict(storage_options or {})
        self._secrets = (*secrets_in(self._full_url, self._options), *secrets_of_environment())
        self._protocol = protocol_of(self._full_url)
        self._pid = os.getpid()
        self._backend: Backend | None = None
        self._transfer: NativeTransfer | None = None
        self._retries = Retries()

    @property
    def connection(self) -> tuple[str, dict[str, Any]]:
        """URL and options, secrets included: for a process that opens the same storage."""
        return self._full_url, self._options

    def check(self) -> None:
        """Write, create twice, list and delete a small object, which each client reads as the other wrote it; sets `exclusive`.

        Raises:
            StorageError: says what to do, for example about a missing bucket, missing permission or a wrong region.
            MissingExtraError: the packages for this protocol are not installed.
        """
        path = f"{PROBES}/probe-{secrets.token_hex(8)}"
        written, created, sent = (secrets.token_bytes(32) for _ in range(3))
        self._call(f"write to {self.url!r}", lambda backend: backend.write(path, written))
        self.exclusive = self._call(
            f"write to {self.url!r}", lambda backend: _honours_create(backend, path, created)
        )
        self._check_same(
            lambda: self._downloaded(path, len(written)),
            (written,) if self.exclusive else (written, created),
        )
        self._send(path, sent)
        self._check_same(lambda: self.read(path), (sent,))
        self._check_listed(ObjectInfo(path, len(sent)))
        self.delete([path])

    def read(self, path: str, max_bytes: int = MAX_RECORD_READ) -> bytes:
        """The bytes of one object. Raises ObjectNotFoundError; StorageError where it is larger than `max_bytes`."""
        data = self._call(f"read {self._name(path)}", lambda backend: backend.read(path, max_bytes + 1))
        if len(data) > max_bytes:
            raise StorageError(
                f"{self._name(path)} is larger than {max_bytes} bytes, the limit for a record."
            )
        return data

    def write(self, path: str, data: bytes, *, page: str | None = None) -> None:
        """Store an object, replacing any other.

        Args:
            page: the content type of an object for browsers, which ask for it again each time.
        """
        more = () if page is None else (page,)
        self._call(f"write {self._name(path)}", lambda backend: backend.write(path, data, *more))

    def create(self, path: str, data: bytes) -> bool:
        """Store an object only if none exists; returns False where another writer's exists.

        Returns True also where exactly these bytes exist: they are from our own first try, whose answer was lost. So
        the data of two writers must differ, by a nonce.
        """

        def create(backend: Backend) -> bool:
            if self.exclusive is False:
                # Best effort: absent before the write, and ours after it.
                existing = _read_or_none(backend, path, len(data) + 1)
                if existing is not None:
                    return existing == data
                backend.write(path, data)
                # rclone shows no object at all while another process writes it.
                return _read_or_none(backend, path, len(data) + 1) == data
            try:
                backend.create(path, data)
            except FileExistsError:
                existing = _read_or_none(backend, path, len(data) + 1)
                if existing is None:  # deleted since, or one of the two answers is wrong: try again
                    raise ConnectionError(
                        "the storage says both that it exists and that it does not"
                    ) from None
                return existing == data
            return True

        return self._call(f"create {self._name(path)}", create)

    def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects below a folder, sorted by path."""
        return sorted(
            self._call(f"list {self._name(prefix)}", lambda backend: backend.list(prefix)),
            key=lambda info: info.path,
        )

    def delete(self, paths: Iterable[str]) -> None:
        """Delete objects, except those that do not exist."""
        in_threads(self._delete_one, (list(paths), DELETES_AT_ONCE))

    def copy(self, source: str, path: str, size: int) -> None:
        """Copy an object of `size` bytes within the storage.

        Raises:
            ObjectNotFoundError: the source does not exist. StorageError: this storage cannot copy; upload the bytes.
        """

        def copy(backend: Backend, count: ByteCount) -> None:
            count.patience += size / SILENT_RATE
            backend.copy(source, path)

        self._counted(f"copy {self._name(source)} to {self._name(path)}", copy)

    def incomplete(self) -> Sequence[IncompleteUpload]:
        """Unfinished uploads below the URL, sorted by path; on S3 and local disks only.

        Azure, and GCS for uploads by gcsfs, do not list them, and delete them after a week.
        """
        found = self._call(f"list incomplete uploads of {self.url!r}", lambda backend: backend.incomplete())
        return sorted(found, key=lambda upload: upload.path)

    def abort(self, uploads: Iterable[IncompleteUpload]) -> None:
        """Abort uploads, except those that have ended, and free their space."""
        in_threads(self._abort_one, (list(uploads), DELETES_AT_ONCE))

    def upload(self, file: str, path: str, *, on_bytes: Callable[[int], None] | None = None) -> str:
        """Send a local file; returns the digest of the bytes that were sent.

        Args:
            on_bytes: receives the number of bytes of each piece; a negative number subtracts a failed try.
        """
        # Opened here too, so that a missing local file is not reported as a missing object.
        with open(file, "rb", buffering=0) as whole:
            size = os.fstat(whole.fileno()).st_size

            def send(backend: Backend, count: ByteCount) -> str:
                # Opened again for each try: one that was given up may still read from its own.
                with open(file, "rb", buffering=0) as source:
                    transfer = self._transfer
                    if transfer is not None and NativeTransfer.can_name(path):
                        return transfer.upload(source, size, path, count.add)
                    count.patience += size / SILENT_RATE
                    return backend.upload(source, path, count.add)

            return self._counted(f"upload {self._name(path)}", send, on_bytes)

    def download(
        self, path: str, file: str, size: int, *, on_bytes: Callable[[int], None] | None = None
    ) -> str:
        """Fetch an object of `size` bytes into a local file; returns the digest of the bytes that were written.

        Raises:
            ObjectNotFoundError: it does not exist. ObjectTruncatedError: it is shorter.
        """
        # Created here, so that a missing local folder is not reported as a missing object.
        with open(file, "wb"):
            pass

        def fetch(backend: Backend, count: ByteCount) -> str:
            # A new file for each try: one that was given up may still write into its own.
            if os.path.isfile(file):
                os.unlink(file)
            with open(file, "w+b", buffering=0) as target:
                transfer = self._transfer
                if transfer is not None and NativeTransfer.can_name(path):
                    value = transfer.download(path, target, size, count.add)
                else:
                    value = backend.download(path, target, size, count.add)
            if count.total < size:  # a larger one has a different digest
                raise ObjectTruncatedError(f"{self._name(path)} has {count.total} bytes, not {size}.")
            return value

        return self._counted(f"download {self._name(path)}", fetch, on_bytes)

    def close(self) -> None:
        """Drop the connections; the next call makes new ones."""
        self._backend = None
        self._transfer = None

    def _downloaded(self, path: str, size: int) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            target = os.path.join(folder, "got")
            self.download(path, target, size)
            with open(target, "rb") as file:
                return file.read()

    def _send(self, path: str, data: bytes) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            self.upload(file.name, path)

    def _check_same(self, read: Callable[[], bytes], expected: tuple[bytes, ...]) -> None:
        """Whether one client finds what the other wrote."""
        try:
            if read() in expected:
                return
        except ObjectNotFoundError as error:
            raise StorageError(f"An object was written to {self.url!r}, and then: {error}") from None
        raise StorageError(
            f"{self.url!r} returned different bytes from those written (read-after-write check failed). Check the storage."
        )

    def _check_listed(self, written: ObjectInfo) -> None:
        """What exists is decided by listings. A store may show an object late, but not only after seconds."""
        for pause in (0.0, *LISTED_AFTER):
            if pause:
                time.sleep(pause)
            if written in self.list(PROBES):
                return
        raise StorageError(
            f"{self.url!r} does not list an object that was written there, so no checkpoint would ever be found. Check the "
            "URL, and the permission to list."
        )

    def _name(self, path: str) -> str:
        return repr(f"{self.url.rstrip('/')}/{path}")

    def _delete_one(self, path: str) -> None:
        with contextlib.suppress(ObjectNotFoundError):
            self._call(f"delete {self._name(path)}", lambda backend: backend.delete(path))

    def _abort_one(self, upload: IncompleteUpload) -> None:
        with contextlib.suppress(ObjectNotFoundError):
            self._call(
                f"abort the upload of {self._name(upload.path)}", lambda backend: backend.abort(upload)
            )

    def _connected(self) -> Backend:
        backend = self._backend
        if backend is None or self._pid != os.getpid():
            self._pid = os.getpid()
            backend, root = connect(self._full_url, self._protocol, self._options)
            self._transfer = native_transfer(self._protocol, root, self._options)
            self._backend = backend
        return backend

    def _call(self, what: str, call: Callable[[Backend], T]) -> T:
        return self._counted(what, lambda backend, _: call(backend))

    def _counted(
        self,
        what: str,
        call: Callable[[Backend, ByteCount], T],
        on_bytes: Callable[[int], None] | None = None,
    ) -> T:
        """Make one call with its retries; every error leaves as one of ours."""
        return self._retries.run(
            lambda: answer_unless_silent(what, lambda count: call(self._connected(), count), on_bytes),
            lambda error: explain(error, what, self._protocol, self._secrets),
            self.close,
        )


def _honours_create(backend: Backend, path: str, data: bytes) -> bool:
    """Whether creating an object that exists is refused. `path` exists; else it has `data` then."""
    try:
        backend.create(path, data)
    except FileExistsError:
        return True
    except (TypeError, NotImplementedError, ValueError):
        return False
    return False


def _read_or_none(backend: Backend, path: str, limit: int) -> bytes | None:
    try:
        return backend.read(path, limit)
    except FileNotFoundError:
        return None
