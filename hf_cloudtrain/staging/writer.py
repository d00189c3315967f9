"""The writer process: it makes the files of staged saves, hands each checkpoint to the outbox, and gives it its final name.

It has its own session, so that a Ctrl-C and a signal to the process group of the training pass it by, and it ends with the
training. If the training is killed, it finishes what was staged, uploads what the outbox holds of the run, and ends.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.flush import flush
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.local_home import writer_lock
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.checkpoints.upload_queue import PAUSES
from hf_cloudtrain.errors import CloudTrainError, NotCommittedError, StorageError
from hf_cloudtrain.runtime.files import temp_suffix
from hf_cloudtrain.runtime.progress import Progress
from hf_cloudtrain.staging.job import StagedFile, WriteJob
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.recorders import DTYPES, replay
from hf_cloudtrain.storage.client import Storage

logger = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds between two looks whether the training lives: forked loader processes keep its end of the socket open."""
NICENESS = 10
"""The training comes first."""


class Writer:
    """The writer of one training.

    Args:
        control: the socket to the training: one line of JSON for a job, one for its result.
    """

    def __init__(self, control: socket.socket, memory: StagingMemory) -> None:
        self._control = control
        self._memory = memory
        self._training = os.getppid()
        self._received = b""
        self._last: WriteJob | None = None

    def work(self) -> None:
        """Write what comes, until the training says that it ends, or has ended."""
        self._tell({"ready": os.getpid()})
        while (request := self._next()) is not None:
            if "end" in request:
                return
            self._last = WriteJob.decode(bytes(self._memory.view(self._memory.capacity, request["size"])))
            try:
                self._tell({"done": str(write(self._last, self._memory).home)})
            except Exception as error:
                logger.exception("A save could not be written")
                self._tell({"failed": f"{type(error).__name__}: {error}"})
        if self._last is not None and self._last.connection is not None:
            upload(Path(self._last.output_dir), *self._last.connection)

    def _next(self) -> dict[str, Any] | None:
        while b"\n" not in self._received:
            readable, _, _ = select.select([self._control], [], [], LOOK)
            if readable:
                data = self._control.recv(65536)
                if not data:
                    return None
                self._received += data
            elif os.getppid() != self._training:
                return None
        line, _, self._received = self._received.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the training was killed; `_next` will notice
            self._control.sendall(json.dumps(message).encode() + b"\n")


def write(job: WriteJob, memory: StagingMemory) -> OutboxEntry:
    """Make the files of a save whole, hand it over, and give it its name. Can be called again after it was killed.

    Raises:
        OSError, RuntimeError, ConfigurationError: the disk is full or refuses; nothing has its final name then.
    """
    folder, target = Path(job.folder), Path(job.target)
    if not folder.exists() and target.exists():  # a writer was killed after the rename
        folder = target
    else:
        for file in job.files:
            write_file(folder / file.path, file, memory)
    entry = OutboxEntry.decode(job.entry.encode(), "staged save")
    # The outbox first: what is in it is committed, whatever becomes of the folder.
    entry = Outbox(Path(job.output_dir)).accept(folder, entry, since_ns=job.since_ns)
    if folder != target:
        if target.exists():  # as the framework writes into a folder that is there
            gone = folder.with_name(f"gone-{temp_suffix()}")
            os.rename(target, gone)
            shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, target)
    for path in job.delete:
        shutil.rmtree(path, ignore_errors=True)
    return entry


def write_file(path: Path, file: StagedFile, memory: StagingMemory) -> None:
    """Write one staged file, byte for byte as the framework would have written it at this path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # an outbox may have a link to it
    if file.kind == "torch":
        from torch import serialization
        from torch.utils.serialization import config

        serialization.set_crc32_options(file.options["crc32"])
        if "alignment" in file.options:
            config.save.storage_alignment = file.options["alignment"]
        with serialization._open_zipfile_writer(str(path)) as archive:
            replay(archive, memory, file.parts)
    else:
        from safetensors import TensorSpec, serialize_file

        specs = {
            name: TensorSpec(
                dtype=DTYPES[dtype], shape=shape, data_ptr=memory.address + offset, data_len=size
            )
            for name, dtype, shape, offset, size in file.parts
        }
        serialize_file(specs, str(path), metadata=file.options["metadata"])


def upload(output_dir: Path, run_url: str, storage_options: dict[str, Any]) -> None:
    """Commit what a killed training has left in the outbox, for as long as the end of a training waits for uploads."""
    deadline = time.monotonic() + env.drain_timeout()
    for pause in (*PAUSES, *[PAUSES[-1]] * 1000):
        try:
            catalog = Catalog(Storage(run_url, storage_options))
            catalog.storage.check()
            done = flush(catalog, Outbox(output_dir), Progress())
        except (StorageError, NotCommittedError) as error:
            logger.warning("The upload after the end of the training failed: %s", error)
        except CloudTrainError as error:
            logger.error("%s", error)
            return
        else:
            logger.warning(
                "The training was killed; committed: %s.", ", ".join(e.title for e in done) or "nothing"
            )
            return
        if time.monotonic() + pause > deadline:
            return
        time.sleep(pause)


def main() -> None:
    """Run as a process of its own: socket, shared memory and output folder come as arguments."""
    control, memory, capacity, output_dir = sys.argv[-4:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the training decides when it ends
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    with writer_lock(Path(output_dir)):
        writer = Writer(socket.socket(fileno=int(control)), StagingMemory(int(capacity), int(memory)))
        import torch  # noqa: F401 - a second, before the first save instead of in it

        writer.work()
