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
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from hf_cloudtrain.errors import (
    CloudTrainError,
    ConfigurationError,
    ObjectNotFoundError,
    ObjectTruncatedError,
    StorageError,
    StoragePermissionError,
    StorageUnavailableError,
)
from hf_cloudtrain.runtime.redaction import has_user_part, redact, secrets_in, secrets_of_environment
from hf_cloudtrain.runtime.threads import answer_in_time, in_threads
from hf_cloudtrain.storage.backends import (
    EXTRAS,
    Backend,
    IncompleteUpload,
    ObjectInfo,
    connect,
    local_path,
    missing_extra,
)
from hf_cloudtrain.storage.names import DIGEST_ALGORITHM, META
from hf_cloudtrain.storage.native import NativeTransfer, native_transfer

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Its own generator: the training's random numbers must not depend on the weather of the network.
_jitter = random.Random()

RETRY_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds before each new try, jittered. The clients retry inside themselves too; this bridges what outlasts them."""

LONGEST_PAUSE = 60.0
"""Seconds that a storage may ask us to wait (`Retry-After`): a mistaken date must not cost the night."""

SILENCE = 600.0
"""Seconds without a byte or an answer after which a request is given up: a native client, which has timeouts of its
own, ends by itself within 8 minutes (5 for a request, and no new try after 3); other clients may wait for ever."""

SILENT_RATE = 1e6
"""Bytes a second: clients of fsspec may take a whole file before they send it, and say nothing while they do."""

SAY_AFTER = 60.0
"""Seconds of silence after which it is said that somebody waits."""

DELETES_AT_ONCE = 8
READS_AT_ONCE = 8
"""Small records read at once: they wait for answers, not for bandwidth."""

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
        self._answered = False
        """Whether it ever did: what is refused later is refused because credentials have expired."""
        self._quiet_until = 0.0
        """When the storage may be asked again, by `time.monotonic`: one thread is told to slow down, and all do."""

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
                # rclone shows nothing at all while another one writes the same object.
                return _read_or_none(backend, path, len(data) + 1) == data
            try:
                backend.create(path, data)
            except FileExistsError:
                existing = _read_or_none(backend, path, len(data) + 1)
                if existing is None:  # deleted since, or one of the two answers is wrong: asked again
                    raise ConnectionError("it exists, and it does not exist") from None
                return existing == data
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

    def copy(self, source: str, path: str, size: int) -> None:
        """Make an object of another one of `size` bytes, on the storage itself.

        Raises:
            ObjectNotFoundError: there is no such source. StorageError: this storage does not copy, so send the bytes.
        """

        def copy(backend: Backend, count: _Count) -> None:
            count.patience += size / SILENT_RATE
            backend.copy(source, path)

        self._counted(f"copy {self._name(source)} to {self._name(path)}", copy)

    def incomplete(self) -> Sequence[IncompleteUpload]:
        """Uploads below the URL that were begun and are not over, sorted by path; of S3 and local disks only.

        Others tell nobody, and forget them by themselves after a week (Azure, and GCS where gcsfs sent it).
        """
        found = self._call(f"list incomplete uploads of {self.url!r}", lambda backend: backend.incomplete())
        return sorted(found, key=lambda upload: upload.path)

    def abort(self, uploads: Iterable[IncompleteUpload]) -> None:
        """Give uploads up and free what they take; one that is over is fine."""
        in_threads(self._abort_one, (list(uploads), DELETES_AT_ONCE))

    def upload(self, file: str, path: str, *, on_bytes: Callable[[int], None] | None = None) -> str:
        """Send a local file; returns the digest (`xxh3-128:…`) of the bytes that were sent.

        Args:
            on_bytes: hears how many bytes are gone, in pieces; a negative number takes back a failed try.
        """
        # Opened here too: a local file that is missing is no object that is missing.
        with open(file, "rb", buffering=0) as whole:
            size = os.fstat(whole.fileno()).st_size

            def send(backend: Backend, count: _Count) -> str:
                # Anew for each try: one that was given up may still read from its own.
                with open(file, "rb", buffering=0) as source:
                    transfer = self._transfer
                    if transfer is not None and NativeTransfer.can_name(path):
                        return transfer.upload(source, size, path, count.add)
                    count.patience += size / SILENT_RATE
                    return backend.upload(source, path, count.add)

            return f"{DIGEST_ALGORITHM}:{self._counted(f'upload {self._name(path)}', send, on_bytes)}"

    def download(
        self, path: str, file: str, size: int, *, on_bytes: Callable[[int], None] | None = None
    ) -> str:
        """Fetch an object of `size` bytes into a local file; returns the digest of the bytes that were written.

        Raises:
            ObjectNotFoundError: it is not there. ObjectTruncatedError: it is shorter.
        """
        # Made here: a local folder that is missing is no object that is missing.
        with open(file, "wb"):
            pass

        def fetch(backend: Backend, count: _Count) -> str:
            # A new file for each try: one that was given up may still write into its own.
            if os.path.isfile(file):
                os.unlink(file)
            with open(file, "w+b", buffering=0) as target:
                transfer = self._transfer
                if transfer is not None and NativeTransfer.can_name(path):
                    value = transfer.download(path, target, size, count.add)
                else:
                    value = backend.download(path, target, size, count.add)
            if count.total < size:  # one that is larger has another digest
                raise ObjectTruncatedError(f"{self._name(path)} has {count.total} bytes, not {size}.")
            return value

        return f"{DIGEST_ALGORITHM}:{self._counted(f'download {self._name(path)}', fetch, on_bytes)}"

    def close(self) -> None:
        """Forget the connections; the next call makes new ones."""
        self._backend = None
        self._transfer = None

    def _name(self, path: str) -> str:
        return repr(f"{self.url.rstrip('/')}/{path}")

    def _delete_one(self, path: str) -> None:
        with contextlib.suppress(ObjectNotFoundError):
            self._call(f"delete {self._name(path)}", lambda backend: backend.delete(path))

    def _abort_one(self, upload: IncompleteUpload) -> None:
        with contextlib.suppress(ObjectNotFoundError):
            self._call(
                f"give up the upload of {self._name(upload.path)}", lambda backend: backend.abort(upload)
            )

    def _connected(self) -> Backend:
        backend = self._backend
        if backend is None or self._pid != os.getpid():
            self._pid = os.getpid()
            backend, root = connect(self._given_url, self._protocol, self._options)
            self._transfer = native_transfer(self._protocol, root, self._options)
            self._backend = backend
        return backend

    def _call(self, what: str, call: Callable[[Backend], T]) -> T:
        return self._counted(what, lambda backend, _: call(backend))

    def _counted(
        self, what: str, call: Callable[[Backend, _Count], T], on_bytes: Callable[[int], None] | None = None
    ) -> T:
        """Make one call, again where the failure may pass; every error leaves here as one of ours."""
        pauses = iter(RETRY_PAUSES)
        again = {"silence", "credentials"}  # each is worth one new connection
        while True:
            if (quiet := self._quiet_until - time.monotonic()) > 0:
                time.sleep(quiet)
            try:
                return self._answer(what, call, on_bytes)
            except Exception as error:  # noqa: BLE001 - every client has its own tree of errors
                ours = self._translate(error, what)
                cause = self._cause_to_reconnect(ours)
                pause: float | None
                if cause is None:
                    pause = next(pauses, None) if isinstance(ours, StorageUnavailableError) else None
                else:
                    self.close()
                    pause = 0.0 if cause in again else None
                    again.discard(cause)
                if pause is None:
                    # A traceback would show what was taken out of the message.
                    raise ours from (error if str(error) == self._redact(str(error)) else None)
                logger.debug("%s; trying again in about %s s", ours, pause)
                if cause is None:
                    self._rest(error, pause)

    def _answer(
        self, what: str, call: Callable[[Backend, _Count], T], on_bytes: Callable[[int], None] | None
    ) -> T:
        with _Count(on_bytes) as count:
            try:
                answer = answer_in_time(
                    lambda: call(self._connected(), count), lambda: count.is_late(f"to {what}")
                )
            except TimeoutError as error:
                if not count.late:
                    raise  # the client's own
                raise _SilentError(
                    f"Could not {what}: no answer and no byte for {count.patience:.0f} s. Check the network and the endpoint."
                ) from error
        self._answered = True
        return answer

    def _cause_to_reconnect(self, error: CloudTrainError) -> str | None:
        """Why a new connection may help where this one does not: it hangs, or it holds the credentials of before."""
        if isinstance(error, _SilentError):
            return "silence"
        return "credentials" if isinstance(error, StoragePermissionError) and self._answered else None

    def _rest(self, error: Exception, pause: float) -> None:
        """Wait before a new try, as long as the storage asks for; all threads, where it says that it is too much."""
        asked = min(_retry_after(error), LONGEST_PAUSE)
        seconds = max(jittered(pause), asked)
        if asked or _THROTTLED.search(str(error)):
            self._quiet_until = max(self._quiet_until, time.monotonic() + seconds)
        else:
            time.sleep(seconds)

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


def jittered(pause: float) -> float:
    """A pause (s) between half of it and all: what fails for a thousand hosts at once must not come back at once."""
    return pause * _jitter.uniform(0.5, 1.0)


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
    "UnauthorizedSSOTokenError",
    "SSOTokenLoadError",
}
# A status code, and not the number in a name such as checkpoint-403 or 301-of-1000.json.
_CODE = r"(?<![\w./-])(?:{})(?![\w/-]|\.\w)"
_THROTTLED = re.compile(
    _CODE.format("503|429")
    + r"|\b(?:SlowDown|Throttl\w*|TooManyRequests|ServerBusy|rateLimitExceeded|RequestLimitExceeded)\b"
)
_BEYOND_END = re.compile(
    _CODE.format("416")
    + r"|InvalidRange|RangeNotSatisfiable|not satisfiable|range (?:started|starting) at|EOFError",
    re.IGNORECASE,
)
_REFUSED_TEXT = re.compile(
    _CODE.format("403|401")
    + r"|\b(?:Forbidden|AccessDenied|AuthorizationFailure|AuthenticationFailed|InvalidAccessKeyId|SignatureDoesNotMatch|"
    r"ExpiredToken(?:Exception)?|TokenRefreshRequired|RequestExpired|InvalidToken|Unable to locate credentials)\b"
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


class _SilentError(StorageUnavailableError):
    """No answer, and no end of it."""


class _Count:
    """Bytes of one try, so that a failed one can be taken back, and a silent one noticed."""

    def __init__(self, on_bytes: Callable[[int], None] | None) -> None:
        self.total = 0
        self.patience = SILENCE
        """Seconds of silence that are borne."""
        self.late = False
        self._on_bytes = on_bytes
        self._heard = time.monotonic()
        self._said = False
        self._over = False

    def __enter__(self) -> _Count:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.add(-self.total)
        self._over = True

    def is_late(self, purpose: str) -> bool:
        """Whether nothing was heard for too long."""
        silent = time.monotonic() - self._heard
        if silent > SAY_AFTER and not self._said:
            self._said = True
            logger.warning("Waiting %s: no answer for %.0f s.", purpose, silent)
        self.late = silent > self.patience
        return self.late

    def add(self, count: int) -> None:
        if self._over:
            return  # a try that was given up, and goes on by itself
        self._heard = time.monotonic()
        self.total += count
        if self._on_bytes is not None:
            self._on_bytes(count)


def _retry_after(error: BaseException | None) -> float:
    """Seconds that the storage asks to wait, where its client shows the header; 0 where not.

    https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3; a date instead of seconds is left out of account.
    """
    for _ in range(8):  # s3fs puts its own error before that of botocore
        if error is None:
            break
        answer = getattr(error, "response", None)
        found: Any = getattr(answer, "headers", None)
        if isinstance(answer, dict):
            found = (answer.get("ResponseMetadata") or {}).get("HTTPHeaders")
        if found:
            value = {str(name).lower(): str(value) for name, value in dict(found).items()}.get(
                "retry-after", ""
            )
            return float(value) if re.fullmatch(r"\d{1,9}", value) else 0.0
        error = error.__cause__ or error.__context__
    return 0.0


def _elsewhere(reason: str) -> bool:
    return (
        re.search(
            r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint|configured region|"
            + _CODE.format("301"),
            reason,
        )
        is not None
    )


def _bucket_hint(reason: str) -> str:
    return "Create the bucket, or correct the URL." if re.search("ucket|ontainer", reason) else ""
