"""What every storage back end must do: the few requests that `client.Storage` makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from hf_cloudtrain.storage.digest import Digest

PART_SIZE = 16 * 2**20
"""Bytes that travel as one part. Parts of 5 to 16 MiB were fastest, 32 MiB slower."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing."""

    path: str
    """Relative to the run URL."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class IncompleteUpload:
    """An upload that was begun and not finished: in no listing, and billed."""

    path: str
    """The object that it would create, relative to the run URL; on a local disk the temporary file itself."""
    token: str
    """The store's name for the upload."""
    size: int
    """Bytes that the store already holds."""


class Backend(Protocol):
    """Requests to one storage location. Paths are relative to its root. Each method raises the errors of its client."""

    def read(self, path: str, limit: int) -> bytes:
        """The first `limit` bytes of an object."""

    def write(self, path: str, data: bytes, page: str | None = None) -> None:
        """Store an object, replacing any other. Readers see the old or the new object, never a part.

        Args:
            page: the content type of an object for browsers, which ask for it again each time (`no-cache`).
        """

    def create(self, path: str, data: bytes) -> None:
        """Store an object, or raise FileExistsError where one exists."""

    def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects below a folder."""

    def delete(self, path: str) -> None:
        """Delete an object; may raise FileNotFoundError where there is none."""

    def copy(self, source: str, path: str) -> None:
        """Copy an object within the storage; NotImplementedError where the bytes would travel through this machine."""

    def incomplete(self) -> Sequence[IncompleteUpload]:
        """Unfinished uploads, as far as the store lists them."""

    def abort(self, upload: IncompleteUpload) -> None:
        """Abort an upload; may raise FileNotFoundError where it has ended."""

    def upload(self, source: IO[bytes], path: str, on_bytes: Callable[[int], None]) -> str:
        """Store the content of an open file; returns the digest of the bytes that were sent."""

    def download(self, path: str, target: IO[bytes], size: int, on_bytes: Callable[[int], None]) -> str:
        """Write an object of `size` bytes into an open file; returns the digest of the bytes that were written."""


def copy_hashed(
    source: IO[bytes], target: IO[bytes], on_bytes: Callable[[int], None], limit: int = sys.maxsize
) -> str:
    """Copy at most `limit` bytes of one open file into another; returns their digest."""
    digest = Digest()
    while block := source.read(min(PART_SIZE, limit)):
        limit -= len(block)
        digest.update(block)
        write_all(target, block)
        on_bytes(len(block))
    return str(digest)


def write_all(target: IO[bytes], data: bytes) -> None:
    """Write all of `data`, although an unbuffered file may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[target.write(view) or len(view) :]
