"""The copy of the folder that is submitted with a job."""

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
from hf_cloudtrain.runtime.files import check_free_space, is_left_over, temp_suffix
from hf_cloudtrain.runtime.text import size_text

LARGE = 10**9
"""Bytes above which the user learns what is large: a job's code is rarely larger than its libraries."""
SHOWN = 3
"""Largest files and folders that are named."""
CHUNK = 64 * 2**20
"""Bytes copied between two calls of `on_bytes`."""


@dataclass(frozen=True)
class Copied:
    """What a copy contains, or would contain."""

    files: int
    size: int
    """Bytes of all files."""
    skipped: tuple[str, ...] = ()
    """What is not copied, or not as it is, although no ignore file excludes it: each with the reason."""
    largest: tuple[tuple[str, int], ...] = ()
    """Largest files and folders of the top level, with their bytes."""

    @property
    def advice(self) -> str | None:
        """What to do about a workspace larger than 1 GB; None for a smaller one."""
        if self.size <= LARGE:
            return None
        named = ", ".join(f"{name} ({size_text(size)})" for name, size in self.largest)
        return (
            f"The workspace has {size_text(self.size)} in {self.files} files, and each job gets a copy. The largest are "
            f"{named}. Exclude what the job does not need in {OWN}, which has the syntax of .gitignore, and upload data "
            "as a dataset (`cloudtrain data create`)."
        )


def copy_workspace(
    source: Path,
    target: Path,
    *,
    leave_out: Iterable[Path] = (),
    on_bytes: Callable[[int], None] | None = None,
) -> Copied:
    """Copy a folder without what its ignore files exclude. The target appears complete or not at all.

    Links inside the folder stay links; links out of it keep their target and are reported. File modes and times stay.
    The copy shares blocks with the source where the file system supports it.

    Args:
        source: the folder.
        target: the copy: a path that does not exist yet, or an empty folder. It may be inside the source.
        leave_out: more folders to exclude, such as the store with the jobs.
        on_bytes: called with the number of bytes after each piece is copied.

    Raises:
        ConfigurationError: the source is not a folder.
        OSError: a file cannot be read or written, or the disk is full.
    """
    walk = _Walk.of(source, (target, *leave_out))
    copied = walk.copied()
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target)
    remedy = f"Exclude what the job does not need in {OWN}, or free some space"
    check_free_space(target.parent, copied.size, "The copy of the workspace", remedy=remedy)
    beside = target.with_name(f".{target.name}-{temp_suffix()}")
    try:
        beside.mkdir()
        for folder in walk.folders:
            (beside / folder).mkdir()
        for path, _ in walk.files:
            _copy(source / path, beside / path, on_bytes or (lambda count: None))
        for path, destination in walk.links:
            os.symlink(destination, beside / path)
        for folder in reversed(walk.folders):
            _copy_metadata(source / folder, beside / folder, stat.S_IRWXU)
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
    """Everything that belongs to a copy, by path relative to the source."""

    source: Path
    omitted: frozenset[tuple[int, int]]
    """Folders to exclude, by device and inode."""
    folders: list[str] = field(default_factory=list)
    files: list[tuple[str, int]] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: Path, omitted: Iterable[Path]) -> _Walk:
        advice = "Name the folder with the job's code: -d DIR"
        if not source.is_dir():
            raise ConfigurationError(f"{str(source)!r} is not a folder. {advice}")
        top = source.resolve()
        if any(top == folder.resolve() for folder in omitted):
            raise ConfigurationError(f"{str(source)!r} is where jobs are stored. {advice}")
        found = [folder.stat() for folder in omitted if folder.exists()]
        walk = cls(top, frozenset((one.st_dev, one.st_ino) for one in found))
        walk._add("", Rules.of(top))
        return walk

    def copied(self) -> Copied:
        sizes: Counter[str] = Counter()
        for path, size in self.files:
            sizes[path.split("/")[0]] += size
        return Copied(len(self.files), sizes.total(), tuple(self.skipped), tuple(sizes.most_common(SHOWN)))

    def _add(self, below: str, rules: Rules) -> None:
        try:
            with os.scandir(self.source / below) as found:
                items = sorted(found, key=lambda item: item.name)
        except PermissionError:
            self.skipped.append(f"{below} (cannot be read)")
            return
        if below:
            self.folders.append(below)
        for item in items:
            self._add_item(f"{below}/{item.name}" if below else item.name, item, rules)

    def _add_item(self, path: str, item: os.DirEntry[str], rules: Rules) -> None:
        try:
            found = item.stat(follow_symlinks=False)
        except FileNotFoundError:  # deleted since the folder was listed
            return
        is_folder = stat.S_ISDIR(found.st_mode)
        if rules.excludes(item.name, is_folder=is_folder) or (found.st_dev, found.st_ino) in self.omitted:
            return
        if stat.S_ISLNK(found.st_mode):
            self._add_link(path)
        elif is_folder and item.name not in rules.included and os.path.exists(f"{item.path}/pyvenv.cfg"):
            self.skipped.append(f"{path} (a virtual environment: it works only at its own path)")
        elif is_folder:
            self._add(path, rules.below(item.name))
        elif not stat.S_ISREG(found.st_mode):
            self.skipped.append(f"{path} (not a file, folder or link)")
        elif not os.access(item.path, os.R_OK):
            self.skipped.append(f"{path} (cannot be read)")
        else:
            self.files.append((path, found.st_size))

    def _add_link(self, path: str) -> None:
        written = os.readlink(self.source / path)
        destination = os.path.realpath(self.source / path)
        if not os.path.exists(destination):
            self.skipped.append(f"{path} (a broken link to {written!r})")
            return
        inside = os.path.relpath(destination, self.source)
        as_written = os.path.normpath(os.path.join(os.path.dirname(path), written))
        if inside.split("/")[0] == "..":
            text = f"a link out of the workspace; only the link to {destination!r} is copied"
            self.skipped.append(f"{path} ({text})")
            self.links.append((path, destination))
        elif os.path.isabs(written) or as_written.startswith(".."):
            # As it is written, it would lead out of the copy, back into the source.
            self.links.append((path, os.path.relpath(inside, os.path.dirname(path) or ".")))
        else:
            self.links.append((path, written))


def _copy(source: Path, target: Path, on_bytes: Callable[[int], None]) -> None:
    try:
        with open(source, "rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
            for count in _copy_blocks(reader.fileno(), writer.fileno()):
                on_bytes(count)
    except FileNotFoundError:  # deleted since the folder was listed
        return
    _copy_metadata(source, target, 0)


def _copy_blocks(reader: int, writer: int) -> Iterator[int]:
    """Let the file system copy, which may share blocks; where it cannot, let the kernel read and write.

    https://man7.org/linux/man-pages/man2/copy_file_range.2.html
    """
    copies = hasattr(os, "copy_file_range")
    while True:
        try:
            count = (
                os.copy_file_range(reader, writer, CHUNK)
                if copies
                else os.sendfile(writer, reader, None, CHUNK)
            )
        except OSError as error:
            if not copies or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            copies = False  # not between these two; what was copied stays, and so do both offsets
            continue
        if not count:
            return
        yield count


def _copy_metadata(source: Path, target: Path, at_least: int) -> None:
    try:
        found = source.stat()
    except FileNotFoundError:
        return
    os.chmod(target, found.st_mode & 0o777 | at_least)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _clean(target: Path) -> None:
    """Delete the incomplete copies of processes that were killed."""
    for folder in target.parent.glob(f".{target.name}-*"):
        if is_left_over(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
