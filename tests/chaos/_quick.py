"""A training without torch that only saves and resumes, so that a thousand of them can be killed in minutes."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from array import array
from pathlib import Path
from typing import Any

import s3fs  # noqa: F401 - imported before the fork

from hf_cloudtrain.checkpoints import checkpointer, deletion, upload_queue
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.frozen import SMALL_FILE
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.checkpoints.retention import protected
from hf_cloudtrain.checkpoints.sender import EntrySender
from hf_cloudtrain.runtime.provenance import origin
from hf_cloudtrain.storage.client import Storage
from tests.chaos._kill import Aim, Phases, Watch

PHASES: Phases = {
    "flush": (checkpointer, "finish_left_overs"),
    "restore": (Checkpointer, "restore"),
    "download": (Storage, "download"),
    "begin": (Checkpointer, "begin"),
    "save": (Checkpointer, "save"),
    "upload": (Storage, "upload"),
    "commit": (EntrySender, "_commit"),
    "delete": (deletion, "retire"),
    "end": (Checkpointer, "wait"),
}
STEPS, SAVE_STEPS, KEPT = 12, 2, 2
NUMBERS = 64
MODEL = "model.bin"
PADDING = SMALL_FILE // 8 + 1
"""Numbers that make a file so large that it is linked, not copied."""


def warm_up() -> None:
    """Cache what each forked process would compute again."""
    origin()


def plain(result: str) -> None:
    """The same training, uninterrupted and without hf_cloudtrain."""
    weights, chance = begin()
    for _ in range(STEPS):
        step(weights, chance)
    Path(result).write_bytes(weights.tobytes())


def attempt(
    output_dir: str,
    run_url: str,
    state: str,
    result: str,
    hurry: float,
    aim: dict[str, Any] | None = None,
    phases: Phases = PHASES,
    saver: Any = None,
) -> dict[str, Any]:
    """One attempt: resume, train, save, delete old checkpoints, wait.

    Args:
        hurry: share of saves that do not wait for the upload of the previous one, and share of slow uploads.
        saver: how it saves and loads; None: `Saver`.
    """
    saver = saver or Saver()
    os.setpgrp()
    upload_queue.MAX_WAITING = 1_000  # steps of microseconds are faster than any upload
    hurries = random.Random(hurry)
    slow_down(hurry)
    watch = Watch(phases, state, Aim(**aim) if aim else None)
    watch.begin()
    run = Checkpointer(run_url, output_dir)
    restored = run.restore()
    weights, chance = load(restored.path, saver.model(restored.path)) if restored else begin()
    done = restored.manifest.step if restored else 0
    run.begin(done)
    saver.begin(run)
    for at in range(done + 1, STEPS + 1):
        step(weights, chance)
        if at % SAVE_STEPS == 0:
            saver.save(run, at, weights, chance)
            retire_old(run.catalog)
            if hurries.random() > hurry:
                run.wait()
    run.wait()
    retire_old(run.catalog)
    saver.end()
    run.close()
    Path(result).write_bytes(weights.tobytes())
    return {"events": watch.events, "visits": watch.visits}


class Saver:
    """Ordinary saves."""

    def begin(self, run: Checkpointer) -> None:
        """Nothing to prepare."""

    def save(self, run: Checkpointer, at: int, weights: array[float], chance: random.Random) -> None:
        run.save(save(run.output_dir, at, weights, chance), Position(global_step=at))
        rotate(run.output_dir, at)

    def model(self, folder: Path) -> bytes:
        return (folder / MODEL).read_bytes()

    def end(self) -> None:
        """Nothing to end."""


def slow_down(share: float) -> None:
    """Slow uploads, so that checkpoints accumulate in the outbox."""
    chance, upload = random.Random(share), Storage.upload

    def slow(*args: Any, **options: Any) -> Any:
        if chance.random() < share:
            time.sleep(0.02)
        return upload(*args, **options)

    Storage.upload = slow  # type: ignore[method-assign]


def begin() -> tuple[array[float], random.Random]:
    return array("d", [0.0] * NUMBERS), random.Random(7)


def step(weights: array[float], chance: random.Random) -> None:
    """Each number depends on all random numbers so far, so a repeated or missing step changes the result."""
    for at in range(NUMBERS):
        weights[at] = 0.99 * weights[at] + chance.random()


def save(output_dir: Path, at: int, weights: array[float], chance: random.Random) -> Path:
    """Overwrites a folder of an earlier attempt, as frameworks do."""
    folder = output_dir / f"checkpoint-{at}"
    (folder / "state").mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes((weights + array("d", [float(at)] * PADDING)).tobytes())
    (folder / "state/random.json").write_text(json.dumps(chance.getstate()))
    (folder / "empty").write_bytes(b"")
    return folder


def load(folder: Path, model: bytes) -> tuple[array[float], random.Random]:
    weights, chance = begin()
    found = array("d", model)
    version, state, rest = json.loads((folder / "state/random.json").read_text())
    chance.setstate((version, tuple(state), rest))
    weights[:] = found[:NUMBERS]
    return weights, chance


def rotate(output_dir: Path, at: int) -> None:
    """Delete old local checkpoints, as Trainer's save_total_limit does."""
    for folder in rotated(output_dir, at):
        shutil.rmtree(folder)


def rotated(output_dir: Path, at: int) -> list[Path]:
    """The local checkpoints that are too old after the save of a step."""
    oldest = at - SAVE_STEPS * (KEPT - 1)
    return [
        folder for folder in output_dir.glob("checkpoint-*") if int(folder.name.rpartition("-")[2]) < oldest
    ]


def retire_old(catalog: Catalog) -> None:
    """Delete old checkpoints on storage."""
    kept = protected(catalog)
    for key in catalog.checkpoints()[:-KEPT]:
        if key not in kept:
            deletion.retire(catalog, key)


def difference(one: Path, other: Path) -> float:
    """Max |difference| of two results."""
    ours, theirs = array("d", one.read_bytes()), array("d", other.read_bytes())
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
