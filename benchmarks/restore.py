"""Restore: verified bytes per second of this package relative to the best raw download.

A checkpoint of 1.3 GB. This package is measured from the URL to a verified folder: probe, LIST, manifest, files and all digests; the
clients only fetch files. All write to the same disk.

Without a limit of the link, the two cores limit both sides: client and endpoint share them, and one pass of the digest takes 0.1 s of
CPU time a GB, an eighth of what a raw client takes in all. `rclone serve s3` answers a request for a range with status 200, which
obstore refuses, so each file comes in one stream; boto3 accepts it and fetches several ranges at once.
"""

from __future__ import annotations

from benchmarks.clients import Ours, Place, raw_downloads
from benchmarks.measure import LINKS, ROUNDS, Checkpoint, Scale, Workplace, fastest, side_by_side
from benchmarks.report import Row, at_least
from benchmarks.sink import Sink
from benchmarks.upload import speed, speeds
from tests.servers import RcloneServer

TARGETS = {"1 GB/s link": 0.98, "no limit": 0.95, "rclone serve s3": 0.95}


def run(scale: Scale) -> list[Row]:
    rows = []
    with Workplace() as work:
        checkpoint = Checkpoint(work.folder / "checkpoint", scale.pick(440_000_000, 30_000_000))
        for link, rate in LINKS.items():
            with Sink(rate) as sink:
                ratio, mine, others = _measure(Place.of(sink), checkpoint, work, scale.pick(ROUNDS, 1))
            rows.append(at_least(f"restore, {link}", mine, others, ratio, TARGETS[link]))
        small = Checkpoint(work.folder / "for-rclone", scale.pick(110_000_000, 20_000_000))
        with RcloneServer() as server:
            place = Place.of(server, server.make_bucket())
            ratio, mine, others = _measure(place, small, work, scale.pick(3, 1))
        rows.append(at_least("restore, rclone serve s3", mine, others, ratio, TARGETS["rclone serve s3"]))
    return rows


def _measure(place: Place, checkpoint: Checkpoint, work: Workplace, rounds: int) -> tuple[float, str, str]:
    with Ours(place, checkpoint, work) as ours:
        ours.save_and_commit()
        timings = side_by_side([ours.download(), *raw_downloads(place, checkpoint, work)], rounds)
    mine = timings.pop("ours")
    ratio = timings[fastest(timings)].median / mine.median
    return ratio, speed(checkpoint, mine), speeds(checkpoint, timings)
