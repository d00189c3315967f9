"""From a manifest to a verified local folder. Nothing uses a file before all of them are verified."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.frozen import ALL_FILES, Wanted, own_files
from hf_cloudtrain.checkpoints.manifest import FileEntry, Manifest
from hf_cloudtrain.errors import (
    ConfigurationError,
    CorruptCheckpointError,
    ObjectNotFoundError,
    ObjectTruncatedError,
    StorageError,
)
from hf_cloudtrain.runtime.files import check_free_space, temp_suffix
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.backend import PART_SIZE
from hf_cloudtrain.storage.digest import file_digest
from hf_cloudtrain.storage.names import META

logger = logging.getLogger(__name__)

LARGE_AT_ONCE = 2
SMALL_AT_ONCE = 8
RESTORED_AGE_NS = 10 * 10**9
"""How much older restored files are made: more than clocks of disks and processes differ, or tick."""
SPARE_SPACE = 64 * 2**20
"""Bytes that must stay free on the disk after a download."""


def download(
    catalog: Catalog,
    manifest: Manifest,
    target: Path,
    *,
    wanted: Wanted = ALL_FILES,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Put a checkpoint's files into `target`, which appears only when all of them are there and verified.

    Args:
        target: the folder to make; whatever is there now moves aside first.
        wanted: which files of the manifest to take, by their path.
        on_bytes: hears of bytes as they arrive.

    Raises:
        CorruptCheckpointError: a file is missing, cut short or different from its digest.
        StorageError: the storage does not answer, or the disk is full.
    """
    entries = [entry for entry in manifest.files if wanted(entry.path)]
    work = target.parent / META / f"restore-{temp_suffix()}"
    work.mkdir(parents=True)
    try:
        check_space(work, sum(entry.size for entry in entries), target)
        _fetch(catalog, manifest, entries, work, on_bytes)
        if os.path.lexists(target):
            move_aside(target)
        os.rename(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def verify(
    catalog: Catalog, manifest: Manifest, *, on_bytes: Callable[[int], None] | None = None
) -> list[str]:
    """What is wrong with a checkpoint on storage, in words; empty where every byte is as promised.

    Reads everything, keeps nothing.

    Raises:
        StorageError: the storage does not answer, which says nothing about the checkpoint.
    """

    def problem(entry: FileEntry) -> str | None:
        try:
            digest = catalog.storage.download(
                manifest.object_path(entry), os.devnull, entry.size, on_bytes=on_bytes
            )
        except ObjectNotFoundError:
            return f"{entry.path!r} is missing"
        except ObjectTruncatedError:
            return f"{entry.path!r} is cut short: {entry.size} bytes were committed"
        return None if digest == entry.digest else f"{entry.path!r} differs from its digest"

    return [text for text in _on_all(problem, manifest.files) if text is not None]


def is_whole(
    folder: Path,
    manifest: Manifest,
    *,
    wanted: Wanted = ALL_FILES,
    originals: Path | None = None,
) -> bool:
    """Whether a local folder holds exactly what the manifest promises.

    Args:
        originals: folder of files as they were before they were made true on this machine; those count instead.
    """
    for entry in manifest.files:
        if not wanted(entry.path):
            continue
        path = folder / entry.path
        if originals is not None and (originals / entry.path).is_file():
            path = originals / entry.path
        try:
            if path.stat().st_size != entry.size or file_digest(path) != entry.digest:
                return False
        except OSError:
            return False
    return True


def put_in_place(verified: Path, folder: Path, manifest: Manifest) -> list[str]:
    """Move verified files into a folder that its owner writes again and again; returns what else lies there.

    Each file is there in one piece, before and after, and looks older than whatever is written from now on. What is
    not in the manifest stays.
    """
    ours = {entry.path for entry in manifest.files}
    before = time.time_ns() - RESTORED_AGE_NS
    for path in sorted(ours):
        if not (verified / path).exists():
            continue  # another disk's
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.utime(verified / path, ns=(before, before))
            _replace(verified / path, target)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise ConfigurationError(
                f"{str(target)!r} cannot be restored ({error.strerror}). Move what is in its way, or choose another "
                "checkpoint_dir."
            ) from error
    return sorted(set(own_files(folder)) - ours)


def _replace(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # A folder of it is on another disk.
        beside = target.with_name(f".tmp-{temp_suffix()}")
        shutil.copy2(source, beside)
        os.replace(beside, target)


def move_aside(folder: Path) -> Path:
    """Move a local folder of another lineage to `.cloudtrain/stale/`; an older one of that name makes room."""
    stale = folder.parent / META / "stale" / folder.name
    if stale.is_symlink():  # a link that lay in the place of a checkpoint before: only the link goes
        stale.unlink()
    shutil.rmtree(stale, ignore_errors=True)
    stale.parent.mkdir(parents=True, exist_ok=True)
    os.rename(folder, stale)
    return stale


def _fetch(
    catalog: Catalog,
    manifest: Manifest,
    entries: list[FileEntry],
    work: Path,
    on_bytes: Callable[[int], None] | None,
) -> None:
    # All names first: a download makes its file anew, and for a moment there is none of that name.
    for entry in entries:
        target = work / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            raise StorageError(
                f"{entry.path!r} of {manifest.folder} has the name of another file of it on this disk, which does not tell "
                "'a' from 'A'. Restore on a disk that does."
            ) from None

    def fetch(entry: FileEntry) -> None:
        try:
            digest = _twice(catalog, manifest, entry, str(work / entry.path), on_bytes)
        except ObjectNotFoundError:
            raise CorruptCheckpointError(
                f"{entry.path!r} of {manifest.folder} is missing on storage."
            ) from None
        except ObjectTruncatedError:
            raise CorruptCheckpointError(
                f"{entry.path!r} of {manifest.folder} is cut short on storage: {entry.size} bytes were committed."
            ) from None
        if digest != entry.digest:
            raise CorruptCheckpointError(
                f"{entry.path!r} of {manifest.folder} differs from the digest in its manifest: it was damaged or replaced."
            )

    _on_all(fetch, entries)


def _twice(
    catalog: Catalog,
    manifest: Manifest,
    entry: FileEntry,
    target: str,
    on_bytes: Callable[[int], None] | None,
) -> str:
    """The digest of a downloaded file, fetched once more if it is not the promised one.

    A step back costs hours, and the way here, or a listing that lags behind, may be what is wrong.
    """
    try:
        digest = catalog.storage.download(manifest.object_path(entry), target, entry.size, on_bytes=on_bytes)
        if digest == entry.digest:
            return digest
    except (ObjectNotFoundError, ObjectTruncatedError):
        pass
    return catalog.storage.download(manifest.object_path(entry), target, entry.size)


def _on_all(work: Callable[[FileEntry], Any], entries: Sequence[FileEntry]) -> list[Any]:
    """Do `work` on all files, two large ones and several small ones at once; answers of the large ones first."""
    large = [entry for entry in entries if entry.size > PART_SIZE]
    small = [entry for entry in entries if entry.size <= PART_SIZE]
    return [
        answer
        for group in in_threads(work, (large, LARGE_AT_ONCE), (small, SMALL_AT_ONCE))
        for answer in group
    ]


def check_space(folder: Path, size: int, target: Path) -> None:
    """Raise StorageError if the disk of `folder` lacks room for a download of `size` bytes."""
    try:
        check_free_space(folder, size, repr(str(target)), spare=SPARE_SPACE)
    except OSError as error:
        raise StorageError(f"{error.strerror}.") from None
