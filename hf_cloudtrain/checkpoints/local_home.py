"""Our own files below an output folder: `_cloudtrain/`, which other readers of that folder leave alone.

Trainer's push to the Hub leaves out names that begin with `_`, and git reads the `.gitignore` inside. It stays within the
output folder, because only there hard links work for certain and the disk is the one that the user chose.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cloudtrain import env
from hf_cloudtrain.errors import NotCommittedError
from hf_cloudtrain.runtime.files import locked
from hf_cloudtrain.runtime.patience import told_if_slow
from hf_cloudtrain.runtime.process_tree import is_alive, this_process
from hf_cloudtrain.storage.names import LOCAL, META

if TYPE_CHECKING:
    from hf_cloudtrain.checkpoints.late_files import LateFiles

logger = logging.getLogger(__name__)

SAVING = "saving"
"""The folder of checkpoints whose files are not all written yet."""
WRITER_LOCK = "writer.lock"
"""Held by the process that writes and uploads the staged saves of a training; names the training that has started it."""
own_writers: dict[Path, LateFiles] = {}
"""What the trainings of this process have written in the background, by output folder."""

_KEPT = ("outbox", "originals", "stale", "unusable")
"""Folders in which earlier versions kept files, in `.cloudtrain/`. On storage, no record of a run has such a name."""
_MARKERS = (
    *("save-began", "outbox.lock", "moving.lock", "restoring.lock", WRITER_LOCK, "writer.log", ".gitignore"),
)
"""Files that hold nothing that anyone needs later."""


def make_local_home(output_dir: Path) -> None:
    """Create the folder of our own files. Raises OSError."""
    home = output_dir / LOCAL
    home.mkdir(parents=True, exist_ok=True)
    if not (home / ".gitignore").exists():
        (home / ".gitignore").write_bytes(b"*\n")


def take_writer_lock(output_dir: Path) -> int:
    """The lock of the process that writes the staged saves of this training, as an open file for it to inherit.

    Taken by the training, so that there is no moment at which the writer runs without it. It is free once every process
    that has the file open has closed it or has ended.

    Raises:
        BlockingIOError: the writer of a different training still works.
    """
    make_local_home(output_dir)
    lock = os.open(output_dir / LOCAL / WRITER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(this_process()).encode(), 0)
    except OSError:
        os.close(lock)
        raise
    return lock


def wait_for_writer(output_dir: Path) -> None:
    """Wait until the writer of a killed training has stored what that training saved last; then remove what is half-made.

    A training of this process may have been cut short by an exception, as in a notebook; its save is waited for, too. The
    writer of a different process that still trains is left alone: a newer attempt has priority over it, and need not wait.

    Raises:
        NotCommittedError: it needs longer than the end of a training waits for uploads.
    """
    if output_dir in own_writers:
        own_writers[output_dir].settle(env.drain_timeout())
        return
    lock = output_dir / LOCAL / WRITER_LOCK
    if not lock.exists() or _trains_elsewhere(lock):
        return
    try:
        with (
            told_if_slow(f"let the writer of a killed training store its last save ({str(output_dir)!r})"),
            locked(lock, env.drain_timeout()),
        ):
            shutil.rmtree(output_dir / LOCAL / SAVING, ignore_errors=True)
    except BlockingIOError:
        raise NotCommittedError(
            f"The writer of an earlier training still works in {str(output_dir)!r}; its messages are in "
            f"{str(output_dir / LOCAL / 'writer.log')!r}. Wait until it has finished, or end it, and start again."
        ) from None


def _trains_elsewhere(lock: Path) -> bool:
    """Whether the training that has started the writer last is a different process that still runs."""
    try:
        training = json.loads(lock.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(training, dict) and training != this_process() and is_alive(training)


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
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stale = home / "stale.json"
        if not json.loads(stale.read_bytes()).get("moved"):
            stale.unlink()
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
