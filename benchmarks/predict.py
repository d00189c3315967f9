"""`cloudtrain predict` killed five times in the middle of a shard, beside one that is not interrupted.

Model and texts are those of `serve`, and each command has one thread. What was redone is, for each kill, the start of the command that was
killed (until its first row) and the part of a shard that was not committed. The value is the time of the killed prediction without what was
redone, over that of the other, which is the mean of one before and one after. CPU time is that of the commands.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import Scale
from benchmarks.report import Row, at_most
from benchmarks.serve import texts, write_model

KILLS = 5
SHARDS = 25
LIMIT = 1.1


@dataclass(frozen=True)
class Cost:
    """Seconds of a command, or of a part of it."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.wall * factor, self.cpu * factor)


def run(scale: Scale) -> list[Row]:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_model(folder / "model")
        rows = texts(scale.pick(50_000, 250))
        pq.write_table(pa.table({"text": rows}), folder / "data.parquet")
        shard = len(rows) // SHARDS
        before = _predict(folder, "whole", shard)
        killed = redone = starts = Cost()
        for number in range(1, KILLS + 1):
            took, start, rest = _killed(folder, "killed", shard, number * SHARDS // (KILLS + 1))
            killed, starts, redone = killed + took, starts + start, redone + start + rest
        killed += _predict(folder, "killed", shard)
        whole = (before + _predict(folder, "again", shard)) * 0.5
        differ = (folder / "killed.parquet").read_bytes() != (folder / "whole.parquet").read_bytes()
        return [
            at_most(f"killed {KILLS} times: files that differ", "", "", float(differ), 0),
            *(
                at_most(
                    f"{what} of {len(rows):,} rows, killed {KILLS} times, without what was redone",
                    f"{getattr(killed, kind):.1f} s, redone {getattr(redone, kind):.1f} s (starts {getattr(starts, kind):.1f} s)",
                    f"uninterrupted {getattr(whole, kind):.1f} s",
                    (getattr(killed, kind) - getattr(redone, kind)) / getattr(whole, kind),
                    LIMIT,
                )
                for what, kind in (("time", "wall"), ("CPU time", "cpu"))
            ),
        ]


def _predict(folder: Path, out: str, shard: int) -> Cost:
    """What a command costs that ends by itself."""
    begun, process = time.perf_counter(), _started(folder, out, shard)
    return _ended(process, begun, 0)


def _killed(folder: Path, out: str, shard: int, shards: int) -> tuple[Cost, Cost, Cost]:
    """What a command costs that is killed in the middle of the shard after so many; and of it, its start and the part of the shard."""
    parts = folder / f"{out}.parquet.parts"
    begun, process = time.perf_counter(), _started(folder, out, shard)

    def now() -> Cost:
        return Cost(time.perf_counter() - begun, sum(process.cpu_times()[:2]))

    count = len(list(parts.glob("[0-9]*.json")))
    commits: list[tuple[int, Cost]] = []
    while count < shards:
        if process.poll() is not None:
            raise RuntimeError(
                f"`cloudtrain predict` ended with exit code {process.returncode} after {count} shards."
            )
        time.sleep(0.002)
        if (found := len(list(parts.glob("[0-9]*.json")))) > count:
            count = found
            commits.append((count, now()))
    (first, at_first), (last, at_last) = commits[0], commits[-1]
    one = (at_last - at_first) * (1 / max(1, last - first))
    time.sleep(max(0.0, one.wall / 2))
    rest = now() - at_last
    process.send_signal(signal.SIGKILL)
    return _ended(process, begun, -signal.SIGKILL), at_first - one, rest


def _started(folder: Path, out: str, shard: int) -> psutil.Popen:
    paths = [str(folder / "model"), str(folder / "data.parquet"), "-o", str(folder / f"{out}.parquet")]
    return psutil.Popen(
        [sys.executable, "-m", "hf_cloudtrain.cli", "predict", *paths, "--shard", str(shard)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_CLOUDTRAIN_STORE": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _ended(process: psutil.Popen, begun: float, code: int) -> Cost:
    _, status, used = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != code:
        raise RuntimeError(f"`cloudtrain predict` ended with exit code {os.waitstatus_to_exitcode(status)}.")
    return Cost(time.perf_counter() - begun, used.ru_utime + used.ru_stime)
