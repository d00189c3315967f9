"""The functions: what they add to a step, and how long `upload_checkpoint` copies.

A step is an empty `with train_step():` with `metric` every 10 steps and the heartbeat thread running; stretches as in `step`.
`upload_checkpoint` copies a checkpoint of 1.3 GB, because the script overwrites the folder later, unless the file system can share
blocks. The link to the endpoint has 125 MB/s, so an earlier upload is still running.
"""

from __future__ import annotations

import json
import os
import statistics
import time

import hf_cloudtrain as ct
from benchmarks.clients import Place
from benchmarks.measure import SLOW_LINK, Checkpoint, Scale, Workplace, percentile
from benchmarks.report import Row
from benchmarks.sink import Sink
from benchmarks.stall import is_uploading
from benchmarks.step import LOGGING_STEPS, STRETCHES, CountOperations, operations_row, step_row


def run(scale: Scale) -> list[Row]:
    with Workplace() as work:
        checkpoint = Checkpoint(work.folder / "checkpoint", scale.pick(440_000_000, 1_000_000))
        with Sink(SLOW_LINK) as sink:
            _begin(Place.of(sink), checkpoint)
            stretch = scale.pick(500, 20)
            micros = [_steps(stretch) / stretch * 1e6 for _ in range(STRETCHES)]
            with CountOperations() as counted:
                _steps(stretch)
            copies = [_upload(checkpoint) for _ in range(scale.pick(7, 2))]
            ct.init(None)  # ends the previous run and uploads what is left
    return [
        step_row("a step without a save, train_step", micros),
        operations_row("torch operations in train_step and metric", counted.count),
        _copy_row(checkpoint, copies),
    ]


def _begin(place: Place, checkpoint: Checkpoint) -> None:
    # As a launcher passes storage options.
    os.environ["HF_CLOUDTRAIN_STORAGE_OPTIONS"] = json.dumps(place.storage_options)
    ct.init(None, run_url=f"s3://{place.bucket}/functions", checkpoint_dir=checkpoint.folder)


def _steps(count: int) -> float:
    """Run `count` steps; return the seconds inside the functions."""
    start = time.perf_counter()
    for number in range(count):
        with ct.train_step():
            pass
        if number % LOGGING_STEPS == 0:
            ct.metric({"loss": 0.5, "learning_rate": 1e-4})
    return time.perf_counter() - start


def _upload(checkpoint: Checkpoint) -> tuple[float, bool]:
    """Return the seconds, and whether an earlier upload was running."""
    _steps(1)
    busy, start = is_uploading(checkpoint.folder), time.perf_counter()
    ct.upload_checkpoint()
    return time.perf_counter() - start, busy


def _copy_row(checkpoint: Checkpoint, copies: list[tuple[float, bool]]) -> Row:
    seconds = [copied for copied, _ in copies]
    median = statistics.median(seconds)
    return Row(
        f"upload_checkpoint, {checkpoint.size / 1e9:.1f} GB",
        f"median {median * 1e3:.0f} ms, p99 {percentile(seconds, 99) * 1e3:.0f} ms",
        f"{sum(busy for _, busy in copies)} of {len(copies)} beside an upload",
        f"{checkpoint.size / median / 1e6:.0f} MB/s",
    )
