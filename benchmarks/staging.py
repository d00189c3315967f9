"""Asynchronous saves: how long training waits for a save whose files a process of its own writes.

BERT base trains with AdamW and saves its 1.3 GB after each step; asynchronous saves and ordinary ones take turns. The link to the endpoint
has 125 MB/s, so an earlier upload is still running. Measured is the time from `on_step_end` to the next `on_step_begin`: staging,
moving the folder, handing over. Each save begins when the writer is idle. Beside it stand one memcpy of the same number of bytes into
memory that is populated, before and after each save, and Trainer's own `_save_checkpoint` in the ordinary saves. The first save
is compared with the median of the later ones. "Many small tensors" is AdamW on 10,000 parameters of 128 numbers.

With two ranks of DistributedDataParallel the stall is the time from the `on_step_end` of the last rank until the last rank continues.

Memory is the proportional set size (PSS) that the training and the writer have together when the first save is written, less that of
the training before it without its shared memory, less the bytes of the checkpoint. Its upload, which begins then, is measured by
`memory`.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from benchmarks.clients import Place
from benchmarks.measure import SLOW_LINK, Scale, Workplace, percentile
from benchmarks.report import Row, at_most
from benchmarks.sink import Sink
from benchmarks.stall import RANKS, bert, sentences
from hf_cloudtrain import CloudTrainCallback
from hf_cloudtrain.staging.saves import AsyncSaves

MB = 2**20
SAVES = 20
MEMCPY_MEDIAN, MEMCPY_P99, PLAIN = 1.3, 2.0, 0.25
FIRST = 1.5
SMALL_TENSORS = 0.6
MEMORY = 256


def run(scale: Scale) -> list[Row]:
    with Workplace() as work:
        with Sink(SLOW_LINK) as sink:
            large = _train(_bert(scale), Place.of(sink), work.fresh("out"), scale.pick(SAVES, 6))
        with Sink(SLOW_LINK) as sink:
            ranks, beside = _two_ranks(Place.of(sink), work, scale)
        with Sink(SLOW_LINK) as sink:
            model = ManyTensors(scale.pick(10_000, 3_000))
            small = _train(model, Place.of(sink), work.fresh("out"), scale.pick(SAVES // 2, 6))
        stall, memcpy = statistics.median(large.staged), statistics.median(large.memcpy)
        slowest, plain = percentile(large.staged, 99), statistics.median(large.plain)
        shown = f"median {stall * 1e3:.0f} ms, p99 {slowest * 1e3:.0f} ms"
        copied = f"memcpy of {large.size / 1e9:.2f} GB {memcpy * 1e3:.0f} ms"
        first = f"first {large.first * 1e3:.0f} ms"
        extra = large.extra_memory / MB
        few, many = statistics.median(small.staged), statistics.median(small.plain)
        return [
            at_most("asynchronous save: median over a memcpy", shown, copied, stall / memcpy, MEMCPY_MEDIAN),
            at_most("asynchronous save: p99 over a memcpy", shown, copied, slowest / memcpy, MEMCPY_P99),
            *_rank_rows(ranks, beside),
            at_most(
                "asynchronous save over Trainer's own",
                shown,
                f"Trainer {plain * 1e3:.0f} ms",
                stall / plain,
                PLAIN,
            ),
            at_most("the first asynchronous save over later ones", first, shown, large.first / stall, FIRST),
            at_most(
                "many small tensors, over Trainer's own save",
                f"median {few * 1e3:.0f} ms",
                f"Trainer {many * 1e3:.0f} ms",
                few / many,
                SMALL_TENSORS,
            ),
            at_most("memory beside the checkpoint's size", f"{extra:.0f} MiB", "", extra, MEMORY, " MiB"),
        ]


def _rank_rows(stalls: list[float], memcpys: list[float]) -> list[Row]:
    stall, slowest, memcpy = statistics.median(stalls), percentile(stalls, 99), statistics.median(memcpys)
    what, shown = (
        f"asynchronous save, {RANKS} ranks",
        f"median {stall * 1e3:.0f} ms, p99 {slowest * 1e3:.0f} ms",
    )
    copied = f"memcpy {memcpy * 1e3:.0f} ms"
    return [
        at_most(f"{what}: median over a memcpy", shown, copied, stall / memcpy, MEMCPY_MEDIAN),
        at_most(f"{what}: p99 over a memcpy", shown, copied, slowest / memcpy, MEMCPY_P99),
    ]


def _bert(scale: Scale) -> torch.nn.Module:
    """As for the stall of a save; in a quick run still so large that its files are staged.

    Loaded from a folder, as people have it: transformers compiles its table of weight names for the first model that it loads, or
    else within the first save.
    """
    small = BertConfig(vocab_size=2_000, hidden_size=256, num_hidden_layers=1, num_attention_heads=4)
    model = BertForSequenceClassification(small) if scale.quick else bert(scale)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return BertForSequenceClassification.from_pretrained(folder)


class ManyTensors(torch.nn.Module):
    """Many small parameters."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(128)) for _ in range(count))

    def forward(self, input_ids: Any = None, labels: Any = None) -> dict[str, Any]:
        return {"loss": torch.stack([weight.sum() for weight in self.weights]).mean()}


