"""A folder on a disk as a storage back end.

fsspec's own local file system is not used: it neither creates exclusively nor replaces atomically.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import IO

from hf_cloudtrain.storage.backend import IncompleteUpload, ObjectInfo, copy_hashed
from hf_cloudtrain.storage.names import META

NO_LINKS = frozenset((errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS))
"""What file systems without hard links answer, such as FAT and some of FUSE. Nothing here links files of other users."""

_TEMPORARY = ".cloudtrain-tmp-"


class LocalBackend:
    """A folder on a disk. Each object appears whole: it is written beside its name, then renamed or linked."""

    def __init__(self, root: str) -> None:
        self._root = root

    def read(self, path: str, limit: int) -> bytes:
        with open(self._full(path), "rb") as file:
            return file.read(limit)

    def write(self, path: str, data: bytes, page: str | None = None) -> None:
        with self._temporary(path, data) as temporary:
            os.replace(temporary, self._full(path))

    def create(self, path: str, data: bytes) -> None:
        with self._temporary(path, data) as temporary:
            try:
                os.link(temporary, self._full(path))
            except OSError as error:
                if error.errno in NO_LINKS:
                    raise NotImplementedError("this file system has no hard links") from None
                raise
            os.unlink(temporary)

    def list(self, prefix: str) -> list[ObjectInfo]:
        return [ObjectInfo(path, size) for path, size in self._files(prefix) if not _is_temporary(path)]

    def delete(self, path: str) -> None:
        full = self._full(path)
        os.unlink(full)
        parent = os.path.dirname(full)
        # Remove empty folders of a checkpoint, but not those of our records: another process may be about to write
        # there.
        while parent != self._root and not path.startswith(META):
            try:
                os.rmdir(parent)
            except OSError:
                break
            parent = os.path.dirname(parent)

    def copy(self, source: str, path: str) -> None:
        with self._temporary(path) as temporary:
            try:
                # Objects are never written in place, so two of them may share one file.
                os.link(self._full(source), temporary)
            except OSError:  # the disk has no links, or the file has too many
                shutil.copyfile(self._full(source), temporary)
            os.replace(temporary, self._full(path))
            with contextlib.suppress(
                FileNotFoundError
            ):  # still there where both names were links to one file
                os.unlink(temporary)

    def incomplete(self) -> Sequence[IncompleteUpload]:
        return [
            IncompleteUpload(path, os.path.basename(path), size)
            for path, size in self._files("")
            if _is_temporary(path)
        ]

    def abort(self, upload: IncompleteUpload) -> None:
        self.delete(upload.path)

    def upload(self, source: IO[bytes], path: str, on_bytes: Callable[[int], None]) -> str:
        with self._temporary(path) as temporary:
            with open(temporary, "wb", buffering=0) as target:
                digest = copy_hashed(source, target, on_bytes)
            os.replace(temporary, self._full(path))
        return digest

    def download(self, path: str, target: IO[bytes], size: int, on_bytes: Callable[[int], None]) -> str:
        with open(self._full(path), "rb", buffering=0) as source:
            # One byte more shows that the object is larger, without filling the disk with it.
            return copy_hashed(source, target, on_bytes, size + 1)

    def _full(self, path: str) -> str:
        return os.path.join(self._root, path)

    @contextlib.contextmanager
    def _temporary(self, path: str, data: bytes | None = None) -> Iterator[str]:
        """The name of a temporary file beside `path`, perhaps with data; the file is deleted if the block raises."""
        folder = os.path.dirname(self._full(path))
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f"{_TEMPORARY}{secrets.token_hex(8)}")
        try:
            if data is not None:
                with open(temporary, "wb") as file:
                    file.write(data)
            yield temporary
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def _files(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Path and size of every file below a folder."""
        for folder, _, names in os.walk(self._full(prefix), onerror=_raise_unless_missing):
            for name in names:
                full = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                    yield os.path.relpath(full, self._root), os.stat(full).st_size


def _is_temporary(path: str) -> bool:
    return os.path.basename(path).startswith(_TEMPORARY)


def _raise_unless_missing(error: OSError) -> None:
    # A folder that cannot be read is not an empty one.
    if not isinstance(error, FileNotFoundError):
        raise error
