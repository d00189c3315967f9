"""The writer process as the training sees it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.local_home import take_writer_lock
from hf_cloudtrain.runtime import own_process
from hf_cloudtrain.runtime.threads import TURN
from hf_cloudtrain.staging.job import WriteJob
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)

TRIES = 3
"""Writers that may die over one save, until it is given up."""
LOOK = 1.0
"""Seconds between two looks whether the other process lives: a forked process may keep its end of the socket open."""

PROGRAM = "hf_cloudtrain.staging.writer"
"""Part of the command line of a writer."""
_START = f"""\
{own_process.START}\
from hf_cloudtrain.staging.writer import main
main()
"""


class WriterProcess:
    """One writer at a time, and the save that it writes.

    Args:
        output_dir: of the training.

    Raises:
        OSError: no process can be started, or the writer of a different training still works in this folder.

    Example:
        >>> process = WriterProcess(Path("out"), memory)
        >>> process.write(job, done=lambda home: print("in the outbox:", home), failed=print)
        >>> process.wait()
        True
    """

    def __init__(self, output_dir: Path, memory: StagingMemory) -> None:
        self._output_dir = output_dir
        self._memory = memory
        self._changed = threading.Condition()
        self._job: tuple[bytes, Callable[[str], None], Callable[[str], None]] | None = None
        self._tries = 0
        self._owner = os.getpid()
        self._popen: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._start()

    @property
    def pid(self) -> int | None:
        """Of the writer; None while there is none."""
        popen = self._popen
        return None if popen is None else popen.pid

    def write(self, job: WriteJob, done: Callable[[str], None], failed: Callable[[str], None]) -> None:
        """Hand a save over; one at a time. Returns at once.

        Args:
            done: called in a thread with the folder of the outbox entry, once the save is whole.
            failed: called in a thread with the reason, if it cannot be written.

        Raises:
            OSError, ValueError: it cannot be handed over; neither function is called.
        """
        data = job.encode()
        self._memory.put_job(data)
        with self._changed:
            assert self._job is None, "the memory is free once the earlier save is written"
            if self._popen is None:
                self._start()
            self._job, self._tries = (data, done, failed), 1
            self._send({"size": len(data)})

    @property
    def is_busy(self) -> bool:
        """Whether a save is not written yet."""
        return self._job is not None and os.getpid() == self._owner

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the save is written or given up; False after `timeout` seconds."""
        deadline = time.monotonic() + (threading.TIMEOUT_MAX if timeout is None else timeout)
        with self._changed:
            while self.is_busy and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(TURN, left))  # short turns, so that Ctrl-C is noticed
            return not self.is_busy

    def end(self) -> None:
        """End the writer: at once if it writes nothing, else once it has written and uploaded the save."""
        if os.getpid() != self._owner:
            return
        with self._changed:
            popen, self._popen = self._popen, None
            if popen is None or self._control is None:
                return
            if self._job is not None:
                with contextlib.suppress(OSError):
                    self._control.shutdown(socket.SHUT_WR)  # as if this process had ended
                return
            popen.kill()  # it may still be starting, which the end of a short training need not wait for
        popen.wait()

    def _start(self) -> None:
        with contextlib.ExitStack() as ours_only_here:
            lock = take_writer_lock(self._output_dir)
            ours_only_here.callback(os.close, lock)
            ours, theirs = socket.socketpair()
            ours_only_here.enter_context(theirs)
            log = ours_only_here.enter_context(open(self._output_dir / LOCAL / "writer.log", "ab"))
            kept = (theirs.fileno(), self._memory.fd, lock)
            arguments = (theirs.fileno(), self._memory.fd, self._memory.capacity, os.getpid())
            try:
                popen = subprocess.Popen(
                    [*own_process.command(_START), *map(str, arguments)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    pass_fds=kept,
                    start_new_session=True,  # Ctrl-C and a killed process group pass it by
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
                )
            except BaseException:
                ours.close()
                raise
        self._popen, self._control = popen, ours
        try:
            threading.Thread(
                target=self._listen, args=(ours, popen), name="cloudtrain-writer", daemon=True
            ).start()
        except RuntimeError as error:  # no more threads
            popen.kill()
            popen.wait()
            ours.close()
            self._popen = None
            raise OSError(
                errno.EAGAIN, f"The process that writes checkpoints cannot be watched: {error}"
            ) from None

    def _send(self, message: dict[str, Any]) -> None:
        # A writer that has died is noticed by the thread that listens.
        if self._control is not None and os.getpid() == self._owner:
            with contextlib.suppress(OSError):
                self._control.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, control: socket.socket, popen: subprocess.Popen[bytes]) -> None:
        with control, contextlib.suppress(OSError):
            control.settimeout(LOOK)
            received = b""
            while True:
                try:
                    data = control.recv(65536)
                except TimeoutError:
                    if popen.poll() is None:
                        continue
                    break
                if not data:
                    break
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    self._receive(json.loads(line))
        code = popen.wait()
        with self._changed:
            if self._popen is popen:  # `end` was not called
                self._replace(code)

    def _receive(self, message: dict[str, Any]) -> None:
        if self._job is None or not ("done" in message or "failed" in message):
            return
        _, done, failed = self._job
        try:
            if "trouble" in message:
                logger.warning("%s", message["trouble"])
            done(message["done"]) if "done" in message else failed(message["failed"])
        except Exception:
            logger.exception("A staged save was written, and could not be handed to the upload")
        with self._changed:
            self._job = None
            self._changed.notify_all()

    def _replace(self, code: int) -> None:
        """After a writer has died: a new one writes the save from the beginning, as it is still in memory."""
        logger.warning(
            "The process that writes the checkpoints has ended unexpectedly (exit code %d). Its messages are in %r.",
            code,
            str(self._output_dir / LOCAL / "writer.log"),
        )
        self._popen = None
        if self._job is None:
            return  # the next save starts one
        data, _, failed = self._job
        try:
            if self._tries >= TRIES:
                raise OSError(
                    f"{TRIES} writer processes have ended over it, the last one with exit code {code}"
                )
            self._tries += 1
            self._start()
            self._send({"size": len(data)})
        except OSError as error:
            try:
                failed(str(error))
            finally:
                self._job = None
                self._changed.notify_all()
