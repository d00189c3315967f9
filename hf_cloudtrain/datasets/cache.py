"""Local copies of datasets: one for all processes of a machine, verified once, read-only.

    <cache>/datasets/<store>/glue-000002-<nonce>/
        glue/…       the files
        copy.json    size, inode and time of each file when all were verified
        lock         held by the process that downloads; released when that process ends

A later process compares names, sizes, inodes and times, which takes milliseconds. If one of them has changed, the digests
decide whether the copy is intact; if it is not, it is downloaded again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import download, is_whole
from hf_cloudtrain.checkpoints.frozen import AcceptedFile
from hf_cloudtrain.checkpoints.manifest import Manifest, decode_record, encode_record
from hf_cloudtrain.errors import ManifestError, StorageError
from hf_cloudtrain.runtime.files import locked, write_whole
from hf_cloudtrain.storage.folder_files import fresh_files
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)

SAY_AFTER = 5.0
"""Seconds of waiting for a different process after which a warning is logged."""


class LocalCopy:
    """One version of a dataset on this machine.

    Args:
        home: a folder for this copy only.

    Example:
        >>> LocalCopy(catalog, manifest, "glue", home).ensure()
        PosixPath('/home/me/.cache/hf_cloudtrain/datasets/4f0c3c3a1b2d/glue-000002-9d2f41aa/glue')
    """

    def __init__(self, catalog: Catalog, manifest: Manifest, name: str, home: Path) -> None:
        self._catalog = catalog
        self._manifest = manifest
        self._home = home
        self._folder = home / name
        self._record = home / "copy.json"

    def ensure(self, on_bytes: Callable[[int], None] | None = None) -> Path:
        """The folder with the files, downloaded if it is missing or was changed.

        Raises:
            CorruptCheckpointError: a file on storage differs from its manifest. StorageError, OSError
        """
        try:
            if not self.is_untouched():
                with exclusive(self._home / "lock", f"is downloading {self._manifest.folder!r}"):
                    if not self.is_untouched():
                        self._download(on_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            text = error if error.strerror is None else f"{error.strerror}: {error.filename!r}."
            raise StorageError(f"{text} {env.CACHE} sets the folder of the copies.") from None
        with contextlib.suppress(OSError):  # it belongs to a different user
            os.utime(self._record)  # when the copy was last used, for a clean-up by age
        return self._folder

    def _download(self, on_bytes: Callable[[int], None] | None) -> None:
        for left in (self._home / LOCAL).glob("restore-*"):
            shutil.rmtree(
                left, ignore_errors=True
            )  # no other process works here while this one holds the lock
        if self._folder.is_dir() and not self._is_exact():
            logger.warning("%r was changed; downloading it again.", str(self._folder))
            _remove(self._folder)
        if not self._folder.is_dir():
            download(self._catalog, self._manifest, self._folder, on_bytes=on_bytes)
        _make_read_only(self._folder)
        # Last: without the record, the next process compares the digests.
        write_whole(self._record, encode_record({"files": self._looks()}))

    def _is_exact(self) -> bool:
        here = set(fresh_files(self._folder, 0))
        return here == {file.path for file in self._manifest.files} and is_whole(self._folder, self._manifest)

    def is_untouched(self) -> bool:
        """Whether all files have the sizes, inodes and times that they had when they were verified, and no file is new."""
        try:
            record = decode_record(self._record.read_bytes(), "record of a local copy")
            return record.get("files") == self._looks()
        except (OSError, ManifestError):
            return False

    def _looks(self) -> list[dict[str, object]]:
        paths = sorted(fresh_files(self._folder, 0))
        return [dataclasses.asdict(AcceptedFile.of(self._folder, path)) for path in paths]


@contextlib.contextmanager
def exclusive(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock of this machine while the process does `what`; a process that waits for long logs a warning."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(lock, SAY_AFTER))
        except BlockingIOError:
            logger.warning("Waiting for another process that %s.", what)
            held.enter_context(locked(lock, math.inf))
        yield


def _make_read_only(folder: Path) -> None:
    for path in _below(folder):
        os.chmod(path, os.stat(path).st_mode & ~0o222)


def _remove(folder: Path) -> None:
    for path in _below(folder):
        os.chmod(path, os.stat(path).st_mode | 0o700)
    shutil.rmtree(folder)


def _below(folder: Path) -> Iterator[str]:
    """The folder and everything in it, except links, which lead elsewhere."""
    yield str(folder)
    for below, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(below, name)
            if not os.path.islink(path):
                yield path
