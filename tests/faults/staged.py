"""Machines whose saves are staged, without torch: a real writer process, and files of known bytes.

What is staged is the large file of each checkpoint, as a safetensors file of one tensor; the small ones are written at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from hf_cloudtrain.checkpoints.local_home import WRITER_LOCK
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.runtime.files import locked
from hf_cloudtrain.staging import process
from hf_cloudtrain.staging.job import StagedFile
from hf_cloudtrain.staging.saves import AsyncSaves
from hf_cloudtrain.staging.window import Window
from hf_cloudtrain.storage.names import LOCAL
from tests.faults.runs import Machine, bytes_of, contents, wait_until, write_files

MODEL = "model.safetensors"
START = process._START
_IMPORT = "from hf_cloudtrain.staging.writer import main\n"


@contextmanager
def writer_program(*lines: str, unless: Path | None = None) -> Iterator[None]:
    """Within this block, writers run these lines first.

    Args:
        unless: once this file exists, writers run without the lines.
    """
    begin, end = START.split(_IMPORT)
    text = "".join(f"    {line}\n" for line in lines)
    text = f"import os\nif not os.path.exists({str(unless)!r}):\n{text}" if lines else ""
    before = process._START
    process._START = f"{begin}{_IMPORT}{text}{end}"
    try:
        yield
    finally:
        process._START = before


def crash_at(number: int, below: Path, *, then: str = "") -> list[str]:
    """Lines that end the writer just before its n-th change of a folder.

    Args:
        then: what it does right before.
    """
    return [
        "from hf_cloudtrain.testing import disk",
        f"disk.crash_now = lambda: ({then or 'None'}, __import__('os')._exit(137))",
        f"disk.CrashPoint({str(below)!r}, {number}).__enter__()",
    ]


class StagedMachine(Machine):
    """A machine whose saves are staged."""

    saves: AsyncSaves

    def start(self) -> int:
        step = super().start()
        self.saves = AsyncSaves(
            self.output_dir, expected=2**21, connection=self.checkpointer.storage.connection
        )
        assert self.checkpointer.upload_queue is not None
        self.checkpointer.upload_queue.late = self.saves
        return step

    def save(self, step: int, *, salt: str = "", delete: tuple[int, ...] = (), **options: Any) -> Path:
        """As the framework saves in a window, with older checkpoints that it rotates away."""
        folder = self.output_dir / f"checkpoint-{step}"
        files = bytes_of(step, salt)
        stage(self.saves, folder, {MODEL: files.pop(MODEL)})
        write_files(folder, files)
        window = self.saves._window
        assert window is not None
        window.deleted += [str(self.output_dir / f"checkpoint-{older}") for older in delete]
        self.checkpointer.save(folder, Position(global_step=step), **options)
        return folder

    def stop(self) -> None:
        if hasattr(self, "saves"):
            self.saves.end()
        super().stop()


def stage(saves: AsyncSaves, folder: Path, files: dict[str, bytes]) -> None:
    """What `save_file` of one tensor a file does in a window."""
    saves.settle()
    memory = saves._memory
    memory.used = 0
    saves._window = window = Window(str(folder), memory)
    saves._target = str(folder)
    for path, data in files.items():
        offset = memory.put(data)
        assert offset is not None, "the memory is large enough"
        window.files.append(
            StagedFile(path, "safetensors", [("a", "U8", [len(data)], offset, len(data))], {"metadata": None})
        )


def staged_bytes(step: int, salt: str = "") -> dict[str, bytes]:
    """The files of a checkpoint of a StagedMachine."""
    files = bytes_of(step, salt)
    return {**files, MODEL: save({"a": np.frombuffer(files[MODEL], np.uint8)})}


def whole_or_absent(output_dir: Path, salts: tuple[str, ...] = ("",)) -> list[str]:
    """The folders that look like a checkpoint and are not whole."""
    return [
        folder.name
        for folder in output_dir.glob("checkpoint-*")
        if contents(folder) not in [staged_bytes(int(folder.name.rpartition("-")[2]), salt) for salt in salts]
    ]


def wait_for_no_writer(output_dir: Path) -> None:
    """Wait until the writer of a killed training has ended."""
    lock = output_dir / LOCAL / WRITER_LOCK

    def is_free() -> bool:
        try:
            with locked(lock, 0.0):
                return True
        except BlockingIOError:
            return False

    if lock.exists():
        wait_until(is_free, "the end of the writer")
