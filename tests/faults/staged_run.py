"""The child process of a run with staged saves, which is killed together with its writer, or either alone. It imports no torch."""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path

from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.storage import client, retries
from hf_cloudtrain.testing import CrashPoint
from tests.faults.killed_run import ACCEPTED, DISK, FAILED, RUN, skip_the_probe
from tests.faults.staged import StagedMachine, crash_at, writer_program

STEPS = (5, 10, 15)
KILLED = "killed"
"""A file that a killed writer leaves."""


def staged_run(folder: Path, who: str, at: int) -> None:
    """Train until `who` is killed just before change number `at` of the disk; an error is written to FAILED.

    Args:
        who: `training`, `writer` (the first one), or `both`: the writer at its change, and the training with it.
    """
    try:
        run(folder, who, at)
    except BaseException:
        (folder / FAILED).write_text(traceback.format_exc())
        raise


def run(folder: Path, who: str, at: int) -> None:
    """Save three times, and rotate the older checkpoints away."""
    retries.PAUSES = (0.0,)
    client.Storage.check = skip_the_probe
    upload_queue.PAUSES = (0.01,)
    logging.disable()
    disk = folder / DISK
    disk.mkdir()
    accepted = os.open(folder / ACCEPTED, os.O_WRONLY | os.O_CREAT)
    then = f"open({str(folder / KILLED)!r}, 'w').close()"
    if who == "both":
        then = f"({then}, __import__('os').kill(__import__('os').getppid(), 9))"
    lines = [] if who == "training" else crash_at(at, disk, then=then)
    no_probe = ["from hf_cloudtrain.storage import client", "client.Storage.check = lambda self: None"]
    with (
        writer_program(*no_probe, *lines, unless=folder / KILLED),
        CrashPoint(below=disk, at=at if who == "training" else None),
    ):
        machine = StagedMachine(disk / "out", f"file://{folder / RUN}")
        machine.start()
        for before, step in zip((0, *STEPS), STEPS, strict=False):
            machine.save(step, delete=(before,))
            os.write(accepted, f"{step}\n".encode())
        machine.wait()
        machine.stop()
