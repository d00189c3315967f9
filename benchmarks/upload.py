"""Upload: bytes per second of this package relative to the best raw client, and to s3fs.

A checkpoint folder of 1.3 GB. This package is measured from `save` to the committed manifest, including digests; the clients only send
files. The target of four times s3fs is without a limit of the link: with a limit, the link is too close to the speed of s3fs. `rclone
serve s3` reads whole files to compute the ETags of a LIST, and this package lists what arrived.
"""

from __future__ import annotations

from benchmarks.clients import Ours, Place, raw_uploads, s3fs_upload
from benchmarks.measure import (
    GB,
    LIMITED,
    LINKS,
    ROUNDS,
    Checkpoint,
    Scale,
    Timing,
    Workplace,
    fastest,
    side_by_side,
)
from benchmarks.report import Row, at_least
from benchmarks.sink import Sink
from tests.servers import RcloneServer

TARGETS = {"1 GB/s link": 0.95, "no limit": 0.8}
S3FS_TARGET = 4.0
S3FS_ROUNDS = 3
"""s3fs is many times slower; three rounds are enough."""


def run(scale: Scale) -> list[Row]:
    rows = []
    with Workplace() as work:
        checkpoint = Checkpoint(work.folder / "checkpoint", scale.pick(440_000_000, 30_000_000))
        for link, rate in LINKS.items():
            with Sink(rate) as sink:
                rows += _on_sink(link, Place.of(sink), checkpoint, work, scale)
        rows.append(_on_rclone(work, scale))
    return rows


def _on_sink(link: str, place: Place, checkpoint: Checkpoint, work: Workplace, scale: Scale) -> list[Row]:
    with Ours(place, checkpoint, work) as ours:
        contestants = [
            *(ours.upload(), *raw_uploads(place, checkpoint)),
            s3fs_upload(place, checkpoint, scale.pick(S3FS_ROUNDS, 1)),
        ]
        timings = side_by_side(contestants, scale.pick(ROUNDS, 1))
    mine, s3fs = timings.pop("ours"), timings.pop("s3fs")
    what, shown = f"upload, {link}", speed(checkpoint, mine)
    best = timings[fastest(timings)].median / mine.median
    over_s3fs, slow = s3fs.median / mine.median, f"s3fs {speed(checkpoint, s3fs)}"
    return [
        at_least(what, shown, speeds(checkpoint, timings), best, TARGETS[link]),
        Row(f"{what}, over s3fs", shown, slow, f"{over_s3fs:.2f}")
        if link in LIMITED
        else at_least(f"{what}, over s3fs", shown, slow, over_s3fs, S3FS_TARGET),
    ]


def _on_rclone(work: Workplace, scale: Scale) -> Row:
    checkpoint = Checkpoint(work.folder / "for-rclone", scale.pick(110_000_000, 20_000_000))
    with RcloneServer() as server:
        place = Place.of(server, server.make_bucket())
        with Ours(place, checkpoint, work) as ours:
            timings = side_by_side([ours.upload(), *raw_uploads(place, checkpoint)], scale.pick(3, 1))
    mine = timings.pop("ours")
    ratio = timings[fastest(timings)].median / mine.median
    return Row(
        "upload, rclone serve s3", speed(checkpoint, mine), speeds(checkpoint, timings), f"{ratio:.2f}"
    )


def speed(checkpoint: Checkpoint, timing: Timing) -> str:
    return f"{checkpoint.size / timing.median / GB:.2f} GB/s"


def speeds(checkpoint: Checkpoint, timings: dict[str, Timing]) -> str:
    return ", ".join(f"{name} {speed(checkpoint, timing)}" for name, timing in timings.items())
