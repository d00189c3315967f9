"""A stand-in for the process that writes staged saves: a thread of the test's own process, which can be held up and can fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from hf_cloudtrain.checkpoints.local_home import own_writers
from hf_cloudtrain.staging import recorders, saves
from hf_cloudtrain.staging.job import WriteJob
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.writer import write

if TYPE_CHECKING:
    import pytest


class LateWriters:
    """The writers of a test, and what they have done.

    Example:
        >>> with LateWriters.instead_of_processes(monkeypatch) as writers:
        ...     train()
        >>> writers.written
        ['checkpoint-2', 'checkpoint-4']
    """

    def __init__(self) -> None:
        self.may_write = threading.Event()
        self.may_write.set()
        self.jobs: list[WriteJob] = []
        self.written: list[str] = []
        """Names of the checkpoints that are whole."""
        self.fails: set[str] = set()
        """Names of those that cannot be written."""

    @classmethod
    @contextmanager
    def instead_of_processes(cls, monkeypatch: pytest.MonkeyPatch) -> Iterator[LateWriters]:
        """Stage files of any size, and write them in threads. At the end nothing of torch and safetensors is replaced."""
        before = replaced_functions()
        writers = cls()
        monkeypatch.setattr(recorders, "SMALL_FILE", 0)
        monkeypatch.setattr(saves, "WriterProcess", lambda output_dir, memory: LateWriter(memory, writers))
        yield writers
        writers.may_write.set()
        for saves_of_a_killed_training in [*own_writers.values()]:
            saves_of_a_killed_training.end()
        assert replaced_functions() == before


class LateWriter:
    """In place of `WriterProcess`."""

    def __init__(self, memory: StagingMemory, all_of_them: LateWriters) -> None:
        self._memory = memory
        self._all = all_of_them
        self._thread = threading.Thread()

    def write(self, job: WriteJob, done: Callable[[str], None], failed: Callable[[str], None]) -> None:
        assert not self.is_busy
        job = WriteJob.decode(job.encode())
        self._all.jobs.append(job)
        self._thread = threading.Thread(target=self._work, args=(job, done, failed), daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        return self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> bool:
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self.is_busy

    def end(self) -> None: ...

    pid = 4711

    def _work(self, job: WriteJob, done: Callable[[str], None], failed: Callable[[str], None]) -> None:
        self._all.may_write.wait()
        name = Path(job.target).name
        if name in self._all.fails:
            failed("[Errno 28] No space left on device")
            return
        answer = write(job, self._memory)
        self._all.written.append(name)
        done(answer["done"])


def replaced_functions() -> tuple[Any, ...]:
    """The functions that a staged save replaces, as they are now."""
    import shutil

    serialize: Any = safetensors.torch
    return torch.serialization._open_zipfile_writer, serialize.serialize_file, shutil.rmtree
