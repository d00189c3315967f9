"""From the folder that was just written to one that nobody writes: links where that is safe, copies elsewhere."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_cloudtrain.storage.names import META, clean_path

logger = logging.getLogger(__name__)

SMALL_FILE = 2**20
"""Bytes below which a file is copied: the JSON and rng files that frameworks rewrite in place."""
SMALL_TOTAL = 16 * 2**20
"""Bytes that all copies of one save may have: 10 ms. The rest is linked."""
FICLONE = 0x40049409
"""The request that makes a file share another's blocks until one is written: _IOW(0x94, 9, int) of <linux/fs.h>."""
TEMPORARY = re.compile(r".*(~|\.tmp|\.part|\.partial|\.incomplete)|\.(tmp|nfs).*|tmp[a-z0-9_]{8}")
"""Names of files that somebody is still writing: editors, downloads, NFS, and the `tempfile` modules of Python and Rust."""


@dataclass(frozen=True)
class AcceptedFile:
    """One file as it looked when it was accepted."""

    path: str
    size: int
    inode: int
    mtime_ns: int

    @classmethod
    def of(cls, folder: Path, path: str) -> AcceptedFile:
        """A file of a folder as it looks now."""
        found = os.stat(folder / path)
        return cls(path, found.st_size, found.st_ino, found.st_mtime_ns)


def freeze(
    source: Path, target: Path, since_ns: int, wanted: Callable[[str], bool] = lambda path: True
) -> tuple[AcceptedFile, ...]:
    """Links to a folder's files that are wanted by path, and copies of small ones; not those that `fresh_files` omits."""
    accepted = []
    copied = 0
    link_failed: OSError | None = None
    for path in _files_below(source):
        found = os.stat(source / path)
        if found.st_mtime_ns < since_ns or not wanted(path):
            continue
        clean_path(path)
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        small = found.st_size < SMALL_FILE and copied + found.st_size <= SMALL_TOTAL
        if not small:
            link_failed = _link(source / path, target / path)
        if small or link_failed:
            _copy(source / path, target / path, found.st_size)
            copied += found.st_size
        accepted.append(AcceptedFile.of(target, path))
    if link_failed is not None:
        logger.warning(
            "Files of %r were copied, because the disk cannot link them (%s): saving takes longer.",
            str(source),
            link_failed.strerror,
        )
    return tuple(accepted)


def copy_out(
    source: Path, target: Path, wanted: Callable[[str], bool] = lambda path: True
) -> tuple[AcceptedFile, ...]:
    """Copies of a folder's own files that are wanted by path, none of which shares an inode with its source.

    Raises:
        OSError: the disk is full, or a file was written meanwhile.
    """
    found = {path: os.stat(source / path) for path in own_files(source) if wanted(path)}
    left = sum(stat.st_size for stat in found.values())
    clones = True
    accepted = []
    for path, stat in found.items():
        clean_path(path)
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        clones = clones and _clone(source / path, target / path)
        if not clones:
            _check_free_space(target, left, source)
            shutil.copyfile(source / path, target / path)
        left -= stat.st_size
        if _looks(os.stat(source / path)) != _looks(stat):
            raise OSError(errno.EBUSY, "It was written while it was copied", str(source / path))
        accepted.append(AcceptedFile.of(target, path))
    return tuple(accepted)


def fresh_files(source: Path, since_ns: int) -> Iterator[str]:
    """Relative paths in a folder that was just saved, without what was last written before `since_ns` (ns)."""
    return (path for path in _files_below(source) if os.stat(source / path).st_mtime_ns >= since_ns)


def own_files(source: Path, since_ns: int = 0) -> Iterator[str]:
    """Relative paths in a folder that its owner writes again and again.

    Neither links to folders nor temporary files, nor what was last written before `since_ns`.
    """
    for path in _files_below(source, follow=False):
        if not TEMPORARY.fullmatch(os.path.basename(path)) and os.stat(source / path).st_mtime_ns >= since_ns:
            yield path


def _looks(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _clone(source: Path, target: Path) -> bool:
    """Make `target` share the blocks of `source`; False where the file system cannot."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        except OSError:  # which one is for each file system to choose; the copy says what is really wrong
            return False
    return True


def _files_below(source: Path, *, follow: bool = True) -> Iterator[str]:
    """Relative paths of all files, without our own folder.

    Args:
        follow: whether to go into folders by links; in a folder of the user's own they may lead round in a circle.
    """
    stack = [""]
    while stack:
        below = stack.pop()
        with os.scandir(source / below) as items:
            for item in items:
                path = f"{below}/{item.name}" if below else item.name
                if path == META:
                    continue
                if item.is_dir(follow_symlinks=follow):
                    stack.append(path)
                elif item.is_file():
                    yield path


def _link(source: Path, target: Path) -> OSError | None:
    try:
        # A link to what a symbolic link names: the checkpoint holds files, not links.
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
            return error
        raise
    return None


def _copy(source: Path, target: Path, size: int) -> None:
    if size >= SMALL_FILE:
        _check_free_space(target.parent, size, source)
    shutil.copyfile(source, target)


def _check_free_space(folder: Path, size: int, source: Path) -> None:
    if shutil.disk_usage(folder).free < size + SMALL_TOTAL:
        raise OSError(errno.ENOSPC, f"No space is left to copy {str(source)!r} ({size} bytes)")
