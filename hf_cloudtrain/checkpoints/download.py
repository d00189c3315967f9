"""From a manifest to a verified local folder. No file is used before all of them are verified."""

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
from hf_cloudtrain.checkpoints.frozen import ALL_FILES, Wanted
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
from hf_cloudtrain.storage.folder_files import own_files
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)

LARGE_AT_ONCE = 2
SMALL_AT_ONCE = 8
RESTORED_AGE_NS = 10 * 10**9
"""How much older restored files are made to look: more than the clocks of disks and processes differ, or tick."""
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
        target: the folder to create; a folder that is there now moves aside first.
        on_bytes: receives the number of bytes as they arrive.

    Raises:
        CorruptCheckpointError: a file is missing, cut short or different from its digest.
        StorageError: the storage does not answer, or the disk is full.
    """
    entries = [entry for entry in manifest.files if wanted(entry.path)]
    work = target.parent / LOCAL / f"restore-{temp_suffix()}"
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
    """What is wrong with a checkpoint on storage, for people; empty if every byte is right. Reads everything, keeps nothing.

    Raises:
        StorageError: the storage does not answer, which says nothing about the checkpoint.
    """

    def check(entry: FileEntry) -> str | None:
        problem = _problem(catalog, manifest, entry, os.devnull, on_bytes)
        return f"{entry.path!r} {problem}" if problem else None

    return [text for text in _on_all(check, manifest.files) if text is not None]


def is_whole(
    folder: Path, manifest: Manifest, *, wanted: Wanted = ALL_FILES, originals: Path | None = None
) -> bool:
    """Whether a local folder holds exactly the files of a manifest.

    Args:
        originals: folder of files as they were saved, if they had to be changed on this machine; those count instead.
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
    """Move verified files into a folder that is written again and again; returns the names of the other files there.

    Each file is complete at any time, and looks older than what is written from now on. Other files stay.
    """
    ours = {entry.path for entry in manifest.files}
    before = time.time_ns() - RESTORED_AGE_NS
    for path in sorted(ours):
        if not (verified / path).exists():
            continue  # for the ranks of another disk
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.utime(verified / path, ns=(before, before))
            _replace(verified / path, target)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise ConfigurationError(
                f"{str(target)!r} cannot be restored ({error.strerror}). Move what is in its way, or choose a different "
                "checkpoint_dir."
            ) from error
    return sorted(set(own_files(folder)) - ours)


def _replace(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # A folder in the path is on another disk.
        beside = target.with_name(f".tmp-{temp_suffix()}")
        shutil.copy2(source, beside)
        os.replace(beside, target)


def move_aside(folder: Path) -> Path:
    """Move a local folder of a different history to `_cloudtrain/stale/`, where it replaces an older one of its name."""
    stale = folder.parent / LOCAL / "stale" / folder.name
    if stale.is_symlink():  # a link instead of a checkpoint: only the link goes
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
    # All names first: a download creates its file again, and for a moment there is no file of that name.
    for entry in entries:
        target = work / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            raise StorageError(
                f"{entry.path!r} of {manifest.folder} has the same name as another of its files on this disk, which does not "
                "distinguish 'a' from 'A'. Restore to a disk that does."
            ) from None

    def fetch(entry: FileEntry) -> None:
        problem = _problem(catalog, manifest, entry, str(work / entry.path), on_bytes)
        # Once more: an older checkpoint costs hours, and the fault may be the network, or a listing that lags.
        if problem and (problem := _problem(catalog, manifest, entry, str(work / entry.path))):
            raise CorruptCheckpointError(f"{entry.path!r} of {manifest.folder} {problem}.")

    _on_all(fetch, entries)


def _problem(
    catalog: Catalog,
    manifest: Manifest,
    entry: FileEntry,
    target: str,
    on_bytes: Callable[[int], None] | None = None,
) -> str | None:
    """Download a file; what is wrong with it, if anything."""
    try:
        digest = catalog.storage.download(manifest.object_path(entry), target, entry.size, on_bytes=on_bytes)
    except ObjectNotFoundError:
        return "is missing on storage"
    except ObjectTruncatedError:
        return f"is cut short on storage: {entry.size} bytes were committed"
    return None if digest == entry.digest else "differs from the digest in its manifest"


def _on_all(work: Callable[[FileEntry], Any], entries: Sequence[FileEntry]) -> list[Any]:
    """Do `work` on all files, two large ones and several small ones at once; answers of the large ones first."""
    large = [entry for entry in entries if entry.size > PART_SIZE]
    small = [entry for entry in entries if entry.size <= PART_SIZE]
    groups = in_threads(work, (large, LARGE_AT_ONCE), (small, SMALL_AT_ONCE))
    return [answer for group in groups for answer in group]


def check_space(folder: Path, size: int, target: Path) -> None:
    """Raise StorageError if the disk of `folder` lacks room for a download of `size` bytes."""
    try:
        check_free_space(folder, size, repr(str(target)), spare=SPARE_SPACE)
    except OSError as error:
        full = StorageError(f"{error.strerror}.")
        full.errno = error.errno  # as an argument, it would stand in front of the message
        raise full from None
