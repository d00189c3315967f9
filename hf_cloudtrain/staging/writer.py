"""The writer process: it makes the files of staged saves, hands each checkpoint to the outbox, and gives it its final name.

It has its own session, so that a Ctrl-C and a signal to the process group of the training pass it by, and it ends with the
training. If the training is killed, it finishes what was staged, uploads what the outbox holds of the run, and ends.
"""

from __future__ import annotations

import contextlib
import errno
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
from hf_cloudtrain.checkpoints.frozen import OutboxEntry, copy_out
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.checkpoints.upload_queue import PAUSES
from hf_cloudtrain.errors import CloudTrainError, NotCommittedError, StorageError
from hf_cloudtrain.runtime.files import check_free_space, temp_suffix
from hf_cloudtrain.runtime.progress import Progress
from hf_cloudtrain.staging.job import WriteJob
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.process import LOOK
from hf_cloudtrain.staging.recorders import write_file
from hf_cloudtrain.storage.client import Storage

logger = logging.getLogger(__name__)

NICENESS = 10
"""The training comes first."""


class Writer:
    """The writer of one training.

    Args:
        control: the socket to the training: one line of JSON for a job, one for its result.
        training: the process id of the training.
    """

    def __init__(self, control: socket.socket, memory: StagingMemory, training: int) -> None:
        self._control = control
        self._poll = (
            select.poll()
        )  # `select.select` refuses file descriptors above 1023, which a training may have
        self._poll.register(control, select.POLLIN)
        self._memory = memory
        self._training = training
        self._received = b""
        self._last: WriteJob | None = None

    def work(self) -> None:
        """Write what comes, until the training has ended; then upload what it could not."""
        while (request := self._next()) is not None:
            try:
                job = WriteJob.decode(bytes(self._memory.view(self._memory.capacity, request["size"])))
                self._last = job
                self._tell(write(job, self._memory))
            except Exception as error:
                logger.exception("A save could not be written")
                self._tell({"failed": f"{type(error).__name__}: {error}"})
        if self._last is not None and self._last.connection is not None:
            upload(Path(self._last.output_dir), *self._last.connection)

    def _next(self) -> dict[str, Any] | None:
        while b"\n" not in self._received:
            if self._poll.poll(1000 * LOOK):
                try:
                    data = self._control.recv(65536)
                except OSError:  # the training was killed before it had read what it was told
                    return None
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


def write(job: WriteJob, memory: StagingMemory) -> dict[str, Any]:
    """Make the files of a save whole, hand it over, and give it its name. Can be called again after it was killed.

    Returns:
        What the training is told: `done`, the folder of the outbox entry, and `trouble`, what else it should log.

    Raises:
        OSError, RuntimeError, ConfigurationError: the disk is full or refuses. Nothing of the save is left then.
    """
    folder, target = Path(job.folder), Path(job.target)
    if not folder.exists() and _inode(target) == job.inode:  # a writer was killed after it had renamed it
        folder = target
    try:
        if _inode(folder) != job.inode:
            raise FileNotFoundError(errno.ENOENT, "The folder was removed while it was written", job.folder)
        if folder != target:
            _write_files(job, folder, memory)
        # The outbox first: what is in it is committed, whatever becomes of the folder.
        entry = OutboxEntry.decode(job.entry.encode(), "staged save")
        entry = Outbox(Path(job.output_dir)).accept(folder, entry, since_ns=job.since_ns)
    except BaseException:
        shutil.rmtree(job.folder, ignore_errors=True)  # so that the next save has room for its files
        raise
    result = {"done": str(entry.home)}
    try:
        if job.in_place:
            _place(job)
        elif folder != target:
            _remove(target, folder.parent)  # the framework writes into a folder that is there
            os.rename(folder, target)
        for path in job.delete:
            _remove(Path(path), folder.parent)
    except OSError as error:
        where = (
            f"Files of {job.target!r} could not be written"
            if job.in_place
            else f"Its folder {job.folder!r} stays where it is"
        )
        result["trouble"] = f"{entry.title} is kept for upload. {where}: {error}"
    return result


def _write_files(job: WriteJob, folder: Path, memory: StagingMemory) -> None:
    for file in job.files:
        (folder / file.path).unlink(missing_ok=True)  # of a writer that was killed
    # torch's own error about a full disk names positions in a file.
    check_free_space(folder, job.size, Path(job.target).name, spare=0)
    for file in job.files:
        write_file(folder / file.path, file, memory)


def _place(job: WriteJob) -> None:
    """Copy the staged files to where the script has saved them. A file that is there is a newer one of the script."""
    copies = Path(f"{job.folder}-copies")
    shutil.rmtree(copies, ignore_errors=True)  # of a writer that was killed
    names = {file.path for file in job.files}
    copy_out(Path(job.folder), copies, names.__contains__)
    for name in names:
        path = Path(job.target, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(copies / name, path)
        except FileExistsError:
            continue
        except OSError:  # a disk without hard links
            if not path.exists():
                os.rename(copies / name, path)
    shutil.rmtree(copies, ignore_errors=True)


def _inode(folder: Path) -> int | None:
    try:
        return os.stat(folder).st_ino
    except OSError:
        return None


def _remove(folder: Path, trash: Path) -> None:
    """Delete a checkpoint, which has its name as long as it is whole."""
    gone = trash / f"gone-{temp_suffix()}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


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
    """Run as a process of its own: socket, shared memory, its size and the process id of the training come as arguments."""
    control, memory, capacity, training = map(int, sys.argv[-4:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the training decides when it ends
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    Writer(socket.socket(fileno=control), StagingMemory(capacity, memory), training).work()
