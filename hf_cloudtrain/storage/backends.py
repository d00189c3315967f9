"""The few things a place of storage must do, on a local disk and on any file system of fsspec.

fsspec's own local file system is not used: it neither creates exclusively nor replaces atomically.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

import xxhash

from hf_cloudtrain.errors import ConfigurationError, MissingExtraError
from hf_cloudtrain.storage.names import META
from hf_cloudtrain.storage.native import PART_SIZE

EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}
"""Protocols whose packages an extra of ours installs."""

COPIES = {"s3", "s3a", "gs", "gcs", "memory"}
"""Protocols whose file systems copy an object, whatever its size, and return when that is done. adlfs's does not wait."""

_TEMPORARY = ".cloudtrain-tmp-"


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing."""

    path: str
    """Relative to the run URL."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class IncompleteUpload:
    """An upload that was begun and is not over: in no listing, and paid for."""

    path: str
    """The object that it would make, relative to the run URL; on a local disk the temporary file itself."""
    token: str
    """What the store calls it."""
    size: int
    """Bytes that are there already."""


class Backend(Protocol):
    """The few questions we ask of a place; each raises what its client raises."""

    def read(self, path: str, limit: int) -> bytes:
        """The first `limit` bytes of an object."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Store an object, whatever was there; it appears whole or not at all."""
        ...

    def create(self, path: str, data: bytes) -> None:
        """Store an object, or raise FileExistsError where there is one."""
        ...

    def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects below a folder."""
        ...

    def delete(self, path: str) -> None:
        """Delete an object; FileNotFoundError is allowed where there is none."""
        ...

    def copy(self, source: str, path: str) -> None:
        """Make an object of another one, whose bytes do not come here; NotImplementedError where that cannot be."""
        ...

    def incomplete(self) -> Sequence[IncompleteUpload]:
        """Uploads that are not over, as far as the store tells."""
        ...

    def abort(self, upload: IncompleteUpload) -> None:
        """Give an upload up; FileNotFoundError is allowed where it is over."""
        ...

    def upload(self, source: IO[bytes], path: str, on_bytes: Callable[[int], None]) -> str:
        """Store what an open file holds; returns the digest value of what was sent."""
        ...

    def download(self, path: str, target: IO[bytes], size: int, on_bytes: Callable[[int], None]) -> str:
        """Write an object of `size` bytes into an open file; returns the digest value of what was written."""
        ...


class LocalBackend:
    """A folder on a disk. Everything appears whole or not at all: written beside, then renamed or linked."""

    def __init__(self, root: str) -> None:
        self._root = root

    def read(self, path: str, limit: int) -> bytes:
        with open(self._full(path), "rb") as file:
            return file.read(limit)

    def write(self, path: str, data: bytes) -> None:
        temporary = self._beside(path)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
            os.replace(temporary, self._full(path))
        except BaseException:
            os.unlink(temporary)
            raise

    def create(self, path: str, data: bytes) -> None:
        temporary = self._beside(path)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
            os.link(temporary, self._full(path))
        finally:
            os.unlink(temporary)

    def list(self, prefix: str) -> list[ObjectInfo]:
        found = []
        for folder, _, names in os.walk(self._full(prefix), onerror=_raise_unless_missing):
            for name in names:
                if name.startswith(_TEMPORARY):
                    continue
                full = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                    found.append(ObjectInfo(os.path.relpath(full, self._root), os.stat(full).st_size))
        return found

    def delete(self, path: str) -> None:
        full = self._full(path)
        os.unlink(full)
        parent = os.path.dirname(full)
        # An empty folder of a checkpoint goes; those of our records stay, where others may be about to write.
        while parent != self._root and not path.startswith(META):
            try:
                os.rmdir(parent)
            except OSError:
                break
            parent = os.path.dirname(parent)

    def copy(self, source: str, path: str) -> None:
        temporary = self._beside(path)
        try:
            try:
                # Nobody writes into an object, so two of them may be one file.
                os.link(self._full(source), temporary)
            except OSError:  # a disk without links, or one link too many
                shutil.copyfile(self._full(source), temporary)
            os.replace(temporary, self._full(path))
        finally:
            # Left where it failed, and where the two are one file already.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def incomplete(self) -> Sequence[IncompleteUpload]:
        found = []
        for folder, _, names in os.walk(self._root, onerror=_raise_unless_missing):
            for name in names:
                if name.startswith(_TEMPORARY):
                    full = os.path.join(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        path = os.path.relpath(full, self._root)
                        found.append(IncompleteUpload(path, name, os.stat(full).st_size))
        return found

    def abort(self, upload: IncompleteUpload) -> None:
        self.delete(upload.path)

    def upload(self, source: IO[bytes], path: str, on_bytes: Callable[[int], None]) -> str:
        temporary = self._beside(path)
        try:
            with open(temporary, "wb", buffering=0) as target:
                value = _copy(source, target, on_bytes)
            os.replace(temporary, self._full(path))
        except BaseException:
            os.unlink(temporary)
            raise
        return value

    def download(self, path: str, target: IO[bytes], size: int, on_bytes: Callable[[int], None]) -> str:
        with open(self._full(path), "rb", buffering=0) as source:
            # One byte more tells that it is larger, and a disk is not filled with what nobody promised.
            return _copy(source, target, on_bytes, size + 1)

    def _full(self, path: str) -> str:
        return os.path.join(self._root, path)

    def _beside(self, path: str) -> str:
        folder = os.path.dirname(self._full(path))
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, f"{_TEMPORARY}{secrets.token_hex(8)}")


class FsspecBackend:
    """Any file system of fsspec."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")

    def read(self, path: str, limit: int) -> bytes:
        try:
            return bytes(self._fs.cat_file(self._full(path), start=0, end=limit))
        except Exception:
            # A range of an empty object is an error on most stores.
            if self._fs.info(self._full(path))["size"] == 0:
                return b""
            raise

    def write(self, path: str, data: bytes) -> None:
        self._fs.pipe_file(self._full(path), data)

    def create(self, path: str, data: bytes) -> None:
        self._fs.pipe_file(self._full(path), data, mode="create")

    def list(self, prefix: str) -> list[ObjectInfo]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._full(prefix), detail=True)
        except FileNotFoundError:
            return []
        skip = len(self._fs._strip_protocol(self._root)) + 1
        return [ObjectInfo(name[skip:], int(info["size"])) for name, info in found.items() if name[skip:]]

    def delete(self, path: str) -> None:
        self._fs.rm_file(self._full(path))

    def copy(self, source: str, path: str) -> None:
        protocols = self._fs.protocol
        if not COPIES & set((protocols,) if isinstance(protocols, str) else protocols):
            raise NotImplementedError("this storage does not copy")
        self._fs.cp_file(self._full(source), self._full(path))

    def incomplete(self) -> Sequence[IncompleteUpload]:
        return []  # Azure drops blocks that were never committed after a week, GCS a resumable upload

    def abort(self, upload: IncompleteUpload) -> None:
        raise NotImplementedError

    def upload(self, source: IO[bytes], path: str, on_bytes: Callable[[int], None]) -> str:
        with self._fs.open(self._full(path), "wb", block_size=PART_SIZE) as target:
            return _copy(source, target, on_bytes)

    def download(self, path: str, target: IO[bytes], size: int, on_bytes: Callable[[int], None]) -> str:
        hasher = xxhash.xxh3_128()
        if size == 0:
            self._fs.info(self._full(path))
        for start in range(0, size, PART_SIZE):
            data = self._fs.cat_file(self._full(path), start=start, end=min(size, start + PART_SIZE))
            hasher.update(data)
            view = memoryview(data)
            while view:
                view = view[target.write(view) or len(view) :]
            on_bytes(len(data))
        return hasher.hexdigest()

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"


