"""One run's place on storage: every call to fsspec or to a native client, and the only retries of ours.

fsspec names things: URLs, options, listing, small records, every protocol it knows. Bytes of files go through a
native client where there is one (`native.py`); `backends.py` holds the calls themselves.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from hf_cloudtrain.backends import EXTRAS, Backend, ObjectInfo, connect, local_path, missing_extra
from hf_cloudtrain.errors import (
    CloudTrainError,
    ConfigurationError,
    ObjectNotFoundError,
    ObjectTruncatedError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
)
from hf_cloudtrain.manifest import DIGEST_ALGORITHM, META
from hf_cloudtrain.native import NativeTransfer, native_transfer
from hf_cloudtrain.process import in_threads
from hf_cloudtrain.redaction import has_user_part, redact, secrets_in, secrets_of_environment

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Its own generator: the training's random numbers must not depend on the weather of the network.
_jitter = random.Random()

RETRY_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds before each new try, jittered. The clients retry inside themselves too; this bridges what outlasts them."""

DELETES_AT_ONCE = 8

MAX_RECORD_READ = 64 * 2**20
"""Bytes of the largest record that is read into memory."""


class Storage:
    """One run's place on storage. Paths are relative to the URL and '/'-separated; calls may come from any thread.

    Args:
        url: any fsspec URL or a plain path.
        storage_options: what fsspec's file system for this protocol takes.

    Raises:
        ConfigurationError: the URL cannot be used; MissingExtraError where a package is missing.

    Example:
        >>> storage = Storage("s3://bucket/runs/mrpc")
        >>> storage.check()
        >>> storage.create(".cloudtrain/attempts/000001.json", b"{}")
        True
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        self.url = shown_url(url)
        self.exclusive: bool | None = None
        """Whether exclusive create is honoured; None before `check`."""
        self._given_url = url
        self._options = dict(storage_options or {})
        self._secrets = (*secrets_in(url, self._options), *secrets_of_environment())
        self._protocol = _protocol(url)
        self._pid = os.getpid()
        self._backend: Backend | None = None
        self._transfer: NativeTransfer | None = None

    def check(self) -> None:
        """Write, read, create twice and delete a small object, through every way that bytes will take.

        Sets `exclusive`. Raises a StorageError that says what to do: no bucket, no permission, another region.
        """
        path = f"{META}/probe-{secrets.token_hex(8)}"
        data = secrets.token_bytes(32)
        self._call(f"write to {self.url!r}", lambda backend: backend.write(path, data))
        self.exclusive = self._call(f"write to {self.url!r}", lambda backend: _honours_create(backend, path))
        if self.read(path) != data and self.exclusive:
            raise StorageError(f"{self.url!r} gives back other bytes than were written to it.")
        with tempfile.TemporaryDirectory() as folder:
            source, target = os.path.join(folder, "sent"), os.path.join(folder, "got")
            with open(source, "wb") as file:
                file.write(data)
            digest = self.upload(source, path)
            if self.download(path, target, len(data)) != digest:
                raise StorageError(f"{self.url!r} gives back other bytes than were sent to it.")
        self.delete([path])

    def read(self, path: str, max_bytes: int = MAX_RECORD_READ) -> bytes:
        """The bytes of one object. Raises ObjectNotFoundError; StorageError where it is larger than `max_bytes`."""
        data = self._call(f"read {self._name(path)}", lambda backend: backend.read(path, max_bytes + 1))
        if len(data) > max_bytes:
            raise StorageError(f"{self._name(path)} is larger than the {max_bytes} bytes that are accepted.")
        return data

    def write(self, path: str, data: bytes) -> None:
        """Store an object, whatever was there."""
        self._call(f"write {self._name(path)}", lambda backend: backend.write(path, data))

    def create(self, path: str, data: bytes) -> bool:
        """Store an object only if there is none; False where there is somebody else's.

        True also where exactly these bytes are there: our own first try, whose answer was lost. So the data of two
        writers must differ, by a nonce.
        """

        def create(backend: Backend) -> bool:
            if self.exclusive is False:
                # Best effort: nobody there before, and ours there after.
                existing = _read_or_none(backend, path, len(data) + 1)
                if existing is not None:
                    return existing == data
                backend.write(path, data)
                return backend.read(path, len(data) + 1) == data
            try:
                backend.create(path, data)
            except FileExistsError:
                return backend.read(path, len(data) + 1) == data
            return True

        return self._call(f"create {self._name(path)}", create)

    def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects below a folder, sorted by path; empty where there is none."""
        return sorted(
            self._call(f"list {self._name(prefix)}", lambda backend: backend.list(prefix)),
            key=lambda info: info.path,
        )

    def delete(self, paths: Iterable[str]) -> None:
        """Delete objects; one that is not there is fine."""
        in_threads(self._delete_one, (list(paths), DELETES_AT_ONCE))

    def upload(self, file: str, path: str, *, on_bytes: Callable[[int], None] | None = None) -> str:
        """Send a local file; returns the digest (`xxh3-128:…`) of the bytes that were sent.

        Args:
            on_bytes: hears how many bytes are gone, in pieces; a negative number takes back a failed try.
        """
        # Opened here, not below: a local file that is missing is no object that is missing.
        with open(file, "rb", buffering=0) as source:
            size = os.fstat(source.fileno()).st_size

            def send(backend: Backend) -> str:
                source.seek(0)
                with _Count(on_bytes) as count:
                    if self._transfer is not None and NativeTransfer.can_name(path):
                        return self._transfer.upload(source, size, path, count.add)
                    return backend.upload(source, path, count.add)

            return f"{DIGEST_ALGORITHM}:{self._call(f'upload {self._name(path)}', send)}"

    def download(
        self, path: str, file: str, size: int, *, on_bytes: Callable[[int], None] | None = None
    ) -> str:
        """Fetch an object of `size` bytes into a local file; returns the digest of the bytes that were written.

        Raises:
            ObjectNotFoundError: it is not there. ObjectTruncatedError: it is shorter.
        """
        with open(file, "w+b", buffering=0) as target:

            def fetch(backend: Backend) -> str:
                target.seek(0)
                with _Count(on_bytes) as count:
                    if self._transfer is not None and NativeTransfer.can_name(path):
                        value = self._transfer.download(path, target, size, count.add)
                    else:
                        value = backend.download(path, target, size, count.add)
                    if count.total < size:  # one that is larger has another digest
                        raise ObjectTruncatedError(f"{self._name(path)} has {count.total} bytes, not {size}.")
                    return value

            return f"{DIGEST_ALGORITHM}:{self._call(f'download {self._name(path)}', fetch)}"

    def close(self) -> None:
        """Forget the connections; the next call makes new ones."""
        self._backend = None
        self._transfer = None

    def _name(self, path: str) -> str:
        return repr(f"{self.url.rstrip('/')}/{path}")

    def _delete_one(self, path: str) -> None:
        with contextlib.suppress(ObjectNotFoundError):
            self._call(f"delete {self._name(path)}", lambda backend: backend.delete(path))

    def _connected(self) -> Backend:
        if self._backend is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._backend, root = connect(self._given_url, self._protocol, self._options)
            self._transfer = native_transfer(self._protocol, root, self._options)
        return self._backend

    def _call(self, what: str, call: Callable[[Backend], T]) -> T:
        """Make one call, again where the failure may pass; every error leaves here as one of ours."""
        for pause in (*RETRY_PAUSES, None):
            try:
                return call(self._connected())
            except Exception as error:  # noqa: BLE001 - every client has its own tree of errors
                ours = self._translate(error, what)
                if pause is None or not isinstance(ours, StorageUnavailableError):
                    # A traceback would show what was taken out of the message.
                    raise ours from (error if str(error) == self._redact(str(error)) else None)
                logger.debug("%s; trying again in about %s s", ours, pause)
                time.sleep(pause * _jitter.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    def _translate(self, error: Exception, what: str) -> CloudTrainError:
        if isinstance(error, CloudTrainError):
            return error
        said = (
            str(error).partition("\n\nDebug source:")[0].strip()
        )  # obstore appends a dump of its own objects
        reason = self._redact(f"{type(error).__name__}: {said}")[:500]
        names = {kind.__name__ for kind in type(error).__mro__}
        if _elsewhere(reason):
            return StorageError(
                f"Could not {what}: the bucket is in another region ({reason}). Set AWS_REGION, or pass "
                "storage_options={'client_kwargs': {'region_name': …}}."
            )
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError(
                error.errno, f"Could not {what}: no space is left on the disk. Free some and go on."
            )
        if isinstance(error, FileNotFoundError) or names & {"NotFoundError", "ResourceNotFoundError"}:
            return ObjectNotFoundError(
                f"Could not {what}: it does not exist ({reason}). {_bucket_hint(reason)}"
            )
        if _BEYOND_END.search(reason):
            return ObjectTruncatedError(f"Could not {what}: it is shorter than expected ({reason}).")
        if isinstance(error, PermissionError) or names & _REFUSED or _REFUSED_TEXT.search(reason):
            return StoragePermissionError(
                f"Could not {what}: the storage refused it ({reason}). Check the credentials and what they allow."
            )
        if isinstance(error, ImportError):
            return missing_extra(self._protocol, reason)
        if (
            isinstance(error, (TypeError, NotImplementedError, NotADirectoryError, IsADirectoryError))
            or getattr(error, "errno", None) in (errno.EROFS, errno.ENAMETOOLONG)
            or names & {"ProfileNotFound", "ConfigParseError", "PartialCredentialsError"}
        ):
            return StorageError(f"Could not {what} ({reason}).")
        return StorageUnavailableError(f"Could not {what} ({reason}). Check the network and the endpoint.")

    def _redact(self, text: str) -> str:
        return redact(text, self._secrets)


def shown_url(url: str) -> str:
    """The URL as it may be shown and stored: normalised, without credentials."""
    if not isinstance(url, str) or not url.strip():
        raise ConfigurationError(
            f"{url!r} is no run URL. Use one such as 's3://bucket/runs/mrpc' or a folder."
        )
    scheme, separator, _ = url.partition("://")
    if not separator:
        return local_path(url)
    if scheme in ("file", "local"):
        return f"file://{local_path(url)}"
    return redact(url.rstrip("/"))


_REFUSED = {
    "PermissionDeniedError",
    "UnauthenticatedError",
    "NoCredentialsError",
    "ClientAuthenticationError",
}
_BEYOND_END = re.compile(
    r"\b416\b|InvalidRange|RangeNotSatisfiable|not satisfiable|range (?:started|starting) at|EOFError",
    re.IGNORECASE,
)
_REFUSED_TEXT = re.compile(
    r"\b(?:403|401|Forbidden|AccessDenied|AuthorizationFailure|AuthenticationFailed|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|"
    r"Unable to locate credentials)\b"
)


def _protocol(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    if not separator or scheme in ("file", "local"):
        return "file"
    if has_user_part(url) and scheme in EXTRAS:
        raise ConfigurationError(
            f"The run URL {shown_url(url)!r} carries credentials. Take them out and use the environment, a profile or "
            "storage_options: URLs end up in logs."
        )
    return scheme


def _honours_create(backend: Backend, path: str) -> bool:
    """Whether creating what exists is refused. `path` exists."""
    try:
        backend.create(path, b"second")
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


class _Count:
    """Bytes of one try, so that a failed one can be taken back."""

    def __init__(self, on_bytes: Callable[[int], None] | None) -> None:
        self.total = 0
        self._on_bytes = on_bytes

    def __enter__(self) -> _Count:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.add(-self.total)

    def add(self, count: int) -> None:
        self.total += count
        if self._on_bytes is not None:
            self._on_bytes(count)


def _elsewhere(reason: str) -> bool:
    return (
        re.search(
            r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint|\b301\b|configured region",
            reason,
        )
        is not None
    )


def _bucket_hint(reason: str) -> str:
    return "Create the bucket, or correct the URL." if re.search("ucket|ontainer", reason) else ""
