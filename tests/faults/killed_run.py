"""The child process of a run that is killed at a given disk operation. It imports no torch, so it starts fast."""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path

from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.checkpoints.deletion import retire
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.storage import client, retries
from hf_cloudtrain.testing import CrashPoint
from tests.faults.runs import Machine

DISK, RUN, ACCEPTED, FAILED = "disk", "disk/run", "accepted", "failed"


def killed_run(folder: Path, at: int) -> None:
    """Train until killed just before disk operation number `at`; write the traceback of an error to FAILED."""
    try:
        run(folder, at)
    except BaseException:
        (folder / FAILED).write_text(traceback.format_exc())
        raise


def skip_the_probe(self: client.Storage) -> None:
    self.exclusive = True


def run(folder: Path, at: int) -> None:
    """Save, rotate, save again, commit, retire and restore."""
    retries.PAUSES = (0.0,)
    client.Storage.check = skip_the_probe  # a kill between the probe's requests tests nothing
    upload_queue.PAUSES = (0.01,)
    logging.disable()
    disk = folder / DISK
    disk.mkdir()
    accepted = os.open(folder / ACCEPTED, os.O_WRONLY | os.O_CREAT)
    url = f"file://{folder / RUN}"
    with CrashPoint(below=disk, at=at):
        machine = Machine(disk / "out", url)
        machine.start()
        machine.save(5)
        os.write(accepted, b"5\n")
        machine.wait()
        machine.rotate(5)
        machine.save(10, salt="first", best=True)
        os.write(accepted, b"10\n")
        machine.rotate(10)  # rewritten in place, the first save would be reported as changed: see law 5
        machine.save(10, salt="second", best=True)
        machine.wait()
        retire(machine.checkpointer.catalog, CheckpointKey(1, 5))
        elsewhere = Machine(disk / "elsewhere", url)
        elsewhere.start()
        elsewhere.stop()
        machine.stop()
