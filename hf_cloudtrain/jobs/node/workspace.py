"""The copy of the folder that a person gives with a job."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.node.ignore_files import OWN, Rules
from hf_cloudtrain.runtime.files import is_left_over, temp_suffix

LARGE = 10**9
"""Bytes from which on a person is told what is large: a job's code is seldom more than its libraries."""
SHOWN = 3
"""Largest folders that are named."""
CHUNK = 64 * 2**20
"""Bytes copied between two calls of `on_bytes`."""
SPACE_LEFT = 16 * 2**20
"""Bytes of the disk that a copy must leave."""


@dataclass(frozen=True)
class Copied:
    """What a copy holds, or would hold.

    Example:
        >>> found = workspace_size(Path("glue"))
        >>> found.files, found.size
        (12, 48213)
    """

    files: int
    size: int
    """Bytes of all files."""
    left_out: tuple[str, ...] = ()
    """What is not copied although no ignore file says so, each with the reason."""
    largest: tuple[tuple[str, int], ...] = ()
    """Largest files and folders at the top, with their bytes."""

    @property
    def advice(self) -> str | None:
        """What to do about a workspace of more than 1 GB; None for others."""
        if self.size <= LARGE:
            return None
        named = ", ".join(f"{name} ({_gigabytes(size)})" for name, size in self.largest)
        return (
            f"The workspace has {_gigabytes(self.size)} in {self.files} files, and each job gets a copy; the largest: "
            f"{named}. Name what the job does not need in {OWN}, which is written as .gitignore is; data belongs into a "
            "dataset (`cloudtrain data create`)."
        )


def copy_workspace(
    source: Path,
    target: Path,
    *,
    leave_out: Iterable[Path] = (),
    on_bytes: Callable[[int], None] | None = None,
) -> Copied:
    """Copy a folder, without what its ignore files leave out. The target appears whole or not at all.

    Links within the folder stay links; those that lead out of it lead to the same place still, and are named. File modes
    and times stay. Blocks are shared with the source where the file system can.

    Args:
        source: the folder.
        target: the copy; it does not exist yet, or is an empty folder. It may be inside of the source.
        leave_out: further folders that are no part of it, such as the store where jobs are kept.
        on_bytes: hears of each file's bytes as they are copied.

    Raises:
        ConfigurationError: the source is no folder.
        OSError: a file cannot be read or written, or the disk has no room.
    """
    walk = _Walk.of(source, (target, *leave_out))
    copied = walk.copied()
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target)
    _check_free_space(target.parent, copied.size)
    beside = target.with_name(f".{target.name}-{temp_suffix()}")
    try:
        beside.mkdir()
        for folder in walk.folders:
            (beside / folder).mkdir()
        for path, _ in walk.files:
            _copy(source / path, beside / path, on_bytes or _nobody)
        for path, leads_to in walk.links:
            os.symlink(leads_to, beside / path)
        for folder in reversed(walk.folders):
            _copy_facts(source / folder, beside / folder, stat.S_IRWXU)
        os.rename(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return copied


def workspace_size(source: Path, *, leave_out: Iterable[Path] = ()) -> Copied:
    """What `copy_workspace` would copy. Raises ConfigurationError, OSError."""
    return _Walk.of(source, leave_out).copied()


@dataclass
class _Walk:
    """All that belongs to a copy, by path from the source."""

    source: Path
    omitted: frozenset[tuple[int, int]]
    """Folders that are no part of it, by device and inode."""
    folders: list[str] = field(default_factory=list)
    files: list[tuple[str, int]] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: Path, omitted: Iterable[Path]) -> _Walk:
        if not source.is_dir():
            raise ConfigurationError(
                f"{str(source)!r} is no folder. Name the one with the job's code: -d DIR"
            )
        top = source.resolve()
        if any(top == place.resolve() for place in omitted):
            raise ConfigurationError(
                f"{str(source)!r} is where jobs are kept. Name the folder with the job's code: -d DIR"
            )
        walk = cls(top, frozenset(_identity(place) for place in omitted if place.exists()))
        walk._add("", Rules.of(top))
        return walk

    def copied(self) -> Copied:
        sizes: Counter[str] = Counter()
        for path, size in self.files:
            sizes[path.split("/")[0]] += size
        return Copied(len(self.files), sizes.total(), tuple(self.left_out), tuple(sizes.most_common(SHOWN)))

    def _add(self, below: str, rules: Rules) -> None:
        try:
            with os.scandir(self.source / below) as found:
                items = sorted(found, key=lambda item: item.name)
        except PermissionError:
            self.left_out.append(f"{below} (cannot be read)")
            return
        if below:
            self.folders.append(below)
        for item in items:
            self._add_item(f"{below}/{item.name}" if below else item.name, item, rules)

    def _add_item(self, path: str, item: os.DirEntry[str], rules: Rules) -> None:
        try:
            found = item.stat(follow_symlinks=False)
        except FileNotFoundError:  # gone meanwhile
            return
        is_folder = stat.S_ISDIR(found.st_mode)
        if rules.leaves_out(item.name, is_folder=is_folder) or (found.st_dev, found.st_ino) in self.omitted:
            return
        if stat.S_ISLNK(found.st_mode):
            self._add_link(path)
        elif is_folder and item.name not in rules.asked_for and os.path.exists(f"{item.path}/pyvenv.cfg"):
            self.left_out.append(f"{path} (a virtual environment: its programs work where it was made)")
        elif is_folder:
            self._add(path, rules.below(item.name))
        elif not stat.S_ISREG(found.st_mode):
            self.left_out.append(f"{path} (no file, folder or link)")
        elif not os.access(item.path, os.R_OK):
            self.left_out.append(f"{path} (cannot be read)")
        else:
            self.files.append((path, found.st_size))

    def _add_link(self, path: str) -> None:
        written = os.readlink(self.source / path)
        leads_to = os.path.realpath(self.source / path)
        if not os.path.exists(leads_to):
            self.left_out.append(f"{path} (a link to {written!r}, where nothing is)")
            return
        inside = os.path.relpath(leads_to, self.source)
        if inside.split("/")[0] == "..":
            self.left_out.append(
                f"{path} (a link out of the workspace: the copy has the link, to {leads_to!r})"
            )
            self.links.append((path, leads_to))
        elif os.path.isabs(written) or os.path.normpath(
            os.path.join(os.path.dirname(path), written)
        ).startswith(".."):
            # Written so that it would lead out of the copy, back into the source.
            self.links.append((path, os.path.relpath(inside, os.path.dirname(path) or ".")))
        else:
            self.links.append((path, written))


