"""What a training does differently while `cloudtrain verify-resume` tests it.

It writes only into a scratch folder, and waits at the save after which it will be killed. The hooks are installed when a
Checkpointer is created; an ordinary save calls nothing here.

    <scratch>/start/     current folder and output of the script
    <scratch>/runs/      replaces the run URL (`env.py`)
    <scratch>/hold       step of the save to wait at, and the process that will kill the training
    <scratch>/go         the training need not wait any longer
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError

POLL = 0.02
"""Seconds between two checks of a file."""


def saved_hooks(output_dir: Path) -> list[Callable[[int], None]]:
    """What to call after each save, with its step; empty outside of a rehearsal.

    Raises:
        ConfigurationError: a rehearsed training would write into a folder that is not scratch.
    """
    folder = env.verify_folder()
    if folder is None:
        return []
    if Path(folder).resolve() in output_dir.resolve().parents:
        return [partial(_hold, Path(folder))]
    raise ConfigurationError(
        f"The script writes to {str(output_dir)!r}, which verify-resume must not touch. Give the script its output "
        "folder in the command, as in `cloudtrain verify-resume -- python train.py --output_dir {output_dir}`."
    )


def write_hold(folder: Path, step: int) -> None:
    """Make the training in `folder` wait at its first save from `step` on."""
    beside = folder / "hold.new"
    beside.write_text(f"{step} {os.getpid()}")
    beside.replace(folder / "hold")


def let_go(folder: Path) -> None:
    """Let the training continue."""
    (folder / "go").touch()


def _hold(folder: Path, step: int) -> None:
    """Wait, after the save of a step, to be killed: a training of a few fast steps would end first."""
    try:
        wanted, killer = map(int, (folder / "hold").read_text().split())
    except FileNotFoundError:
        return
    while step >= wanted and not (folder / "go").exists() and _lives(killer):
        time.sleep(POLL)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
