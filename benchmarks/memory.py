"""Memory: additional resident memory of an upload with files of 10 GB.

A separate process saves a folder of sparse files and waits for the commit, on a link of 1 GB/s, so that all buffers fill. Measured is
the peak of its resident memory minus the resident memory after all imports and connections.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.clients import Ours, Place
from benchmarks.measure import GB, Checkpoint, Scale, Workplace
from benchmarks.report import Row, at_most
from benchmarks.sink import Sink

TARGET = 256.0


def run(scale: Scale) -> list[Row]:
    size = scale.pick(10_000_000_000, 300_000_000)
    rows = []
    for files in (1, 2):
        with Sink(1 * GB) as sink:
            command = [sys.executable, "-m", "benchmarks.memory", sink.endpoint, str(size), str(files)]
            answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        rows.append(
            at_most(
                f"extra memory of an upload, {files} x {size / GB:g} GB",
                f"{answer['peak']:.0f} MiB at its peak",
                f"{answer['before']:.0f} MiB before it",
                answer["peak"] - answer["before"],
                TARGET,
                " MiB",
            )
        )
    return rows


def main() -> None:
    endpoint, size, files = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with Workplace() as work:
        checkpoint = Checkpoint(work.folder / "checkpoint", 0)
        for number in range(files):
            with open(checkpoint.folder / f"large-{number}.bin", "wb") as file:
                file.truncate(size)
        with Ours(Place(endpoint, "sink", "sink"), checkpoint, work) as ours:
            before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            ours.save_and_commit()
            print(json.dumps({"before": before, "peak": _resident("VmHWM")}))


def _resident(field: str) -> float:
    """MiB, from /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    main()
