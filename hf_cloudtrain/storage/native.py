"""Bytes of large files through obstore, a native client for `s3://`, `gs://` and `az://`.

It costs an eighth of the CPU of s3fs or boto3 a byte and releases the GIL, so a thread beside the training loop is
enough. Credentials, region and endpoint are resolved by the provider's own library (botocore, google-auth,
azure-identity), because obstore alone reads neither profiles nor `~/.aws`. Where an option has no counterpart here,
the answer is None and the fsspec file system moves the bytes.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from typing import IO, TYPE_CHECKING, Any

from hf_cloudtrain.storage.backend import PART_SIZE
from hf_cloudtrain.storage.digest import Digest
from hf_cloudtrain.storage.native_stores import STORES

if TYPE_CHECKING:
    from obstore import GetOptions

PARTS_IN_FLIGHT = 4
"""Parts of one file under way at once: 64 MiB of memory a file."""
MAX_PARTS = 9_000
"""S3 takes 10,000 parts; above 140 GB the parts grow."""
BLOCK_SIZE = 256 * 2**10
"""Bytes handled at a time in a download: still in the processor's cache when they are hashed and written. Blocks of
1 MiB and more cost twice the CPU a byte, because malloc gives their memory back to the system each time."""

_first_pid: list[int] = []
"""The process that used a native client first."""


class NativeTransfer:
    """Uploads and downloads whole files with obstore."""

    def __init__(self, store: Any, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._ranged = True
        """Whether the storage answers ranges as the protocol says; known after the first one."""

    @staticmethod
    def can_name(path: str) -> bool:
        """Whether the client keeps this name as it is; it would percent-encode other characters."""
        return re.fullmatch(r"[A-Za-z0-9_./=+-]+", path) is not None

    def upload(self, source: IO[bytes], size: int, path: str, on_bytes: Callable[[int], None]) -> str:
        """Send an open file; returns the digest value of what was sent."""
        import obstore

        digest = Digest()
        part = max(PART_SIZE, -(-size // MAX_PARTS))
        if size <= part:
            data = source.read()
            digest.update(data)
            obstore.put(self._store, self._key(path), data, use_multipart=False)
            on_bytes(len(data))
        else:
            obstore.put(
                self._store,
                self._key(path),
                _hashed_blocks(source, part, digest, on_bytes),
                use_multipart=True,
                chunk_size=part,
                max_concurrency=PARTS_IN_FLIGHT,
            )
        return str(digest)

    def download(self, path: str, target: FileIO, size: int, on_bytes: Callable[[int], None]) -> str:
        """Fetch `size` bytes into an empty file, open for both; returns the digest value of what was written."""
        key = self._key(path)
        # A device keeps nothing that could be read back.
        ranged = size > PART_SIZE and self._ranged and stat.S_ISREG(os.fstat(target.fileno()).st_mode)
        if ranged:
            try:
                return self._download_ranges(key, target, size, on_bytes)
            except Exception as error:
                # `rclone serve s3` sends the range and calls it 200: refused at the first one, so nothing is counted.
                if "non-partial" not in str(error):
                    raise
                self._ranged = False
        return self._download_stream(key, target, size, on_bytes)

    def _download_stream(self, key: str, target: FileIO, size: int, on_bytes: Callable[[int], None]) -> str:
        digest = Digest()
        position = 0
        for block in self._blocks(key):
            digest.update(block)
            position = _write_at(target, block, position)
            on_bytes(len(block))
            if position > size:
                break  # not what was committed; the caller counts
        return str(digest)

    def _download_ranges(self, key: str, target: FileIO, size: int, on_bytes: Callable[[int], None]) -> str:
        """Ranges are written where they belong, in parallel, and hashed in order while the page cache has them."""
        digest = Digest()
        starts = iter(range(0, size, PART_SIZE))
        waiting: deque[Future[int]] = deque()
        position = 0
        with ThreadPoolExecutor(PARTS_IN_FLIGHT, thread_name_prefix="cloudtrain-range") as pool:
            while True:
                # One more than there are threads, so that none waits for the digest.
                while len(waiting) <= PARTS_IN_FLIGHT and (start := next(starts, None)) is not None:
                    stop = min(start + PART_SIZE, size)
                    waiting.append(pool.submit(self._fetch_range, key, target, start, stop))
                if not waiting:
                    return str(digest)
                stop = waiting.popleft().result()
                on_bytes(stop - position)
                _hash_span(target, position, stop, digest)
                position = stop

    def _fetch_range(self, key: str, target: FileIO, start: int, stop: int) -> int:
        position = start
        for block in self._blocks(key, {"range": (start, stop)}):
            position = _write_at(target, block, position)
        if position != stop:
            raise EOFError(f"a range ends at byte {position}, not {stop}")
        return stop

    def _blocks(self, key: str, options: GetOptions | None = None) -> Iterator[bytes]:
        import obstore

        return iter(obstore.get(self._store, key, options=options).stream(min_chunk_size=BLOCK_SIZE))

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path


def native_transfer(protocol: str, root: str, options: dict[str, Any]) -> NativeTransfer | None:
    """A native client for `root` ("bucket/prefix"), or None where fsspec must move the bytes.

    None after a fork of a process that has used one: the threads of the client do not exist in the child, and a call
    would hang for ever.
    """
    build = STORES.get(protocol)
    if build is None or not _usable_in_this_process():
        return None
    bucket, _, prefix = root.partition("/")
    if prefix and not NativeTransfer.can_name(prefix):
        return None
    try:
        store = build(bucket, options)
    except ImportError:
        return None
    return NativeTransfer(store, prefix) if store is not None else None


def _usable_in_this_process() -> bool:
    if not _first_pid:
        _first_pid.append(os.getpid())
    return _first_pid[0] == os.getpid()


def _write_at(target: FileIO, block: bytes, position: int) -> int:
    """Write all of a block at a position, whatever the file's own; returns where it ends."""
    view = memoryview(block)
    while view:
        written = os.pwrite(target.fileno(), view, position)
        view, position = view[written:], position + written
    return position


def _hash_span(file: FileIO, start: int, stop: int, digest: Digest) -> None:
    """Hash what was written between two positions; `start` is a multiple of the page size.

    Mapped, because copying it out of the page cache again costs as much as the digest does.
    """
    try:
        span = mmap.mmap(file.fileno(), stop - start, access=mmap.ACCESS_READ, offset=start)
    except (OSError, ValueError):  # nothing is mapped here, or the file was cut: reading tells which
        _hash_read(file, start, stop, digest)
        return
    with span:
        digest.update(span)


def _hash_read(file: FileIO, start: int, stop: int, digest: Digest) -> None:
    view = memoryview(bytearray(BLOCK_SIZE))
    while start < stop:
        got = os.preadv(file.fileno(), [view[: stop - start]], start)
        if not got:
            raise OSError(errno.EIO, f"{file.name!r} lost what was written to it")
        digest.update(view[:got])
        start += got


def _hashed_blocks(
    source: IO[bytes], size: int, digest: Digest, on_bytes: Callable[[int], None]
) -> Iterator[bytes]:
    while block := source.read(size):
        digest.update(block)
        yield block
        on_bytes(len(block))
