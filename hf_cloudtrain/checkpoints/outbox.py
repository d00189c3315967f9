"""The local folder of saved, not yet committed checkpoints. What is in it survives rotation and SIGKILL.

    <output_dir>/_cloudtrain/outbox/000003-0000000500/
        entry.json      run URL, attempt, step, position, and how each file looked when it was accepted
        files/…         hard links to what the framework wrote; small files are copies

A hard link costs nothing and keeps the data when the framework rotates the folder away, but it shares its inode:
`torch.save` to the same path rewrites the file in place. So small files are copied, and inode, size and time of all files
are checked again before the commit. A folder that is written again and again is copied whole.
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
from collections.abc import Iterator
from pathlib import Path

from hf_cloudtrain.checkpoints.frozen import ALL_FILES, OutboxEntry, Wanted, copy_out, freeze
from hf_cloudtrain.checkpoints.local_home import adopt_earlier
from hf_cloudtrain.checkpoints.manifest import check_paths
from hf_cloudtrain.errors import ConfigurationError, ManifestError
from hf_cloudtrain.runtime.files import boot_id, is_left_over, locked, temp_suffix
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)


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
        self.folder = output_dir / LOCAL / "outbox"
        self._moving_here = threading.Lock()

    def accept(
        self,
        source: Path,
        entry: OutboxEntry,
        *,
        since_ns: int = 0,
        link: bool = True,
        wanted: Wanted = ALL_FILES,
    ) -> OutboxEntry:
        """Freeze a folder that was just written. Afterwards its files may be rotated away.

        Args:
            since_ns: modification time in ns; files last written before it are left-overs and do not belong.
            link: False if the folder will be written again: every wanted file is copied (sharing its blocks if the file
                system can), without temporary files and without following links to folders.
            wanted: which files belong, by path.

        Raises:
            OSError: the disk is full, or the folder does not exist.
        """
        name = self._name(entry)
        beside = self.folder / f".{name}-{temp_suffix()}"
        files = beside / "files"
        try:
            beside.mkdir(parents=True)
            files.mkdir()
            accepted = freeze(source, files, since_ns, wanted) if link else copy_out(source, files, wanted)
            if not accepted:
                raise ConfigurationError(f"{str(source)!r} holds no file that belongs to this save.")
            check_paths([file.path for file in accepted], f"folder {str(source)!r}")
            entry = dataclasses.replace(entry, files=accepted, home=self.folder / name, boot=boot_id())
            # Last: a folder in which it can be read is whole.
            (beside / "entry.json").write_bytes(entry.encode())
            self._move_in(beside, entry.home)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        return entry

    def entries(self, run_url: str | None = None) -> list[OutboxEntry]:
        """All entries, or those of one run, newest first. Damaged ones stay, with a warning."""
        self._repair()
        found = []
        for home in self.folder.iterdir() if self.folder.is_dir() else ():
            if home.name.startswith("."):
                continue
            try:
                entry = OutboxEntry.read(home)
            except (OSError, ManifestError) as error:
                logger.warning("Cannot read %r, which is waiting for its upload: %s", str(home), error)
                continue
            if run_url is None or entry.run_url == run_url:
                found.append(entry)
        return sorted(found, key=lambda entry: entry.key, reverse=True)

    def remove(self, entry: OutboxEntry) -> None:
        """Forget an entry that is committed or replaced. One that was saved again under its name stays."""
        with self._moving():
            if self._was_saved_again(entry):
                return
            # Renamed first, so that a half-removed entry is not an entry.
            trash = self.folder / f".gone-{temp_suffix()}"
            with contextlib.suppress(FileNotFoundError):
                os.rename(entry.home, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def current(self, entry: OutboxEntry) -> OutboxEntry | None:
        """The entry as it is on the disk now, perhaps saved again under its name; None if it is gone."""
        with self._moving():
            return _read_or_none(entry.home)

    def set_aside(self, entry: OutboxEntry, error: Exception) -> None:
        """Move an entry that cannot be committed to `unusable/`: its bytes changed or are gone, and waiting will not help.

        Only the last one is kept there: each is a whole checkpoint, and users do not tidy that folder.
        """
        aside = self.folder.parent / "unusable" / f"{entry.home.name}-{secrets.token_hex(4)}"
        where = f"What is left of it is in {str(aside)!r}."
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            with self._moving():
                if self._was_saved_again(entry):
                    raise FileNotFoundError(errno.ENOENT, "It was saved again", str(entry.home))
                os.rename(entry.home, aside)
            for other in aside.parent.iterdir():
                if other != aside:
                    shutil.rmtree(other, ignore_errors=True)
        except OSError:
            where = "Nothing is left of it."
        logger.error("%s cannot be committed: %s %s", entry.title, error, where)

    @contextlib.contextmanager
    def lock(self, patience: float = 0.0) -> Iterator[None]:
        """One process of a disk empties the outbox at a time; raises BlockingIOError if another one does.

        Args:
            patience: seconds to wait for the other one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder.parent / "outbox.lock", patience):
            yield

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        """The upload must not remove what a save, perhaps of the writer process, puts under the same name at the same moment."""
        with self._moving_here, locked(self.folder.parent / "moving.lock", threading.TIMEOUT_MAX):
            yield

    def _name(self, entry: OutboxEntry) -> str:
        if entry.name is not None:
            return f"{entry.name}-{entry.nonce[:16]}"
        there = _read_or_none(self.folder / str(entry.key))
        if there is not None and there.run_url != entry.run_url:
            return f"{entry.key}-{entry.nonce[:8]}"  # a different run has left its own here
        return str(entry.key)

    def _repair(self) -> None:
        """Remove what killed processes left half-made; an entry that is whole and lacks its name gets it."""
        adopt_earlier(self.output_dir)
        for left in (*self.folder.glob(".*"), *self.folder.parent.glob("restore-*")):
            if not is_left_over(left.name):
                continue
            # Killed between the two renames of `_move_in`: the entry before is gone, and this one is whole.
            match = re.fullmatch(r"\.(.+)-\d+-[0-9a-f]{8}", left.name)
            home = self.folder / match[1] if match and match[1] != "gone" else None
            if home is not None and not home.exists() and _read_or_none(left):
                os.rename(left, home)
            else:
                shutil.rmtree(left, ignore_errors=True)

    def _move_in(self, beside: Path, home: Path) -> None:
        before = None
        with self._moving():
            if home.exists():
                # The same step saved again before its commit: the new files count.
                before = self.folder / f".gone-{temp_suffix()}"
                os.rename(home, before)
            try:
                os.rename(beside, home)
            except BaseException:
                if before is not None:
                    os.rename(before, home)
                raise
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)

    def _was_saved_again(self, entry: OutboxEntry) -> bool:
        now = _read_or_none(entry.home)
        return now is not None and now.files != entry.files


def _read_or_none(home: Path) -> OutboxEntry | None:
    with contextlib.suppress(OSError, ManifestError):
        return OutboxEntry.read(home)
    return None
