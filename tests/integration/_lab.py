"""A run, the machines that train it, and what they leave: what the tests of real training have in common."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.download import verify
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.storage.client import Storage
from tests.integration._zygote import PATIENCE, POLL, Child, Zygote
from tests.servers import free_port

ATTEMPTS = "tests.integration._attempts"


class Lab:
    """One run URL, and a folder for each machine that trains it. Arguments go to `_attempts.train`."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.folder = folder
        self.run_url = str(folder / "run")
        self._zygote = zygote

    @property
    def catalog(self) -> Catalog:
        return Catalog(Storage(self.run_url))

    def machine(self, name: str) -> Path:
        return self.folder / name

    def start(
        self, machine: str, function: str = "train", *, module: str = ATTEMPTS, **arguments: Any
    ) -> Child:
        """An attempt on that machine, under way."""
        return self._zygote.start(
            module,
            function,
            **{
                "output_dir": self.machine(machine),
                "run_url": self.run_url,
                "result": self._result(machine),
                "seen": f"{self.folder}/{machine}-{{rank}}.seen",
                **arguments,
            },
        )

    def start_ranks(
        self, machine: str, function: str = "train", *, size: int = 2, **arguments: Any
    ) -> list[Child]:
        """One process for each rank, as torchrun would start them; `env` is for all."""
        shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"LOCAL_WORLD_SIZE": str(size), **arguments.pop("env", {})}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        return [self.start(machine, function, env={**shared, **rank}, **arguments) for rank in ranks]

    def train(self, machine: str, function: str = "train", **arguments: Any) -> Child:
        """An attempt that succeeds."""
        child = self.start(machine, function, **arguments)
        assert child.wait() == 0, child.log
        return child

    def plain(self, **arguments: Any) -> Child:
        """The same training, uninterrupted, without our callbacks."""
        return self.train("plain", run_url=None, **arguments)

    def killed(self, machine: str, *, kill_at: int, committed: int, **arguments: Any) -> Child:
        """An attempt that is killed at a step, once a checkpoint of at least step `committed` is on storage."""
        child = self.start(machine, kill_at=kill_at, committed=committed, **arguments)
        assert child.wait() == -signal.SIGKILL, child.log
        return child

    def fails(self, machine: str, function: str = "train", **arguments: Any) -> str:
        """An attempt that ends with an error; returns its output."""
        child = self.start(machine, function, **arguments)
        assert child.wait() == 1, child.log
        return child.log

    def difference(self, machine: str, other: str = "plain") -> float:
        """Max |difference| of the final weights."""
        return max_difference(self._result(machine), self._result(other))

    def batches(
        self, machine: str, *, rank: int = 0, after: int = 0, until: int = 10**9
    ) -> list[tuple[int, list[int]]]:
        """Which samples a machine's model saw, as (step, samples), within (after, until]."""
        lines = (self.folder / f"{machine}-{rank}.seen").read_text().splitlines()
        return [(step, numbers) for step, numbers in map(json.loads, lines) if after < step <= until]

    def keys(self) -> list[str]:
        return [str(key) for key in self.catalog.checkpoints()]

    def steps(self) -> list[int]:
        return [key.step for key in self.catalog.checkpoints()]

    def manifest(self, attempt: int, step: int) -> Manifest:
        return self.catalog.read(CheckpointKey(attempt, step))

    def problems(self) -> list[str]:
        """What is wrong with any committed checkpoint."""
        return problems(self.catalog)

    def outbox(self, machine: str) -> list[OutboxEntry]:
        return Outbox(self.machine(machine)).entries()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "it did not come true"
            time.sleep(POLL)

    def _result(self, machine: str) -> Path:
        return self.folder / f"{machine}.safetensors"


def max_difference(one: Path, other: Path) -> float:
    """Max |difference| over all tensors of two files; raises where their names differ."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert ours
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def problems(catalog: Catalog) -> list[str]:
    return [
        f"{key}: {problem}" for key in catalog.checkpoints() for problem in verify(catalog, catalog.read(key))
    ]