class _Timed(CloudTrainCallback):
    """Lets asynchronous and ordinary saves take turns, and times both; and a memcpy around the asynchronous ones."""

    def __init__(self, run_url: str, **options: Any) -> None:
        super().__init__(run_url, async_save=True, **options)
        self.first = 0.0
        self.plain: list[float] = []
        self.memcpy: list[float] = []
        self.times: list[tuple[float, float]] = []
        """Of the asynchronous saves after the first one: when this rank arrived, and when it continued."""
        self.size = 0
        self.extra_memory = 0
        self._began = 0.0
        self._source = self._target = torch.empty(0)
        self._memory_before = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        self._saves = self._uploads._staged
        time.sleep(3)  # the memory is populated, and the writer has started

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_staged = state.global_step % 2 == 1
        if not self.first:
            self._memory_before = memory_of(os.getpid(), "Pss:") - memory_of(os.getpid(), "Pss_Shmem:")
        self._uploads._staged = self._saves if self._is_staged else None
        self._began = time.monotonic()  # the same clock for all processes of a machine
        super().on_step_end(args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        now = time.monotonic()
        if not state.global_step:
            return
        saves = self._writer()
        if self._is_staged and not self.first:
            self.first = now - self._began
            self.size = saves._memory.used if saves is not None else 0
        elif self._is_staged:
            self.times.append((self._began, now))
        if saves is not None:
            saves.settle()
            if not self.extra_memory and saves.writer_pid is not None:
                together = memory_of(os.getpid(), "Pss:") + memory_of(saves.writer_pid, "Pss:")
                self.extra_memory = together - self._memory_before - self.size
            self._copy()

    @property
    def staged(self) -> list[float]:
        """Seconds of the asynchronous saves after the first one."""
        return [after - before for before, after in self.times]

    def _writer(self) -> AsyncSaves | None:
        """Rank 0 has it."""
        assert self._saves is not None, "saves are asynchronous"
        return self._saves._saves

    def _copy(self) -> None:
        if not self._source.numel():
            self._source = torch.ones(self.size, dtype=torch.uint8)
            self._target = torch.ones(self.size, dtype=torch.uint8)
        start = time.perf_counter()
        ctypes.memmove(self._target.data_ptr(), self._source.data_ptr(), self.size)
        self.memcpy.append(time.perf_counter() - start)


class _TimedTrainer(Trainer):
    """Times the ordinary saves."""

    cloud: _Timed

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        if self.cloud._uploads._staged is None:
            self.cloud.plain.append(time.perf_counter() - start)


def _train(model: torch.nn.Module, place: Place, output_dir: Path, saves: int) -> _Timed:
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=saves,
        save_steps=1,
        save_total_limit=1,
        per_device_train_batch_size=1,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo" if dist.is_initialized() else None,
        disable_tqdm=True,
    )
    cloud = _Timed(f"s3://bench/{output_dir.name}", storage_options=place.storage_options)
    trainer = _TimedTrainer(model=model, args=args, train_dataset=sentences(64), callbacks=[cloud])
    trainer.cloud = cloud
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return cloud


def _two_ranks(place: Place, work: Workplace, scale: Scale) -> tuple[list[float], list[float]]:
    """Seconds of each asynchronous save, and of a memcpy."""
    import torch.multiprocessing

    rendezvous = work.fresh("rendezvous")
    torch.multiprocessing.spawn(_rank, (place, str(rendezvous), scale), nprocs=RANKS)
    stalls, memcpys = json.loads((rendezvous / "found").read_text())
    return stalls, memcpys


def _rank(rank: int, place: Place, rendezvous: str, scale: Scale) -> None:
    logging.getLogger("hf_cloudtrain").setLevel(logging.ERROR)
    model = _bert(scale)  # before there is a group, in which only rank 0 would save its folder
    # As torchrun sets them; the group uses a file, so that no port is needed.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}/store", rank=rank, world_size=RANKS)
    mine = _train(model, place, Path(rendezvous, "ranks"), scale.pick(SAVES, 6))
    of_all: list[Any] = [None] * RANKS
    dist.all_gather_object(of_all, mine.times)
    if rank == 0:
        stalls = [
            max(after for _, after in save) - max(before for before, _ in save)
            for save in zip(*of_all, strict=True)
        ]
        Path(rendezvous, "found").write_text(json.dumps([stalls, mine.memcpy]))
    dist.destroy_process_group()


def memory_of(pid: int, kind: str) -> int:
    """Bytes of a process, as /proc/<pid>/smaps_rollup counts them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    return 0