class S3Backend(FsspecBackend):
    """S3 keeps the parts of a multipart upload, and charges for them, until it is completed or aborted.

    https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html
    """

    def incomplete(self) -> Sequence[IncompleteUpload]:
        bucket, prefix = self._bucket_and_key("")
        found = []
        pages = self._pages(
            "list_multipart_uploads", "KeyMarker", "UploadIdMarker", Bucket=bucket, Prefix=prefix
        )
        for upload in (upload for page in pages for upload in page.get("Uploads", [])):
            key, token = upload["Key"], upload["UploadId"]
            with contextlib.suppress(FileNotFoundError):  # it is over since the listing
                parts = self._pages("list_parts", "PartNumberMarker", Bucket=bucket, Key=key, UploadId=token)
                size = sum(int(part["Size"]) for page in parts for part in page.get("Parts", []))
                found.append(IncompleteUpload(key[len(prefix) :], token, size))
        return found

    def abort(self, upload: IncompleteUpload) -> None:
        bucket, key = self._bucket_and_key(upload.path)
        self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.token)

    def _pages(self, method: str, *markers: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """All pages of an answer; `markers` name where the next one begins."""
        while True:
            page = self._fs.call_s3(method, **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            arguments.update({name: page[f"Next{name}"] for name in markers})

    def _bucket_and_key(self, path: str) -> tuple[str, str]:
        bucket, _, key = self._full(path).partition("/")
        return bucket, key


def _raise_unless_missing(error: OSError) -> None:
    # A folder that cannot be read is not an empty one.
    if not isinstance(error, FileNotFoundError):
        raise error


def connect(url: str, protocol: str, options: dict[str, Any]) -> tuple[Backend, str]:
    """The place behind a URL, and its root as its file system names it."""
    if protocol == "file":
        root = local_path(url)
        return LocalBackend(root), root
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise missing_extra(protocol, str(error)) from error
    except ValueError:
        raise ConfigurationError(
            f"{protocol + '://'!r} is no protocol that fsspec knows. Use one such as s3://, gs://, az://, "
            "hf://buckets/ or file://; a plug-in registers others."
        ) from None
    # Its own instance: a shared one may cache listings, and may have been made before a fork.
    arguments = {**kind._get_kwargs_from_urls(url), **options, "skip_instance_cache": True}
    arguments.setdefault("use_listings_cache", False)
    if protocol in ("s3", "s3a"):
        # Our own digests check the bytes. botocore's checksums of every answer and request are refused or broken by
        # other servers: rclone sends the checksum of the whole with a part, so reading up to a limit fails.
        quiet = {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            # Storage tries again itself; three layers of retries would sit out five minutes of a lasting error.
            "retries": {"max_attempts": 1},
        }
        arguments["config_kwargs"] = {**quiet, **(options.get("config_kwargs") or {})}
    fs = kind(**arguments)
    if protocol in ("s3", "s3a"):
        fs.retries = 1
    root = str(fs._strip_protocol(url))
    kind_of_backend = S3Backend if protocol in ("s3", "s3a") else FsspecBackend
    return kind_of_backend(fs, root), root.strip("/")


def is_local(url: str) -> bool:
    """Whether a URL names a folder of this machine: `file://`, or a plain path."""
    scheme, separator, _ = url.partition("://")
    return not separator or scheme in ("file", "local")


def local_path(url: str) -> str:
    """The absolute folder that a plain path or a `file://` URL names."""
    scheme, separator, rest = url.partition("://")
    return os.path.abspath(rest if separator else os.path.expanduser(scheme)) or "/"


def missing_extra(protocol: str, reason: str) -> MissingExtraError:
    """The error for a protocol whose packages are missing, with the command that installs them."""
    extra = EXTRAS.get(protocol)
    command = f"pip install 'hf_cloudtrain[{extra}]'" if extra else "the package that fsspec names"
    return MissingExtraError(
        f"{protocol + '://'!r} needs packages that are not installed: {command} ({reason})."
    )


def _copy(
    source: IO[bytes], target: IO[bytes], on_bytes: Callable[[int], None], limit: int = sys.maxsize
) -> str:
    hasher = xxhash.xxh3_128()
    while block := source.read(min(PART_SIZE, limit)):
        limit -= len(block)
        hasher.update(block)
        view = memoryview(block)
        while view:
            view = view[target.write(view) or len(view) :]
        on_bytes(len(block))
    return hasher.hexdigest()
