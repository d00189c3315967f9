"""The files of a folder that a checkpoint can hold, and what it cannot hold: named in a warning at the first save.

A checkpoint holds readable files under names that every storage takes. Links to files and folders are followed, without
going round in circles; FIFOs, sockets, devices, broken links and other names are left out.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hf_cloudtrain.errors import ManifestError
from hf_cloudtrain.storage.names import LOCAL, META, clean_path

logger = logging.getLogger(__name__)

TEMPORARY = re.compile(r".*(~|\.tmp|\.part|\.partial|\.incomplete)|\.(tmp|nfs).*|tmp[a-z0-9_]{8}")
"""Names of unfinished files: of editors, downloads, NFS, and the `tempfile` modules of Python and Rust."""
NAMED = 10
"""Paths that one warning names."""
UNREADABLE = "it cannot be read"
KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)

_Identity = tuple[int, int]
LeftOut = dict[str, str]
"""Why each path is not stored."""
_told: set[tuple[str, str, str]] = set()
"""What was named already: each folder of checkpoints, path and reason."""


class Found(NamedTuple):
    """A file of a folder."""

    path: str
    """Relative to the folder."""
    there: os.stat_result
    is_link: bool
    """Whether the path is a symbolic link to the file."""


def found_files(source: Path, since_ns: int, left_out: LeftOut | None = None) -> Iterator[Found]:
    """The files of a folder that was just saved, without those last written before `since_ns` (ns).

    Args:
        left_out: receives what a checkpoint cannot hold; None: unreadable files and all names are handed out as well.
    """
    return (found for found in _Walk(source, left_out).files() if found.there.st_mtime_ns >= since_ns)


def fresh_files(source: Path, since_ns: int, left_out: LeftOut | None = None) -> Iterator[str]:
    """The paths of the same files."""
    return (found.path for found in found_files(source, since_ns, left_out))


def own_files(source: Path, since_ns: int = 0, left_out: LeftOut | None = None) -> Iterator[str]:
    """The same for a folder that is written again and again: also without links to folders and temporary files."""
    for path, there, _ in _Walk(source, left_out, follow=False).files():
        if not TEMPORARY.fullmatch(os.path.basename(path)) and there.st_mtime_ns >= since_ns:
            yield path


def tell_left_out(source: Path, left_out: LeftOut) -> None:
    """Name what a save does not store, each path once for all checkpoints beside each other."""
    new = {
        path: reason
        for path, reason in left_out.items()
        if not TEMPORARY.fullmatch(os.path.basename(path)) and (str(source.parent), path, reason) not in _told
    }
    if not new:
        return
    _told.update((str(source.parent), path, reason) for path, reason in new.items())
    shown = ", ".join(f"{path!r} ({reason})" for path, reason in list(new.items())[:NAMED])
    more = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
    logger.warning(
        "Not stored of %r: %s%s. Stored are readable files whose names have no backslash, no control character and no byte that is "
        "not UTF-8. If a resume needs them, rename them, make them readable, or replace links by copies.",
        str(source),
        shown,
        more,
    )


class _Folder(NamedTuple):
    path: str
    chain: tuple[_Identity, ...]
    """Itself, and the folders below the source that the walk came through."""
    is_linked: bool
    """Whether one of them is a link."""


class _Walk:
    """One walk through a folder, without our own folders."""

    def __init__(self, source: Path, left_out: LeftOut | None, *, follow: bool = True) -> None:
        self._source = source
        self._left_out: LeftOut = {} if left_out is None else left_out
        self._strict = left_out is not None
        self._follow = follow
        self._seen: set[_Identity] = set()
        self._twice: dict[str, str] = {}

    @functools.cached_property
    def _above(self) -> set[_Identity]:
        """The source and the folders above it. Only links lead there."""
        root = self._source.resolve()
        return {_identity(os.stat(folder)) for folder in (root, *root.parents)}

    def files(self) -> Iterator[Found]:
        """All files. Few calls of the system: training waits for this walk at each save."""
        stack = [_Folder("", (), False)]
        while stack:
            folder = stack.pop()
            for item in self._items(folder.path):
                path = f"{folder.path}/{item.name}" if folder.path else item.name
                there = None if path in (LOCAL, META) else self._stat(item, path)
                if there is None:
                    continue
                if stat.S_ISREG(there.st_mode):
                    yield Found(path, there, item.is_symlink())
                elif stat.S_ISDIR(there.st_mode):
                    stack.extend(self._enter(folder, path, _identity(there), item.is_symlink()))
        if self._strict:
            _tell_twice(self._source, self._twice)

    def _items(self, below: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(os.path.join(self._source, below)) as items:
                return list(items)
        except PermissionError:
            if not (self._strict and below):
                raise
            self._left_out[below] = UNREADABLE
            return []

    def _stat(self, item: os.DirEntry[str], path: str) -> os.stat_result | None:
        """What a name leads to; None where a checkpoint cannot hold it."""
        try:
            there = item.stat()
        except OSError as error:
            if item.is_symlink():
                self._left_out[path] = "a link to itself" if error.errno == errno.ELOOP else "a broken link"
            return None  # else deleted since the listing
        reason = self._reason(path, there) if self._strict else None
        if reason is not None:
            self._left_out[path] = reason
        return None if reason else there

    def _reason(self, path: str, there: os.stat_result) -> str | None:
        mode = there.st_mode
        is_file = stat.S_ISREG(mode)
        if not is_file:
            for is_kind, name in KINDS:
                if is_kind(mode):
                    return name
        try:
            clean_path(path)
        except ManifestError:
            return "its name"
        if is_file and not os.access(os.path.join(self._source, path), os.R_OK):
            return UNREADABLE
        return None

    def _enter(self, above: _Folder, path: str, identity: _Identity, is_link: bool) -> Iterator[_Folder]:
        if is_link and not self._follow:
            self._left_out[path] = "a link to a folder"
        elif (is_link or above.is_linked) and (identity in above.chain or identity in self._above):
            self._left_out[path] = "a link to a folder that contains it"
        elif is_link and above.is_linked and identity in self._seen:  # links to one another would multiply
            self._left_out[path] = "a link to a folder that is stored already"
        else:
            if is_link and (target := _inside(self._source, path)):
                self._twice[path] = target
            self._seen.add(identity)
            yield _Folder(path, (*above.chain, identity), above.is_linked or is_link)


def _identity(there: os.stat_result) -> _Identity:
    return there.st_dev, there.st_ino


def _inside(source: Path, path: str) -> str | None:
    """The folder of `source` that a link leads to; None if it leads outside."""
    target, root = os.path.realpath(source / path), os.path.realpath(source)
    return os.path.relpath(target, root) if target.startswith(f"{root}{os.sep}") else None


def _tell_twice(source: Path, twice: dict[str, str]) -> None:
    for path, target in list(twice.items())[:NAMED]:
        key = (str(source.parent), path, target)
        if key not in _told:
            _told.add(key)
            logger.warning(
                "%r in %r is a link to %r, so the files of that folder are stored twice. Delete the link to store them once.",
                path,
                str(source),
                target,
            )