# --- Copies ------------------------------------------------------------------------------------------------------------


def _copy(source: Path, target: Path, on_bytes: Callable[[int], None]) -> None:
    try:
        with open(source, "rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
            for count in _copy_blocks(reader.fileno(), writer.fileno()):
                on_bytes(count)
    except FileNotFoundError:  # gone meanwhile
        return
    _copy_facts(source, target, 0)


def _copy_blocks(reader: int, writer: int) -> Iterator[int]:
    """Copy by the file system, which may share the blocks, and else by reading.

    https://man7.org/linux/man-pages/man2/copy_file_range.2.html
    """
    shares = hasattr(os, "copy_file_range")
    while True:
        try:
            count = (
                os.copy_file_range(reader, writer, CHUNK)
                if shares
                else os.sendfile(writer, reader, None, CHUNK)
            )
        except OSError as error:
            if not shares or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            shares = False  # not between these file systems; what was copied stays, and both offsets with it
            continue
        if not count:
            return
        yield count


def _copy_facts(source: Path, target: Path, at_least: int) -> None:
    try:
        found = source.stat()
    except FileNotFoundError:
        return
    os.chmod(target, found.st_mode & 0o777 | at_least)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _check_free_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + SPACE_LEFT:
        raise OSError(
            errno.ENOSPC,
            f"The workspace has {_gigabytes(size)}, and {_gigabytes(free)} are free there. Name what the job does not need "
            f"in {OWN}, or make room",
            str(folder),
        )


def _clean(target: Path) -> None:
    """Take away the halves of processes that are no more."""
    for left in target.parent.glob(f".{target.name}-*"):
        if is_left_over(left.name):
            shutil.rmtree(left, ignore_errors=True)


def _identity(place: Path) -> tuple[int, int]:
    found = place.stat()
    return found.st_dev, found.st_ino


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _nobody(count: int) -> None:
    pass
