"""The local folder of saved, not yet committed checkpoints. What is in it survives rotation and SIGKILL.

    <output_dir>/.cloudtrain/outbox/000003-0000000500/
        entry.json      run URL, attempt, step, position, and how each file looked when it was accepted
        files/…         hard links to what the framework wrote; small files are copies

A hard link costs nothing and keeps the data when the framework rotates the folder away, but it shares its inode:
`torch.save` to the same path rewrites the file in place. So small files are copied, and inode, size and time are
looked at again before the commit. Who writes one path again and again gets copies of all files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.freeze import AcceptedFile, copy_out, freeze
from hf_cloudtrain.checkpoints.manifest import (
    CheckpointKey,
    Position,
    check_paths,
    decode_record,
    encode_record,
)
from hf_cloudtrain.errors import ConfigurationError, CorruptCheckpointError, ManifestError
from hf_cloudtrain.runtime.files import boot_id, is_left_over, locked, temp_suffix
from hf_cloudtrain.storage.names import META, clean_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutboxEntry:
    """One saved, not yet committed folder of this host."""

    run_url: str
    key: CheckpointKey
    nonce: str
    position: Position
    exclusive: bool = True
    """Whether the storage honoured exclusive create when the attempt began."""
    exact: bool = True
    inexact_reason: str | None = None
    created: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    best: bool = False
    """Whether it was the best when it was saved: never dropped, and `best.json` will point at it."""
    name: str | None = None
    """Set for a folder that is no checkpoint (`cloud.save`)."""
    host: int = 0
    hosts: int = 1
    """This host's part of a checkpoint that several hosts hold."""
    save: int = 1
    """Where hosts have disks of their own: how often this attempt had saved the step by then, this one included."""
    origin: dict[str, str] = field(default_factory=dict)
    boot: str = ""
    """The life of the machine in which it was accepted: what was not on the disk when that ended is lost."""
    files: tuple[AcceptedFile, ...] = ()
    home: Path = Path()
    """The entry's own folder."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def title(self) -> str:
        """What a person calls it."""
        return self.name or f"checkpoint-{self.key.step}"

    def local_path(self, file: AcceptedFile) -> Path:
        """Where the bytes are."""
        return self.home / "files" / file.path

    def check_unchanged(self) -> None:
        """Raise CorruptCheckpointError where a file is not what was accepted."""
        restarted = self.boot != boot_id()
        for file in self.files:
            path = self.local_path(file)
            try:
                found = os.stat(path)
            except FileNotFoundError:
                found = None
            changed = found is None or (found.st_ino, found.st_size, found.st_mtime_ns) != (
                file.inode,
                file.size,
                file.mtime_ns,
            )
            if changed or (restarted and _has_hole(path, file.size)):
                reason = (
                    "is not what was saved: it was written again since, or had not reached the disk when this machine went down"
                    if restarted
                    else "was written again after it was saved"
                )
                raise CorruptCheckpointError(
                    f"{file.path!r} of {self.title} (attempt {self.key.attempt}) {reason}, so {str(self.home)!r} cannot be "
                    "committed."
                )


class Outbox:
    """The outbox of one output folder.

    Example:
        >>> outbox = Outbox(Path("out"))
        >>> entry = outbox.accept(Path("out/checkpoint-500"), entry)   # a few milliseconds
        >>> [entry.title for entry in outbox.entries()]
        ['checkpoint-500']
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / META / "outbox"
        # The uploader must not take away what a save puts under the same name at the same moment.
        self._moving = threading.Lock()

    def accept(
        self,
        source: Path,
        entry: OutboxEntry,
        *,
        since_ns: int = 0,
        link: bool = True,
        wanted: Callable[[str], bool] = lambda path: True,
    ) -> OutboxEntry:
        """Freeze a folder that was just written. Afterwards its files may be rotated away.

        Args:
            since_ns: modification time in ns; files last written before it are left-overs and do not belong.
            link: False where the folder will be written again: every wanted file is copied (its blocks are shared where
                the file system can), but neither temporary files nor what links to folders lead to.
            wanted: which files belong, by path.

        Raises:
            OSError: the disk is full, or the folder is not there.
        """
        name = self._name(entry)
        beside = self.folder / f".{name}-{temp_suffix()}"
        files = beside / "files"
        try:
            files.mkdir(parents=True)
            accepted = freeze(source, files, since_ns, wanted) if link else copy_out(source, files, wanted)
            if not accepted:
                raise ConfigurationError(f"{str(source)!r} holds no file that belongs to this save.")
            check_paths([file.path for file in accepted], f"folder {str(source)!r}")
            entry = dataclasses.replace(entry, files=accepted, home=self.folder / name, boot=boot_id())
            # Last: a folder in which it can be read is whole.
            (beside / "entry.json").write_bytes(encode_record(_to_record(entry)))
            self._move_in(beside, entry.home)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        return entry

    def entries(self, run_url: str | None = None) -> list[OutboxEntry]:
        """All entries, or those of one run, newest first. Damaged ones are named in a warning and stay."""
        self._repair()
        found = []
        for home in self.folder.iterdir() if self.folder.is_dir() else ():
            if home.name.startswith("."):
                continue
            try:
                entry = read_entry(home)
            except (OSError, ManifestError) as error:
                logger.warning("Cannot read %r, which was to be uploaded: %s", str(home), error)
                continue
            if run_url is None or entry.run_url == run_url:
                found.append(entry)
        return sorted(found, key=lambda entry: entry.key, reverse=True)

    def remove(self, entry: OutboxEntry, *, in_background: bool = False) -> None:
        """Forget an entry: it is committed, or overtaken. One saved anew under its name stays.

        Args:
            in_background: give the space back in a thread: gigabytes take the disk longer than a save may.
        """
        with self._moving:
            if self._saved_anew(entry):
                return
            # Renamed first, so that a half-removed entry is none.
            trash = self.folder / f".gone-{temp_suffix()}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(entry.home, trash)
        if in_background:
            threading.Thread(
                target=shutil.rmtree, args=(trash, True), name="cloudtrain-rm", daemon=True
            ).start()
        else:
            shutil.rmtree(trash, ignore_errors=True)

    def current(self, entry: OutboxEntry) -> OutboxEntry | None:
        """The entry as it is on the disk now: saved anew under its name, perhaps; None where it is gone."""
        with self._moving, contextlib.suppress(OSError, ManifestError):
            return read_entry(entry.home)
        return None

    def set_aside(self, entry: OutboxEntry) -> Path:
        """Keep what cannot be committed, where nothing tries it again; returns the folder, for a person to look at.

        Only the last one is kept: they are whole checkpoints, and nobody tidies there.
        """
        aside = self.folder.parent / "unusable" / f"{entry.home.name}-{secrets.token_hex(4)}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        with self._moving:
            if self._saved_anew(entry):
                raise FileNotFoundError(errno.ENOENT, "It was saved anew", str(entry.home))
            os.rename(entry.home, aside)
        for other in aside.parent.iterdir():
            if other != aside:
                shutil.rmtree(other, ignore_errors=True)
        return aside

    @contextlib.contextmanager
    def lock(self, patience: float = 0.0) -> Iterator[None]:
        """One process a disk empties the outbox at a time; raises BlockingIOError where another does.

        Args:
            patience: seconds to wait for the other one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder.parent / "outbox.lock", patience):
            yield

    def _name(self, entry: OutboxEntry) -> str:
        if entry.name is not None:
            return f"{entry.name}-{entry.nonce[:16]}"
        with contextlib.suppress(OSError, ManifestError):
            if read_entry(self.folder / str(entry.key)).run_url != entry.run_url:
                return f"{entry.key}-{entry.nonce[:8]}"  # another run has left its own here
        return str(entry.key)

    def _repair(self) -> None:
        """Remove what killed processes left half-made; an entry that was whole and lacked its name gets it."""
        for left in (*self.folder.glob(".*"), *self.folder.parent.glob("restore-*")):
            if not is_left_over(left.name):
                continue
            # Killed between the two renames of `_move_in`: the one before is gone, and this one is whole.
            match = re.fullmatch(r"\.(.+)-\d+-[0-9a-f]{8}", left.name)
            home = self.folder / match[1] if match and match[1] != "gone" else None
            if home is not None and not home.exists() and _readable(left):
                os.rename(left, home)
            else:
                shutil.rmtree(left, ignore_errors=True)

    def _move_in(self, beside: Path, home: Path) -> None:
        before = self.folder / f".gone-{temp_suffix()}"
        with self._moving:
            if home.exists():
                # The same step saved again before its commit: the new files are the ones that count.
                os.rename(home, before)
            try:
                os.rename(beside, home)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(before, home)
                raise
        shutil.rmtree(before, ignore_errors=True)

    def _saved_anew(self, entry: OutboxEntry) -> bool:
        with contextlib.suppress(OSError, ManifestError):
            return read_entry(entry.home).files != entry.files
        return False


def read_entry(home: Path) -> OutboxEntry:
    """The entry in a folder of the outbox. Raises ManifestError, OSError."""
    what = f"outbox entry {home.name!r}"
    record = decode_record((home / "entry.json").read_bytes(), what)
    try:
        key = CheckpointKey(int(record["attempt"]), int(record["step"]))
        files = tuple(
            AcceptedFile(
                clean_path(item["path"]), int(item["size"]), int(item["inode"]), int(item["mtime_ns"])
            )
            for item in record["files"]
        )
        return OutboxEntry(
            run_url=str(record["run_url"]),
            key=key,
            nonce=str(record["nonce"]),
            position=Position.parse(record["position"], what),
            exclusive=bool(record["exclusive"]),
            exact=bool(record["exact"]),
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


def _has_hole(path: Path, size: int) -> bool:
    """Whether blocks of a file are missing, which read as zeros.

    safetensors sets a file's size before it writes: a power cut within half a minute of that leaves the right size, and
    no blocks. Nobody writes a checkpoint with holes on purpose.
    """
    with open(path, "rb", buffering=0) as file, contextlib.suppress(OSError):  # unknown to some file systems
        return size > 0 and os.lseek(file.fileno(), 0, os.SEEK_HOLE) < size
    return False


def _readable(home: Path) -> bool:
    try:
        read_entry(home)
    except (OSError, ManifestError):
        return False
    return True


def _to_record(entry: OutboxEntry) -> dict[str, Any]:
    record = dataclasses.asdict(entry)
    del record["home"], record["key"]
    return {"attempt": entry.key.attempt, "step": entry.key.step, **record}
