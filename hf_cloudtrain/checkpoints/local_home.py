"""Our own files below an output folder: `_cloudtrain/`, which other readers of that folder leave alone.

Trainer's push to the Hub leaves out names that begin with `_`, and git reads the `.gitignore` inside. It stays within the
output folder, because only there hard links work for certain and the disk is the one that the user chose.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.errors import NotCommittedError
from hf_cloudtrain.runtime.files import locked
from hf_cloudtrain.runtime.patience import told_if_slow
from hf_cloudtrain.storage.names import LOCAL, META

logger = logging.getLogger(__name__)

SAVING = "saving"
"""The folder of checkpoints whose files are not all written yet."""

_KEPT = ("outbox", "originals", "stale", "unusable")
"""Folders in which earlier versions kept files, in `.cloudtrain/`. On storage, no record of a run has such a name."""
_MARKERS = ("save-began", "outbox.lock", "moving.lock", "writer.lock", "writer.log", ".gitignore")
"""Files that hold nothing that anyone needs later."""


def make_local_home(output_dir: Path) -> None:
    """Create the folder of our own files. Raises OSError."""
    home = output_dir / LOCAL
    home.mkdir(parents=True, exist_ok=True)
    if not (home / ".gitignore").exists():
        (home / ".gitignore").write_bytes(b"*\n")


@contextlib.contextmanager
def writer_lock(output_dir: Path, patience: float = 0.0) -> Iterator[None]:
    """Held by the process that writes and uploads the staged saves of a training, and so by one of a killed training.

    Args:
        patience: seconds to wait for it.

    Raises:
        BlockingIOError: that process still works.
    """
    with locked(output_dir / LOCAL / "writer.lock", patience):
        yield


def wait_for_writer(output_dir: Path) -> None:
    """Wait until the writer of a killed training has stored what that training saved last; then remove what is half-made.

    Raises:
        NotCommittedError: it needs longer than the end of a training waits for uploads.
    """
    if not (output_dir / LOCAL / "writer.lock").exists():
        return
    try:
        with (
            told_if_slow(f"let the writer of a killed training store its last save ({str(output_dir)!r})"),
            writer_lock(output_dir, env.drain_timeout()),
        ):
            shutil.rmtree(output_dir / LOCAL / SAVING, ignore_errors=True)
    except BlockingIOError:
        raise NotCommittedError(
            f"The writer of an earlier training still works in {str(output_dir)!r}; its messages are in "
            f"{str(output_dir / LOCAL / 'writer.log')!r}. Wait until it has finished, or end it, and start again."
        ) from None


def adopt_earlier(output_dir: Path) -> None:
    """Move what an earlier version of this package left in `.cloudtrain/` of the output folder to where it is now."""
    old, new = output_dir / META, output_dir / LOCAL
    if not any((old / name).exists() for name in (*_KEPT, "stale.json", "save-began")):
        return
    try:
        with locked(old / "outbox.lock"):
            make_local_home(output_dir)
            for path in [*(path for name in _KEPT for path in old.glob(f"{name}/*")), old / "stale.json"]:
                _move(path, new / path.relative_to(old))
    except BlockingIOError:
        logger.warning("A process with an earlier version of this package is uploading from %r.", str(old))
        return
    for name in (*_KEPT, ""):  # a run may be stored in the same folder
        _remove_unused(old / name)


def remove_if_unused(output_dir: Path) -> None:
    """Remove the folder of our own files where nothing was saved: scripts refuse an output folder that is not empty."""
    home = output_dir / LOCAL
    shutil.rmtree(home / "ranks", ignore_errors=True)
    for name in ("outbox", SAVING, ""):
        _remove_unused(home / name)


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if not target.exists():
            os.rename(path, target)


def _remove_unused(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {*_MARKERS}:
            for name in _MARKERS:
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
