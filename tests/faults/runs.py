"""A run that tests start, interrupt and continue: small checkpoint folders of known bytes; each machine is a folder."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.download import verify
from hf_cloudtrain.checkpoints.flush import flush
from hf_cloudtrain.checkpoints.frozen import SMALL_FILE, OutboxEntry
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Position
from hf_cloudtrain.errors import OvertakenError
from hf_cloudtrain.runtime.progress import Progress
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.names import LOCAL
from hf_cloudtrain.testing import FaultyStorage

DEADLINE = 30.0
"""Seconds after which a test stops waiting and fails."""


class Machine:
    """One machine of a run: its disk, and the Checkpointer of its only process."""

    def __init__(self, output_dir: Path, url: str, **options: Any) -> None:
        self.output_dir = output_dir
        self.checkpointer = Checkpointer(url, output_dir, **options)

    def start(self) -> int:
        """Restore and begin as a training script does; return the step that training resumes after."""
        restored = self.checkpointer.restore()
        step = restored.manifest.step if restored else 0
        self.checkpointer.begin(step)
        return step

    def save(self, step: int, *, salt: str = "", **options: Any) -> Path:
        folder = write_checkpoint(self.output_dir, step, salt)
        self.checkpointer.save(folder, Position(global_step=step), **options)
        return folder

    def rotate(self, step: int) -> None:
        """Delete an old folder, as `save_total_limit` does."""
        shutil.rmtree(self.output_dir / f"checkpoint-{step}")

    def wait(self) -> None:
        self.checkpointer.wait(DEADLINE)

    def land(self) -> None:
        """Wait for the commits; if a newer attempt has overtaken this one, flush the outbox by hand."""
        try:
            self.wait()
        except OvertakenError:
            self.stop()
            flush(self.checkpointer.catalog, self.checkpointer.outbox, Progress())

    def waiting(self) -> list[CheckpointKey]:
        """What is in the outbox, once what was replaced is gone."""
        if self.checkpointer.upload_queue is not None:
            self.checkpointer.upload_queue._dropping.settle(DEADLINE)
        return [entry.key for entry in self.checkpointer.outbox.entries()]

    def stop(self) -> None:
        self.checkpointer.close()
        upload_queue = self.checkpointer.upload_queue
        if upload_queue is not None:
            upload_queue._thread.join(DEADLINE)
            assert not upload_queue._thread.is_alive()


class Machines:
    """The machines of one run and its storage, whose faults are set on `storage`; stops their threads at the end."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.storage = FaultyStorage(f"file://{self.run}")
        self.catalog = Catalog(Storage(f"file://{self.run}"))
        self.gate = threading.Event()
        """For `storage.hold`: opened at the end, so that every thread can end."""
        self._folder = folder
        self.made: list[Machine] = []
        self._everywhere = self.storage.everywhere()

    def __enter__(self) -> Machines:  # noqa: PYI034 - typing.Self came with Python 3.11
        self._everywhere.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.gate.set()
            self.storage.heal()
            for machine in self.made:
                machine.stop()
        finally:
            self._everywhere.__exit__(None, None, None)

    def new(self, name: str = "out", **options: Any) -> Machine:
        """A machine with the disk `name`, which may be empty or used before."""
        machine = Machine(self._folder / name, self.storage.url, **options)
        self.made.append(machine)
        return machine

    def restored(self, name: str) -> dict[str, bytes] | None:
        """The files that the machine `name` restores; None if the run has no checkpoint."""
        found = self.new(name).checkpointer.restore()
        return contents(found.path) if found else None

    def committed(self) -> list[tuple[int, int]]:
        """(attempt, step) of each checkpoint that exists; fails unless each one is complete."""
        keys = self.catalog.checkpoints()
        for key in keys:
            assert verify(self.catalog, self.catalog.read(key)) == []
        return [(key.attempt, key.step) for key in keys]


def bytes_of(step: int, salt: str = "") -> dict[str, bytes]:
    """Files of a checkpoint: one large enough to be linked, small ones, one in a folder, one that is empty."""
    name = f"{salt}-{step}-".encode()
    return {
        "model.safetensors": (name * (SMALL_FILE // len(name) + 1))[: SMALL_FILE + step],
        "trainer_state.json": f'{{"global_step": {step}, "salt": "{salt}"}}'.encode(),
        "state/rng_state_0.pth": b"random" + name,
        "empty": b"",
    }


def write_checkpoint(output_dir: Path, step: int, salt: str = "") -> Path:
    """Write a checkpoint as a framework does: in place if the folder exists."""
    folder = output_dir / f"checkpoint-{step}"
    write_files(folder, bytes_of(step, salt))
    return folder


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def entry_of(url: str, attempt: int, step: int, **options: Any) -> OutboxEntry:
    """An outbox entry before it is accepted."""
    return OutboxEntry(
        run_url=url,
        key=CheckpointKey(attempt, step),
        nonce=f"{attempt:032x}-{step}",
        position=Position(global_step=step),
        **options,
    )


def left_overs(output_dir: Path) -> list[str]:
    """What finished work has left on a machine: unfinished folders, trash, outbox entries."""
    meta = output_dir / LOCAL
    return sorted(
        path.relative_to(meta).as_posix()
        for pattern in ("restore-*", ".meet-*", "outbox/*")
        for path in meta.glob(pattern)
    )


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait until another thread has made the condition true."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.005)


def one_fast(cases: Iterable[str]) -> list[Any]:
    """The first case of a sweep for `make test`, the others for `make test-slow`."""
    first, *others = cases
    return [first, *(pytest.param(case, marks=pytest.mark.slow) for case in others)]
