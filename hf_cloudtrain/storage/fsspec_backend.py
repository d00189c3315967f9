"""Any file system of fsspec as a storage back end, and the back end that belongs to a URL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from hf_cloudtrain.storage.backend import (
    PART_SIZE,
    Backend,
    IncompleteUpload,
    ObjectInfo,
    copy_hashed,
    write_all,
)
from hf_cloudtrain.storage.digest import Digest
from hf_cloudtrain.storage.local_backend import LocalBackend
from hf_cloudtrain.storage.retries import S3_CLIENT_ATTEMPTS
from hf_cloudtrain.storage.urls import local_path, missing_extra

COPIES = {"s3", "s3a", "gs", "gcs", "memory"}
"""Protocols whose file systems copy objects of any size and wait for the copy. adlfs does not wait."""

NO_CACHE = "no-cache"
"""Browsers and caches may keep a page, and ask before each use whether it has changed."""

S3_CONFIG = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "retries": {"max_attempts": S3_CLIENT_ATTEMPTS},
}
"""Our own digests check the bytes. Servers other than AWS refuse or break botocore's checksums of each request and
response: rclone sends the checksum of the whole object with a part, so reading up to a limit fails."""


class FsspecBackend:
    """Any file system of fsspec."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")

    def read(self, path: str, limit: int) -> bytes:
        try:
            return bytes(self._fs.cat_file(self._full(path), start=0, end=limit))
        except Exception:
            # Most stores refuse a range of an empty object.
            if self._fs.info(self._full(path))["size"] == 0:
                return b""
            raise

    def write(self, path: str, data: bytes, page: str | None = None) -> None:
        self._fs.pipe_file(self._full(path), data, **({} if page is None else self._headers(page)))

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
            raise NotImplementedError("this storage cannot copy objects")
        self._fs.cp_file(self._full(source), self._full(path))

    def incomplete(self) -> Sequence[IncompleteUpload]:
        return []  # Azure deletes uncommitted blocks after a week, GCS a resumable upload

    def abort(self, upload: IncompleteUpload) -> None:
        raise NotImplementedError

    def upload(self, source: IO[bytes], path: str, on_bytes: Callable[[int], None]) -> str:
        with self._fs.open(self._full(path), "wb", block_size=PART_SIZE) as target:
            return copy_hashed(source, target, on_bytes)

    def download(self, path: str, target: IO[bytes], size: int, on_bytes: Callable[[int], None]) -> str:
        digest = Digest()
        if size == 0:
            self._fs.info(self._full(path))
        for start in range(0, size, PART_SIZE):
            data = self._fs.cat_file(self._full(path), start=start, end=min(size, start + PART_SIZE))
            digest.update(data)
            write_all(target, data)
            on_bytes(len(data))
        return str(digest)

    def _headers(self, content_type: str) -> dict[str, Any]:
        """What tells `pipe_file` the type of a page; nothing where the store takes it from the name, if it has types."""
        protocols = self._fs.protocol
        known = {protocols} if isinstance(protocols, str) else set(protocols)
        if known & {"gs", "gcs"}:
            return {"content_type": content_type, "fixed_key_metadata": {"cache_control": NO_CACHE}}
        if known & {"az", "abfs"}:
            from azure.storage.blob import ContentSettings

            return {"content_settings": ContentSettings(content_type=content_type, cache_control=NO_CACHE)}
        return {}

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"


class S3Backend(FsspecBackend):
    """S3, which keeps and bills the parts of a multipart upload until the upload is completed or aborted.

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
            with contextlib.suppress(FileNotFoundError):  # it ended after the listing
                parts = self._pages("list_parts", "PartNumberMarker", Bucket=bucket, Key=key, UploadId=token)
                size = sum(int(part["Size"]) for page in parts for part in page.get("Parts", []))
                found.append(IncompleteUpload(key[len(prefix) :], token, size))
        return found

    def _headers(self, content_type: str) -> dict[str, Any]:
        return {"ContentType": content_type, "CacheControl": NO_CACHE}

    def abort(self, upload: IncompleteUpload) -> None:
        bucket, key = self._bucket_and_key(upload.path)
        self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload.token)

    def _pages(self, method: str, *markers: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """All pages of a response; `markers` name the arguments that request the next one."""
        while True:
            page = self._fs.call_s3(method, **arguments)
            yield page
            if not page.get("IsTruncated"):
                return
            arguments.update({name: page[f"Next{name}"] for name in markers})

    def _bucket_and_key(self, path: str) -> tuple[str, str]:
        bucket, _, key = self._full(path).partition("/")
        return bucket, key


def connect(url: str, protocol: str, options: dict[str, Any]) -> tuple[Backend, str]:
    """The back end of a URL, and the root of the URL as its file system names it."""
    if protocol == "file":
        root = local_path(url)
        return LocalBackend(root), root
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise missing_extra(protocol, str(error)) from None
    # An instance of our own: a shared one may cache listings, and may have been made before a fork.
    arguments = {**kind._get_kwargs_from_urls(url), **options, "skip_instance_cache": True}
    arguments.setdefault("use_listings_cache", False)
    is_s3 = protocol in ("s3", "s3a")
    if is_s3:
        arguments["config_kwargs"] = {**S3_CONFIG, **(options.get("config_kwargs") or {})}
    fs = kind(**arguments)
    if is_s3:
        fs.retries = S3_CLIENT_ATTEMPTS
    root = str(fs._strip_protocol(url))
    return (S3Backend if is_s3 else FsspecBackend)(fs, root), root.strip("/")
