"""Local copies of datasets: one for all processes of a machine, verified once, and read-only.

    <cache>/datasets/<store>/glue-000002-<nonce>/
        glue/…       the files
        copy.json    how each of them looked when all had been verified
        lock         held by whoever downloads; it ends with its process

Who comes later looks at names, sizes, inodes and times, which takes milliseconds. Where one of them has changed, the
digests decide whether the copy is still the version, and if it is not, it is downloaded again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import download, is_whole
from hf_cloudtrain.checkpoints.freeze import AcceptedFile, fresh_files
from hf_cloudtrain.checkpoints.manifest import Manifest, decode_record, encode_record
from hf_cloudtrain.errors import ManifestError
from hf_cloudtrain.runtime.files import locked, temp_suffix
from hf_cloudtrain.storage.names import META

logger = logging.getLogger(__name__)

SAY_AFTER = 5.0
"""Seconds after which it is said that somebody waits for another process."""


class LocalCopy:
    """One version of a dataset on this machine.

    Args:
        home: the folder of this copy alone.

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
        """The folder with the files, downloaded unless it is here and nobody has touched it.

        Raises:
            CorruptCheckpointError: a file on storage is not what was committed. StorageError, OSError
        """
        if not self._is_untouched():
            with alone(self._home / "lock", f"downloads the dataset {self._manifest.folder!r}"):
                if not self._is_untouched():
                    self._bring(on_bytes)
        with contextlib.suppress(OSError):  # another user's
            os.utime(self._record)  # when it was last asked for, for whoever needs the space
        return self._folder

    def _bring(self, on_bytes: Callable[[int], None] | None) -> None:
        for left in (self._home / META).glob("restore-*"):
            shutil.rmtree(left, ignore_errors=True)  # nobody else works here while the lock is ours
        if self._folder.is_dir() and not self._is_exact():
            logger.warning("%r was changed, so it is downloaded again.", str(self._folder))
            _remove(self._folder)
        if not self._folder.is_dir():
            download(self._catalog, self._manifest, self._folder, on_bytes=on_bytes)
        _make_read_only(self._folder)
        # Last: until it is there, the digests are looked at again.
        beside = self._record.with_name(f".{self._record.name}-{temp_suffix()}")
        beside.write_bytes(encode_record({"files": self._looks()}))
        os.replace(beside, self._record)

    def _is_exact(self) -> bool:
        here = set(fresh_files(self._folder, 0))
        return here == {file.path for file in self._manifest.files} and is_whole(self._folder, self._manifest)

    def _is_untouched(self) -> bool:
        """Whether every file looks as it did when it had been verified, and no other is there."""
        try:
            record = decode_record(self._record.read_bytes(), "record of a local copy")
            return record.get("files") == self._looks()
        except (OSError, ManifestError):
            return False

    def _looks(self) -> list[dict[str, object]]:
        found = []
        for path in sorted(fresh_files(self._folder, 0)):
            stat = os.stat(self._folder / path)
            file = AcceptedFile(path, stat.st_size, stat.st_ino, stat.st_mtime_ns)
            found.append(dataclasses.asdict(file))
        return found


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Be the one process of this machine that does `what`; whoever waits for another one long says so."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(lock, SAY_AFTER))
        except BlockingIOError:
            logger.warning("Waiting for another process, which %s.", what)
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
    """The folder and all that is in it, but no link: it leads to what is not ours."""
    yield str(folder)
    for below, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(below, name)
            if not os.path.islink(path):
                yield path
