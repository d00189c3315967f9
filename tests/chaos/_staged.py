"""The training of `_quick.py` with staged saves: its writer is a process of its own, and is killed alone or with it."""

from __future__ import annotations

import os
import signal
import sys
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.checkpoints.sender import EntrySender
from hf_cloudtrain.staging import writer
from hf_cloudtrain.staging.saves import AsyncSaves
from hf_cloudtrain.storage.client import Storage
from tests.chaos import _quick
from tests.chaos._chaos import KILLED, STAGED
from tests.chaos._kill import Aim, Phases, Watch
from tests.chaos._quick import STEPS, difference, plain, warm_up
from tests.faults.staged import stage, writer_program

if TYPE_CHECKING:
    import random

PHASES: Phases = {**_quick.PHASES, "stage": (AsyncSaves, "settle"), "hand over": (AsyncSaves, "take")}
WRITER: Phases = {
    "writer: a save": (writer, "write"),
    "writer: a file": (writer, "write_file"),
    "writer: the outbox": (Outbox, "accept"),
    "writer: an upload": (Storage, "upload"),
    "writer: a commit": (EntrySender, "_commit"),
}
"""Of the writer process. It uploads and commits after the training was killed."""
AFTER = ("writer: an upload", "writer: a commit")
MODEL = "model.safetensors"
__all__ = ["PHASES", "WRITER", "attempt", "difference", "plain", "warm_up"]


def attempt(
    output_dir: str, run_url: str, state: str, result: str, hurry: float, aim: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One attempt, as in `_quick.py`. An aim at the writer is passed on to it."""
    home = Path(state).parent
    lines = ["from tests.chaos import _staged"]
    if aim is not None and aim["phase"] in WRITER:
        passed = (
            {**aim, "visit": 1} if aim["phase"] in AFTER else aim
        )  # it has less to do than the whole attempt
        lines.append(f"_staged.watch_writer({passed!r}, {str(home)!r})")
    with writer_program(*lines, unless=home / KILLED):
        return _quick.attempt(
            output_dir, run_url, state, result, hurry, aim, phases=PHASES, saver=Saver(home, aim)
        )


def watch_writer(aim: dict[str, Any], home: str) -> None:
    """In the writer: be killed at the aim."""
    Watch(WRITER, f"{home}/writer-state", WriterAim(**aim, home=home)).begin()


class WriterAim(Aim):
    """Kills the writer, and the training with it if that still lives."""

    def __init__(self, home: str, **aim: Any) -> None:
        super().__init__(**aim)
        object.__setattr__(self, "_home", home)

    def hit(self) -> None:
        """Kill now."""
        Path(self._home, KILLED).touch()  # type: ignore[attr-defined]
        training = int(sys.argv[-1])
        if self.whole_job and os.getppid() == training:
            os.killpg(os.getpgid(training), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


class Saver:
    """How `_quick.attempt` saves and loads."""

    def __init__(self, home: Path, aim: dict[str, Any] | None) -> None:
        self._home = home
        self._dies_after = aim["visit"] if aim is not None and aim["phase"] in AFTER else None
        self._saves: AsyncSaves | None = None
        self._count = 0

    def begin(self, run: Checkpointer) -> None:
        assert run.upload_queue is not None
        self._saves = run.upload_queue.late = AsyncSaves(
            run.output_dir, expected=_quick.PADDING * 10, connection=run.storage.connection
        )

    def save(self, run: Checkpointer, at: int, weights: array[float], chance: random.Random) -> None:
        """The last save is an ordinary one, as with Trainer."""
        assert self._saves is not None
        self._saves.settle()
        folder = _quick.save(run.output_dir, at, weights, chance)
        if at == STEPS:
            run.save(folder, Position(global_step=at))
            _quick.rotate(run.output_dir, at)
            return
        data = (folder / _quick.MODEL).read_bytes()
        (folder / _quick.MODEL).unlink()
        stage(self._saves, folder, {MODEL: data})
        window = self._saves._window
        assert window is not None
        window.deleted += [str(old) for old in _quick.rotated(run.output_dir, at)]
        run.save(folder, Position(global_step=at))
        assert run.attempt is not None
        with open(self._home / STAGED, "a") as file:
            file.write(f"{run.attempt.number} {at}\n")
        self._count += 1
        if self._count == self._dies_after:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    def model(self, folder: Path) -> bytes:
        """The bytes of the model in a checkpoint of either kind."""
        if (folder / _quick.MODEL).exists():
            return (folder / _quick.MODEL).read_bytes()
        data = (folder / MODEL).read_bytes()
        return data[8 + int.from_bytes(data[:8], "little") :]

    def end(self) -> None:
        assert self._saves is not None
        self._saves.end()
