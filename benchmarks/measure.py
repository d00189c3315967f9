"""Measure contestants side by side; the files that they move."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GB = 1e9
LINKS = {"1 GB/s link": 1 * GB, "no limit": None}
"""Speeds of the link to the endpoint, in bytes a second."""
ROUNDS = 7
"""Rounds of each contestant that moves a checkpoint."""
LIMITED = tuple(name for name, rate in LINKS.items() if rate)
SLOW_LINK = 125e6
"""Bytes a second of a 1 Gbit/s link."""


@dataclass(frozen=True)
class Scale:
    """How much is measured. `quick` only checks that the benchmarks run; its values mean nothing."""

    quick: bool = False

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass(frozen=True)
class Contestant:
    """One way to do the same work."""

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    """Runs before the clock starts."""
    rounds: int | None = None
    """Fewer rounds than the others, for one that is very slow."""


@dataclass
class Timing:
    """All rounds of one contestant."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of this process; the endpoint is a separate process."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)


def side_by_side(contestants: Sequence[Contestant], rounds: int) -> dict[str, Timing]:
    """Let the contestants take turns. Each round starts with a different one, so that the order gives no advantage."""
    timings = {contestant.name: Timing() for contestant in contestants}
    for number in range(rounds):
        first = number % len(contestants)
        for contestant in (*contestants[first:], *contestants[:first]):
            if contestant.rounds is None or number < contestant.rounds:
                contestant.prepare()
                gc.collect()
                os.sync()  # so that this one does not wait for writes of the one before
                cpu, start = time.process_time(), time.perf_counter()
                contestant.run()
                timings[contestant.name].seconds.append(time.perf_counter() - start)
                timings[contestant.name].cpu.append(time.process_time() - cpu)
    return timings


def fastest(timings: dict[str, Timing]) -> str:
    return min(timings, key=lambda name: timings[name].median)


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest rank: of fewer than 100 values, the 99th percentile is the largest."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


class Checkpoint:
    """A checkpoint folder of a model with AdamW: weights, twice as many bytes of optimizer state, 8 small files.

    The large files are sparse. They are read once, so that they are in the page cache as after a save. They contain only zeros,
    as the endpoint returns them, so digests can be verified.
    """

    SMALL = 20_000

    def __init__(self, folder: Path, weights: int) -> None:
        self.folder = folder
        self.sizes = {"optimizer.pt": 2 * weights, "model.safetensors": weights}
        self.sizes |= {f"small-{number}.json": self.SMALL for number in range(8)}
        folder.mkdir(parents=True)
        for name, size in self.sizes.items():
            with open(folder / name, "w+b") as file:
                file.truncate(size)
                while file.read(2**24):
                    pass

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())


class Workplace:
    """A temporary folder that is deleted at the end. `TMPDIR` chooses the disk."""

    def __enter__(self) -> Workplace:  # noqa: PYI034 - typing.Self came with Python 3.11
        self.folder = Path(tempfile.mkdtemp(prefix="cloudtrain-bench-"))
        self._numbers = itertools.count(1)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def fresh(self, name: str) -> Path:
        """Create an empty folder with this name; delete an existing one."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def another(self) -> int:
        """Return a number that was not used before."""
        return next(self._numbers)


def pin(pid: int, core: int) -> None:
    """Pin all threads of a process, and those that they start, to one core, if the system supports it."""
    if hasattr(os, "sched_setaffinity"):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread.name), {core})
