"""CPU per GB: CPU seconds of an upload relative to the cheapest raw client plus one pass of the digest.

The upload of 1.3 GB without a limit of the link. CPU seconds are those of all threads of the process; the endpoint is a separate
process. One pass of the digest is xxh3-128 over the same number of bytes in memory.
"""

from __future__ import annotations

import xxhash

from benchmarks.clients import Ours, Place, raw_uploads
from benchmarks.measure import GB, ROUNDS, Checkpoint, Contestant, Scale, Timing, Workplace, side_by_side
from benchmarks.report import Row, at_most
from benchmarks.sink import Sink

TARGET = 1.3
CHUNK = 2**28


def run(scale: Scale) -> list[Row]:
    with Workplace() as work, Sink() as sink:
        checkpoint = Checkpoint(work.folder / "checkpoint", scale.pick(440_000_000, 30_000_000))
        place = Place.of(sink)
        with Ours(place, checkpoint, work) as ours:
            contestants = [ours.upload(), *raw_uploads(place, checkpoint), _digest_pass(checkpoint.size)]
            timings = side_by_side(contestants, scale.pick(ROUNDS, 1))

    def a_gb(timing: Timing) -> float:
        return timing.median_cpu / checkpoint.size * GB

    mine, digest = timings.pop("ours"), timings.pop("digest")
    least = min(timing.median_cpu for timing in timings.values())
    others = ", ".join(f"{name} {a_gb(timing):.2f}" for name, timing in timings.items())
    return [
        at_most(
            "CPU of an upload",
            f"{a_gb(mine):.2f} s a GB",
            f"{others}, digest {a_gb(digest):.2f}",
            mine.median_cpu / (least + digest.median_cpu),
            TARGET,
        )
    ]


def _digest_pass(size: int) -> Contestant:
    data = memoryview(b"1" * min(CHUNK, size))  # not zeros, which would share one page

    def digest() -> None:
        hasher = xxhash.xxh3_128()
        left = size
        while left:
            hasher.update(data[:left])
            left -= min(left, len(data))

    return Contestant("digest", digest)
