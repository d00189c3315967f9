"""The checkpoints on this machine's disk: what their folders are called, and which of them move away.

    <output_dir>/
        checkpoint-500/                     written by the framework, or restored
        checkpoint-250.a1-500/              restored under new settings, where step 500 of attempt 1 is step 250
        _cloudtrain/originals/              files of restored checkpoints as they were saved, where they had to be changed
        _cloudtrain/stale/                  checkpoints of a different history of the run, for a user to look at
        _cloudtrain/stale.json              which run was here last, and which of its own folders it has moved there
        _cloudtrain/save-began              touched when a save begins: the time, by the clock of this disk

A local checkpoint ahead of the step where an attempt begins would be mistaken for a new one, or written into. So it
moves to `stale/`. Of the run's own folders only those stay there that were moved last, so that a run that is killed
again and again does not fill the disk. Folders that were there before the run first began are the user's, and stay.

This is the usual layout, of Trainer and TrainLoop: one folder a checkpoint. `in_place.py` has the other one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import download, is_whole, move_aside
from hf_cloudtrain.checkpoints.frozen import Wanted
from hf_cloudtrain.checkpoints.local_home import make_local_home, wait_for_writer
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, decode_record, encode_record
from hf_cloudtrain.errors import ConfigurationError, ManifestError
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.storage.folder_files import fresh_files
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)


class LocalFolders:
    """One folder a checkpoint, below `output_dir`.

    Example:
        >>> local = LocalFolders(Path("out"))
        >>> local.folder(manifest)
        PosixPath('out/checkpoint-500')
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._numbers: dict[str, int] = {}

    def find_ranks(self) -> Ranks:
        """The processes of this job."""
        return Ranks.current()

    def check_writable(self) -> None:
        """Raise ConfigurationError if the disk refuses to be written to."""
        try:
            make_local_home(self.output_dir)
            self.mark_save_begin()
        except OSError as error:
            raise ConfigurationError(
                f"output_dir {str(self.output_dir)!r} cannot be written to ({error.strerror}). Choose a different one."
            ) from error

    def mark_save_begin(self) -> int:
        """Now, in ns, by the clock of the file system of `output_dir`, which may differ from ours."""
        marker = self.output_dir / LOCAL / "save-began"
        marker.touch()
        return marker.stat().st_mtime_ns

    def begin(self, run_url: str, global_step: int, check_owner: Callable[[], None]) -> None:
        """Prepare the disk for an attempt that begins after `global_step`.

        Args:
            check_owner: raises if a newer attempt has begun, which may have saved what lies on a shared disk.
        """
        wait_for_writer(self.output_dir)  # its checkpoint may be ahead, too
        move_stale(self.output_dir, run_url, global_step, check_owner)

    # Restored folders

    def folder(self, manifest: Manifest) -> Path:
        """Where a checkpoint is on this machine: under its plain name, or the one that `renumber` gave it."""
        number = self._numbers.get(manifest.key)
        if number is None:
            return self.output_dir / f"checkpoint-{manifest.step}"
        return self.output_dir / f"checkpoint-{number}.a{manifest.attempt}-{manifest.step}"

    def renumber(self, key: str, number: int | None) -> None:
        """Give a checkpoint the number of its step under the new settings; None gives it its own number again.

        Its folder is then `checkpoint-<number>.a<attempt>-<step>`: it cannot collide with what this attempt saves, and
        Trainer's rotation, which reads the first number, sorts it correctly.
        """
        self._numbers.pop(key, None)
        if number is not None:
            self._numbers[key] = number

    def number_of(self, key: CheckpointKey) -> int:
        """The step of a checkpoint under the new settings."""
        return self._numbers.get(str(key), key.step)

    def originals(self, manifest: Manifest) -> Path:
        """Where the files of a restored checkpoint are as they were saved, if they had to be changed on this machine."""
        return self.output_dir / LOCAL / "originals" / f"{manifest.key}-{manifest.nonce[:8]}"

    def has(self, manifest: Manifest, wanted: Wanted) -> bool:
        """Whether a checkpoint is here, whole; a whole one under its plain name is renamed and used."""
        target, plain = self.folder(manifest), self.output_dir / f"checkpoint-{manifest.step}"
        originals = self.originals(manifest)
        if not target.exists() and target != plain and plain.is_dir():
            if not is_whole(plain, manifest, wanted=wanted, originals=originals):
                return False
            os.rename(plain, target)
            return True
        return target.is_dir() and is_whole(target, manifest, wanted=wanted, originals=originals)

    def fetch(
        self, catalog: Catalog, manifest: Manifest, wanted: Wanted, on_bytes: Callable[[int], None]
    ) -> None:
        """Download a checkpoint to its folder. Raises CorruptCheckpointError, StorageError."""
        download(catalog, manifest, self.folder(manifest), wanted=wanted, on_bytes=on_bytes)

    # Saved folders

    links = True
    """Whether a save may be frozen by hard links. If not, the next save writes into the same files, so they are copied."""
    step_in_names = True
    """Whether names of files may contain the step, and so change from save to save."""

    def copied_by(self, copy: Callable[[], None]) -> None:
        """Call `copy`, which copies a save, and note when; only where `links` is False."""
        raise NotImplementedError

    def written(self, folder: Path, since_ns: int) -> tuple[list[str], list[str]]:
        """Names of the files in a saved folder, and of those of them that this save has written."""
        names = list(fresh_files(folder, since_ns, {}))
        return names, names


def parse_renumbered(name: str) -> tuple[int, CheckpointKey] | None:
    """New number and checkpoint of a folder that `renumber` named; None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d{1,15})\.a(\d{1,12})-(\d{1,15})", name)
    return (int(match[1]), CheckpointKey(int(match[2]), int(match[3]))) if match else None


def move_stale(
    output_dir: Path, run_url: str, global_step: int, check_owner: Callable[[], None] = lambda: None
) -> None:
    """Move the checkpoints ahead of `global_step` out of the way of an attempt that begins after it."""
    before = _record(output_dir)
    ours = before.get("run_url") == run_url
    moved = []
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and int(match[1]) > global_step and folder.is_dir():
            check_owner()
            logger.warning(
                "%s belongs to a different history of this run (this attempt starts at step %d); moved to %s.",
                folder,
                global_step,
                move_aside(folder),
            )
            moved.append(folder.name)
    if moved and ours:
        check_owner()
        for name in _names(before) - {*moved}:
            shutil.rmtree(output_dir / LOCAL / "stale" / name, ignore_errors=True)
    if moved or not ours:
        record = encode_record({"run_url": run_url, "moved": moved if ours else []})
        (output_dir / LOCAL / "stale.json").write_bytes(record)


def _record(output_dir: Path) -> dict[str, object]:
    try:
        return decode_record((output_dir / LOCAL / "stale.json").read_bytes(), "record 'stale.json'")
    except (OSError, ManifestError):
        return {}


def _names(record: dict[str, object]) -> set[str]:
    """The folders that may be deleted; anything else in the record is not ours."""
    moved = record.get("moved")
    names = moved if isinstance(moved, list) else []
    return {name for name in names if isinstance(name, str) and re.fullmatch(r"checkpoint-\d+", name)}
