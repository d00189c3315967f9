"""Typing commands, and a run on storage that no training had to write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.flush import flush
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Position
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.cli import app
from hf_cloudtrain.runtime.progress import Progress
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.testing import flip_bit

ENTRY_POINT = Path(sys.executable).with_name("cloudtrain")
ESC = "\x1b[31m"


ALL = [
    "000001-0000000100",
    "000001-0000000200",
    "000001-0000000300",
    "000002-0000000300",
    "000002-0000000400",
]
"""The checkpoints of the fixture `run`."""


class Run:
    """A run on storage, written step by step as a training would."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder = folder
        self.url = f"file://{folder}"
        self.work = work
        self.outbox = Outbox(work)
        self.catalog = Catalog(Storage(self.url))

    def begin(self, *, ago: float = 0.0, resumed_from: CheckpointKey | None = None, **facts: str) -> int:
        step = resumed_from.step if resumed_from else 0
        attempt = self.catalog.attempts.begin(
            time.time() - ago, step, resumed_from, {"host": "tern", **facts}
        )
        return attempt.number

    def accept(
        self, attempt: int, step: int, files: dict[str, bytes] | None = None, **how: Any
    ) -> OutboxEntry:
        source = self.work / "saved" / str(time.monotonic_ns())
        contents = {"config.json": b"{}", "model.safetensors": b"%d of %d" % (step, attempt), **(files or {})}
        for path, data in contents.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(data)
        facts = {"nonce": os.urandom(8).hex(), "position": Position(step, epoch=step / 100), "created": 1.8e9}
        entry = OutboxEntry(**{"run_url": self.url, "key": CheckpointKey(attempt, step), **facts, **how})
        return self.outbox.accept(source, entry)

    def save(self, attempt: int, step: int, files: dict[str, bytes] | None = None, **how: Any) -> None:
        self.accept(attempt, step, files, **how)
        flush(self.catalog, self.outbox, Progress())

    def beat(self, attempt: int, *, ago: float = 0.0, state: str = "training", **progress: Any) -> None:
        self.catalog.attempts.write_progress(attempt, {"time": time.time() - ago, "state": state, **progress})

    def committed(self) -> list[str]:
        return [str(key) for key in self.catalog.checkpoints()]


def cloudtrain(*words: str, code: int = 0, typed: str | None = None) -> Any:
    result = CliRunner().invoke(app, list(words), input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def answer(*words: str, code: int = 0) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(cloudtrain(*words, "--json", code=code).stdout)
    return record


def sentence(*words: str, code: int = 1) -> str:
    """The error line of a command that fails and prints no result."""
    result = cloudtrain(*words, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    text: str = result.stderr
    return text


def process(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ENTRY_POINT), *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )


def damage(file: Path) -> None:
    file.write_bytes(flip_bit(file.read_bytes()))
