"""The writer process as the training sees it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cloudtrain.checkpoints.local_home import make_local_home
from hf_cloudtrain.runtime.threads import TURN
from hf_cloudtrain.staging.job import WriteJob
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)

TRIES = 3
"""Writers that may die over one save, until it is given up."""
END_SECONDS = 10.0
"""Seconds that an idle writer has to end."""

_PACKAGE_HOME = str(Path(__file__).resolve().parents[2])
# Not -m: that would take modules of the folder in which the user works for those of Python.
_START = "import sys; sys.path.append(sys.argv[1]); from hf_cloudtrain.staging.writer import main; main()"


class WriterProcess:
    """One writer at a time, and the save that it writes.

    Args:
        output_dir: of the training.

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
        self._pid = os.getpid()
        self._popen: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        make_local_home(output_dir)
        self._start()

    def write(self, job: WriteJob, done: Callable[[str], None], failed: Callable[[str], None]) -> None:
        """Hand a save over; one at a time. Returns at once.

        Args:
            done: called in a thread with the folder of the outbox entry, once the save is whole.
            failed: called in a thread with the reason, if it cannot be written.
        """
        data = job.encode()
        self._memory.put_job(data)
        with self._changed:
            assert self._job is None, "the memory is free once the earlier save is written"
            self._job, self._tries = (data, done, failed), 1
            if self._popen is None:
                self._start()
            self._send({"size": len(data)})

    @property
    def is_busy(self) -> bool:
        """Whether a save is not written yet."""
        return self._job is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the save is written or given up; False after `timeout` seconds."""
        deadline = time.monotonic() + (threading.TIMEOUT_MAX if timeout is None else timeout)
        with self._changed:
            while self._job is not None and time.monotonic() < deadline:
                self._changed.wait(TURN)  # short turns, so that Ctrl-C is noticed
            return self._job is None

    def end(self) -> None:
        """End the writer, which writes nothing now."""
        with self._changed:
            popen, self._popen = self._popen, None
            self._send({"end": True})
        if popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(END_SECONDS)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, open(self._output_dir / LOCAL / "writer.log", "ab") as log:
            arguments = (theirs.fileno(), self._memory.fd, self._memory.capacity, self._output_dir)
            self._popen = subprocess.Popen(
                [sys.executable, "-c", _START, _PACKAGE_HOME, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                pass_fds=(theirs.fileno(), self._memory.fd),
                start_new_session=True,  # Ctrl-C and a killed process group pass it by
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
        self._control = ours
        threading.Thread(
            target=self._listen, args=(ours, self._popen), name="cloudtrain-writer", daemon=True
        ).start()

    def _send(self, message: dict[str, Any]) -> None:
        # A writer that has died is noticed by the thread that listens.
        if self._control is not None and os.getpid() == self._pid:
            with contextlib.suppress(OSError):
                self._control.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, control: socket.socket, popen: subprocess.Popen[bytes]) -> None:
        with control, control.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                self._hear(json.loads(line))
        code = popen.wait()
        with self._changed:
            if self._popen is popen:  # `end` was not called
                self._replace(code)

    def _hear(self, message: dict[str, Any]) -> None:
        if self._job is None or not ("done" in message or "failed" in message):
            return
        _, done, failed = self._job
        try:
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
        try:
            if self._tries >= TRIES:
                raise OSError(
                    f"{TRIES} writer processes have ended over it, the last one with exit code {code}"
                )
            self._tries += 1
            self._start()
            self._send({"size": len(self._job[0])})
        except OSError as error:
            _, _, failed = self._job
            failed(str(error))
            self._job = None
            self._changed.notify_all()
