"""A saved folder, frozen in the outbox: how its files are linked or copied, how each looked, and what is known of it.

Large files are hard links and small ones copies, as long as all copies of a save are small; a folder that is written again
and again is copied whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.exactness import Exactness
from hf_cloudtrain.checkpoints.manifest import (
    CheckpointKey,
    FileEntry,
    Manifest,
    Position,
    as_exact,
    decode_record,
    encode_record,
)
from hf_cloudtrain.errors import CorruptCheckpointError, ManifestError
from hf_cloudtrain.runtime.files import boot_id, check_free_space
from hf_cloudtrain.runtime.provenance import origin
from hf_cloudtrain.runtime.values import utf8
from hf_cloudtrain.storage.folder_files import LeftOut, found_files, own_files, tell_left_out
from hf_cloudtrain.storage.names import clean_path

logger = logging.getLogger(__name__)

SMALL_FILE = 2**20
"""Bytes below which a file is copied: the JSON and rng files that frameworks rewrite in place."""
SMALL_TOTAL = 16 * 2**20
"""Bytes of all copies of one save: 10 ms. The rest is linked."""
FICLONE = 0x40049409
"""The request to share the blocks of a file until one of them is written: _IOW(0x94, 9, int) of <linux/fs.h>."""


NOT_FINITE = "not_finite"
"""The key in the origin of a manifest that names metrics which were NaN or infinite."""

Wanted = Callable[[str], bool]
"""Which files of a checkpoint a disk takes or gives, by path."""
ALL_FILES: Wanted = lambda path: True  # noqa: E731


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
        found = os.stat(os.path.join(folder, path))
        return cls(path, found.st_size, found.st_ino, found.st_mtime_ns)

    def is_unchanged(self, path: Path, *, restarted: bool) -> bool:
        """Whether the file at `path` is still what was accepted.

        Args:
            restarted: whether the machine went down since: then blocks of the file may never have reached the disk.
        """
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return False
        same = (found.st_ino, found.st_size, found.st_mtime_ns) == (self.inode, self.size, self.mtime_ns)
        return same and not (restarted and _has_hole(path, self.size))


@dataclass(frozen=True)
class OutboxEntry:
    """One saved, not yet committed folder of this host."""

    run_url: str
    key: CheckpointKey
    nonce: str
    position: Position
    exclusive: bool = True
    """Whether the storage honoured exclusive create when the attempt began."""
    exact: bool | None = True
    inexact_reason: str | None = None
    created: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    best: bool = False
    """Whether it was the best when it was saved: never dropped, and `best.json` will point at it."""
    name: str | None = None
    """Of a folder that is not a checkpoint (`cloud.save`)."""
    host: int = 0
    hosts: int = 1
    """This host's part of a checkpoint of several hosts."""
    save: int = 1
    """If hosts have disks of their own: how often this attempt had saved the step then, this save included."""
    origin: dict[str, str] = field(default_factory=dict)
    boot: str = ""
    """The boot id of the machine when it was accepted: what was not on the disk when the machine went down is lost."""
    files: tuple[AcceptedFile, ...] = ()
    home: Path = Path()
    """The entry's own folder."""

    @classmethod
    def new(
        cls,
        run_url: str,
        attempt: Attempt,
        position: Position,
        exactness: Exactness,
        metrics: dict[str, float],
        best: bool,
    ) -> OutboxEntry:
        """The entry of a save of an attempt, before it is accepted."""
        return cls(
            run_url=run_url,
            key=CheckpointKey(attempt.number, position.global_step),
            nonce=f"{attempt.nonce}-{position.global_step}",
            position=position,
            exclusive=attempt.exclusive,
            exact=exactness.exact,
            inexact_reason=exactness.reason,
            created=time.time(),
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            best=best,
            origin={**origin(), **_not_finite(metrics), **attempt.trained},
        )

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.name or f"checkpoint-{self.key.step}"

    def tell_exactness(self, told: set[Exactness]) -> None:
        """Log why a resume from here may differ, while settings can still be changed.

        Args:
            told: what was logged in this attempt: a reason comes once, and again only if it is certain now.
        """
        found = Exactness(self.exact, self.inexact_reason)
        if found.exact is True or not told.isdisjoint((found, found._replace(exact=False))):
            return
        told.add(found)
        logger.log(found.level, "%s: %s", self.title, found.sentence)

    def local_path(self, file: AcceptedFile) -> Path:
        """Where the bytes are."""
        return self.home / "files" / file.path

    def check_unchanged(self) -> None:
        """Raise CorruptCheckpointError if a file differs from what was accepted."""
        restarted = self.boot != boot_id()
        for file in self.files:
            if file.is_unchanged(self.local_path(file), restarted=restarted):
                continue
            reason = (
                "is not what was saved: it was written again since, or had not reached the disk when this machine went down"
                if restarted
                else "was written again after it was saved"
            )
            raise CorruptCheckpointError(
                f"{file.path!r} of {self.title} (attempt {self.key.attempt}) {reason}, so {str(self.home)!r} cannot be "
                "committed."
            )

    def manifest(self, key: str, folder: str, files: list[FileEntry]) -> Manifest:
        """The manifest that commits it."""
        return Manifest(
            key=key,
            folder=folder,
            attempt=self.key.attempt,
            step=self.key.step,
            nonce=self.nonce,
            files=tuple(files),
            position=self.position,
            exact=self.exact,
            inexact_reason=self.inexact_reason,
            created=self.created,
            metrics=self.metrics,
            origin=self.origin,
        )

    def encode(self) -> bytes:
        """The JSON in `entry.json`."""
        # As `dataclasses.asdict`, whose copies take longer than the rest: training waits for this.
        record = {**vars(self), "position": vars(self.position), "files": [*map(vars, self.files)]}
        del record["home"], record["key"]
        return encode_record({"attempt": self.key.attempt, "step": self.key.step, **record})

    @classmethod
    def read(cls, home: Path) -> OutboxEntry:
        """The entry in a folder of the outbox. Raises ManifestError, OSError."""
        return cls.decode((home / "entry.json").read_bytes(), f"outbox entry {home.name!r}", home)

    @classmethod
    def decode(cls, data: bytes, what: str, home: Path = Path()) -> OutboxEntry:
        """The entry in what `encode` made. Raises ManifestError."""
        record = decode_record(data, what)
        try:
            files = tuple(
                AcceptedFile(
                    clean_path(item["path"]), int(item["size"]), int(item["inode"]), int(item["mtime_ns"])
                )
                for item in record["files"]
            )
            return cls(
                run_url=str(record["run_url"]),
                key=CheckpointKey(int(record["attempt"]), int(record["step"])),
                nonce=str(record["nonce"]),
                position=Position.parse(record["position"], what),
                exclusive=bool(record["exclusive"]),
                exact=as_exact(record["exact"]),
                inexact_reason=record["inexact_reason"],
                created=float(record["created"]),
                metrics=dict(record["metrics"]),
                best=bool(record["best"]),
                name=record["name"],
                host=int(record["host"]),
                hosts=int(record["hosts"]),
                save=int(record.get("save", 1)),
                origin=dict(record["origin"]),
                boot=str(record.get("boot", "")),
                files=files,
                home=home,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ManifestError(f"The {what} is damaged ({error!r}).") from None


def _not_finite(metrics: dict[str, float]) -> dict[str, str]:
    """The metrics that a manifest, whose numbers are finite, cannot hold; for its origin."""
    names = [f"{utf8(name)} ({value})" for name, value in metrics.items() if not math.isfinite(value)]
    return {NOT_FINITE: ", ".join(names)[:1000]} if names else {}


def freeze(source: Path, target: Path, since_ns: int, wanted: Wanted = ALL_FILES) -> tuple[AcceptedFile, ...]:
    """Link the files of a folder that are wanted, and copy small ones; without those that `found_files` omits."""
    accepted = []
    copied = 0
    link_failed: OSError | None = None
    left_out: LeftOut = {}
    folders = {""}
    for path, there, is_link in found_files(source, since_ns, left_out):
        if not wanted(path):
            continue
        if (parent := os.path.dirname(path)) not in folders:
            os.makedirs(os.path.join(target, parent), exist_ok=True)
            folders.add(parent)
        old, new, size = os.path.join(source, path), os.path.join(target, path), there.st_size
        small = size < SMALL_FILE and copied + size <= SMALL_TOTAL
        if not small:
            link_failed = _link(os.path.realpath(old) if is_link else old, new)
        if small or link_failed:
            _copy(old, new, size)
            copied += size
        accepted.append(AcceptedFile.of(target, path))
    tell_left_out(source, left_out)
    if link_failed is not None:
        logger.warning(
            "Files of %r were copied, because the disk cannot link them (%s): saving takes longer.",
            str(source),
            link_failed.strerror,
        )
    return tuple(accepted)


def copy_out(source: Path, target: Path, wanted: Wanted = ALL_FILES) -> tuple[AcceptedFile, ...]:
    """Copy the files of a folder that are wanted; no copy shares an inode with its source.

    Raises:
        OSError: the disk is full, or a file was written during the copy.
    """
    left_out: LeftOut = {}
    found = [AcceptedFile.of(source, path) for path in own_files(source, left_out=left_out) if wanted(path)]
    tell_left_out(source, left_out)
    left = sum(file.size for file in found)
    clones = True
    accepted = []
    for file in found:
        path = file.path
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        clones = clones and _clone(source / path, target / path)
        if not clones:
            check_free_space(target, left, f"A copy of {str(source)!r}")
            shutil.copyfile(source / path, target / path)
        left -= file.size
        if AcceptedFile.of(source, path) != file:
            raise OSError(errno.EBUSY, "It was written while it was copied", str(source / path))
        accepted.append(AcceptedFile.of(target, path))
    return tuple(accepted)


def _clone(source: Path, target: Path) -> bool:
    """Make `target` share the blocks of `source`; False if the file system cannot."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        except OSError:  # its number depends on the file system; the copy will raise what is really wrong
            return False
    return True


def _link(source: str, target: str) -> OSError | None:
    """Link a file, which must not be a symbolic link: the checkpoint holds files, not links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES):
            return error
        raise
    return None


def _copy(source: str, target: str, size: int) -> None:
    if size >= SMALL_FILE:
        check_free_space(Path(target).parent, size, f"A copy of {source!r}")
        shutil.copyfile(source, target)
        return
    # With half of the system calls of `copyfile`, for which training waits.
    with open(source, "rb", buffering=0) as reader:
        content = reader.readall()
    with open(target, "wb") as writer:
        writer.write(content)


def _has_hole(path: Path, size: int) -> bool:
    """Whether blocks of a file are missing, which read as zeros.

    safetensors sets a file's size before it writes: a power cut within half a minute of that leaves the right size and no
    blocks. No framework writes a checkpoint with holes on purpose.
    """
    with open(path, "rb", buffering=0) as file, contextlib.suppress(OSError):  # unknown to some file systems
        return size > 0 and os.lseek(file.fileno(), 0, os.SEEK_HOLE) < size
    return False
