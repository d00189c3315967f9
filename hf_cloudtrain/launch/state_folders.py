"""The folders that a script passes to `Accelerator.save_state`, and where they are on a different machine.

A script chooses these names (`step_100`, `out/epoch_0`), and looks for them at its next start. So a manifest notes the name:
relative to the current folder if it is below that, else absolute. What a manifest says is not trusted: a restore writes
below the current folder, or below a folder that the user's own command names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import download, is_whole
from hf_cloudtrain.checkpoints.frozen import ALL_FILES, SMALL_FILE, Wanted
from hf_cloudtrain.checkpoints.local_folders import LocalFolders
from hf_cloudtrain.checkpoints.local_home import wait_for_writer
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.errors import ManifestError
from hf_cloudtrain.runtime.files import locked, temp_suffix
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.storage.names import LOCAL, clean_path

FOLDER = "state_folder"
"""Key in a manifest's `origin`: the folder as the script named it."""
PATIENCE = 600.0
"""Seconds to wait while a different process of this machine restores."""


class StateFolders(LocalFolders):
    """Folders with names of the script; rank 0 alone takes care of them (see `accelerator.py`)."""

    def find_ranks(self) -> Ranks:
        """This process alone: a script may call `save_state` on rank 0 only."""
        return Ranks()

    def begin(self, run_url: str, global_step: int, check_owner: Callable[[], None]) -> None:
        """Nothing moves away: the names are the script's."""
        wait_for_writer(self.output_dir)

    def folder(self, manifest: Manifest) -> Path:
        """Where the script has saved it."""
        return path_of(manifest) or super().folder(manifest)

    def has(self, manifest: Manifest, wanted: Wanted) -> bool:
        """Whether it is here, whole."""
        return is_whole(self.folder(manifest), manifest, wanted=wanted)


def home_of(folder: Path) -> Path:
    """Where our own files lie: beside the folder, but not in Accelerate's `checkpoints`, where it reads a number from each name."""
    above = folder.parent
    return above.parent if above.name == "checkpoints" else above


def name_of(folder: Path) -> str:
    """How a manifest notes a folder: relative to the current folder, or absolute."""
    path = os.path.abspath(folder)
    below = os.path.relpath(path)
    return path if below.split(os.sep)[0] == os.pardir else below


def path_of(manifest: Manifest, command: Sequence[str] = ()) -> Path | None:
    """Where a folder belongs on this machine; None if a manifest names none, or one that is not allowed.

    Args:
        command: words of the user: an absolute folder must be below one of them.
    """
    name = manifest.origin.get(FOLDER, "")
    if os.path.isabs(name):
        path = os.path.normpath(name)
        values = (part for word in command for part in (word, word.partition("=")[2]) if part)
        allowed = (os.path.abspath(value) for value in values)
        return Path(path) if any(path.startswith(f"{one}{os.sep}") for one in allowed) else None
    try:
        return Path(clean_path(name)).absolute()
    except ManifestError:
        return None


def named_like(manifest: Manifest, folder: Path) -> bool:
    """Whether a checkpoint was saved under the last part of a folder's name: the rest may differ on this machine."""
    return os.path.basename(manifest.origin.get(FOLDER, "")) == folder.name


def put(catalog: Catalog, manifest: Manifest, folder: Path, home: Path) -> bool:
    """Make a folder hold a checkpoint; what differs there now moves to `home/_cloudtrain/stale`. Returns False if it did already.

    Raises:
        CorruptCheckpointError, StorageError: it cannot be downloaded.
    """
    with locked(home / LOCAL / "restoring.lock", PATIENCE):
        if folder.is_dir() and is_whole(folder, manifest, wanted=ALL_FILES):
            return False
        move_aside(folder, home)
        folder.parent.mkdir(parents=True, exist_ok=True)
        download(catalog, manifest, folder)
        if folder.parent != home:
            with contextlib.suppress(OSError):  # scripts read numbers from all names beside theirs
                (folder.parent / LOCAL).rmdir()
        return True


def move_aside(folder: Path, home: Path) -> Path | None:
    """Move a folder to `home/_cloudtrain/stale`, where it replaces an older one of its name. None if it does not exist."""
    if not os.path.lexists(folder):
        return None
    stale = home / LOCAL / "stale" / folder.name
    shutil.rmtree(stale, ignore_errors=True)
    stale.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, stale)
    return stale


def unshare(folder: Path) -> None:
    """Give files that the outbox still shares an inode of their own, before a script writes into the same folder again."""
    for path in folder.rglob("*") if folder.is_dir() else ():
        found = path.stat(follow_symlinks=False)
        if found.st_nlink > 1 and found.st_size >= SMALL_FILE and path.is_file():
            beside = path.with_name(f".{path.name}-{temp_suffix()}")
            shutil.copy2(path, beside)
            os.replace(beside, path)
