"""Stall of a save: how long training waits for this package.

BERT base trains with AdamW and saves its 1.3 GB after each step. The link to the endpoint has 125 MB/s, so an earlier upload is still
running at each save after the first. Measured are `on_save` of this package and Trainer's own `_save_checkpoint`. With two ranks there
is a barrier first, so the stall is the time from the arrival of the last rank until the last rank continues, with a folder of the
same size. Of fewer than 100 saves, the 99th percentile is the slowest one.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from benchmarks.clients import Place
from benchmarks.measure import SLOW_LINK, Checkpoint, Scale, Workplace, percentile
from benchmarks.report import Row, at_most
from benchmarks.sink import Sink
from hf_cloudtrain import CloudTrainCallback
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.storage.names import LOCAL

MEDIAN_TARGET, P99_TARGET = 10.0, 50.0
"""Milliseconds."""
SHARE_TARGET = 2.0
"""Percent of Trainer's own save."""
RANKS = 2
SAVES = 30


def run(scale: Scale) -> list[Row]:
    with Workplace() as work:
        with Sink(SLOW_LINK) as sink:
            stalls, saves, busy = _train(Place.of(sink), work, scale)
        rows = [
            *stall_rows("stall of a save, in Trainer", stalls, f"{busy} of {len(stalls)} beside an upload"),
            share_row("stall beside Trainer's own save", stalls, "Trainer", saves),
        ]
        with Sink(SLOW_LINK) as sink:
            stalls = _two_ranks(Place.of(sink), work, scale)
        return rows + stall_rows(f"stall of a save, {RANKS} ranks", stalls, f"{len(stalls)} saves")


def stall_rows(
    what: str, stalls: Sequence[float], beside: str, median_target: float = MEDIAN_TARGET
) -> list[Row]:
    """Median and 99th percentile of the stalls in seconds; the target is in milliseconds."""
    median, slowest = statistics.median(stalls) * 1e3, percentile(stalls, 99) * 1e3
    shown = f"median {median:.1f} ms, p99 {slowest:.1f} ms"
    return [
        at_most(f"{what}: median", shown, beside, median, median_target, " ms"),
        at_most(f"{what}: p99", shown, beside, slowest, P99_TARGET, " ms"),
    ]


def share_row(what: str, stalls: Sequence[float], framework: str, saves: Sequence[float]) -> Row:
    """The stall relative to the framework's own save, both in seconds."""
    stall, own = statistics.median(stalls), statistics.median(saves)
    shown, beside = f"{stall * 1e3:.1f} ms", f"{framework} {own * 1e3:.0f} ms"
    return at_most(what, shown, beside, stall / own * 100, SHARE_TARGET, " %")


def bert(scale: Scale) -> BertForSequenceClassification:
    """BERT base: 1.3 GB with the state of AdamW."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        if scale.quick
        else BertConfig()
    )


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    """Short inputs: only the number of saves matters."""
    return [{"input_ids": torch.arange(8), "labels": torch.tensor(number % 2)} for number in range(count)]


def is_uploading(output_dir: str | Path) -> bool:
    """Whether an earlier save is still being uploaded."""
    return any(Path(output_dir, LOCAL, "outbox").glob("[0-9]*"))


def _train(place: Place, work: Workplace, scale: Scale) -> tuple[list[float], list[float], int]:
    """Return the seconds of each on_save, of each of Trainer's own saves, and the number of saves during an upload."""
    args = TrainingArguments(
        output_dir=str(work.folder / "out"),
        max_steps=scale.pick(SAVES, 3),
        save_steps=1,
        save_total_limit=2,
        per_device_train_batch_size=1,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    cloud = CloudTrainCallback("s3://bench/stall", storage_options=place.storage_options, async_save=False)
    timed = _TimedSaves(cloud)
    trainer = _TimedTrainer(
        model=bert(scale),
        args=args,
        train_dataset=sentences(64),
        callbacks=[cloud],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return timed.seconds, trainer.seconds, timed.busy


class _TimedTrainer(Trainer):
    """Records the seconds of its own saves."""

    def __init__(self, **kwargs: Any) -> None:
        self.seconds: list[float] = []
        super().__init__(**kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)


class _TimedSaves:
    """Records the seconds of a callback's `on_save`, and the number of saves during an upload.

    The callback keeps its class: a subclass would be a callback of the script, which each save looks into.
    """

    def __init__(self, cloud: CloudTrainCallback) -> None:
        self.seconds: list[float] = []
        self.busy = 0
        self._on_save: Any = cloud.on_save
        vars(cloud)["on_save"] = self

    def __call__(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        self.busy += is_uploading(args.output_dir)
        start = time.perf_counter()
        self._on_save(args, *rest, **kwargs)
        self.seconds.append(time.perf_counter() - start)


def _two_ranks(place: Place, work: Workplace, scale: Scale) -> list[float]:
    import torch.multiprocessing

    checkpoint = Checkpoint(work.folder / "checkpoint", scale.pick(440_000_000, 1_000_000))
    rendezvous = work.fresh("rendezvous")
    arguments = (place, str(checkpoint.folder), str(rendezvous), scale.pick(60, 5))
    torch.multiprocessing.spawn(_rank, arguments, nprocs=RANKS)
    return [float(line) for line in (rendezvous / "stalls").read_text().split()]


def _rank(rank: int, place: Place, folder: str, rendezvous: str, saves: int) -> None:
    import logging

    import torch.distributed as dist

    logging.getLogger("hf_cloudtrain").setLevel(logging.ERROR)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}/store", rank=rank, world_size=RANKS)
    checkpointer = Checkpointer(
        "s3://bench/ranks", f"{rendezvous}/out", storage_options=place.storage_options
    )
    checkpointer.begin(0)
    times = []
    for step in range(1, saves + 1):
        time.sleep(random.uniform(0.1, 0.3))
        arrived = time.monotonic()  # the same clock for all processes of a machine
        checkpointer.save(Path(folder), Position(global_step=step))
        times.append((arrived, time.monotonic()))
    all_times: list[Any] = [None] * RANKS
    dist.all_gather_object(all_times, times)
    checkpointer.wait()
    checkpointer.close()
    if rank == 0:
        stalls = (max(after for _, after in save) - max(before for before, _ in save)
                  for save in zip(*all_times, strict=True))  # fmt: skip
        Path(rendezvous, "stalls").write_text("\n".join(map(repr, stalls)))
    dist.destroy_process_group()
