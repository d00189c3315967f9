"""Start and end of a training: what they cost besides the steps, and the way from a kill to the first new step.

"Fixed cost": what the callback does before the first step and after the last one, in a training of 600 steps with 6 asynchronous saves
in a local folder, the start and the end of the writer included.

"Kill to first new step": a checkpoint of 1.3 GB is restored over a link of 1 GB/s, and Trainer resumes from it. Subtracted are the time
that the best raw client needs for the files, one after the other, and the time that plain Trainer needs from `train()` to its first step
with the same checkpoint on the disk. As this package fetches several files at once, less than nothing may be left.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.clients import Obstore, Place
from benchmarks.measure import LINKS, Scale, Workplace
from benchmarks.report import Row, at_most
from benchmarks.sink import Sink
from benchmarks.stall import bert, sentences
from hf_cloudtrain import CloudTrainCallback

FIXED_TARGET = 0.15
OWN_TARGET = 2.0


def run(scale: Scale) -> list[Row]:
    fixed = [_fixed(scale.pick(600, 60)) for _ in range(scale.pick(5, 1))]
    start, end = (statistics.median(values) for values in zip(*fixed, strict=True))
    return [
        at_most(
            "fixed cost of a training",
            f"start {start * 1e3:.0f} ms, end {end * 1e3:.0f} ms",
            "",
            start + end,
            FIXED_TARGET,
            " s",
        ),
        _resume(scale),
    ]


class Small(torch.nn.Module):
    """Just over what is staged."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(600_000))

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": self.weights.mean() * x.mean()}


class _Timed(CloudTrainCallback):
    """Times what comes before the first step and after the last one."""

    start = end = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        super().on_train_begin(*args, **kwargs)
        self.start = time.perf_counter() - began

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        super().on_train_end(*args, **kwargs)
        self.end = time.perf_counter() - began


def _fixed(steps: int) -> tuple[float, float]:
    with Workplace() as work:
        cloud = _Timed(work.folder / "run", async_save=True)
        args = _arguments(work.folder / "out", max_steps=steps, save_steps=steps // 6)
        trainer = _trainer(Small(), args, [{"x": torch.ones(2)}] * 64, cloud)
        trainer.train(resume_from_checkpoint=cloud.restore(args))
        return cloud.start, cloud.end


class _First(TrainerCallback):
    """When the first step begins."""

    at = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.at = self.at or time.perf_counter()


def _resume(scale: Scale) -> Row:
    """The time of our own from a start to the first new step."""
    with Workplace() as work, Sink(LINKS["1 GB/s link"], keep=True) as sink:
        place = Place.of(sink)
        options: dict[str, Any] = {"storage_options": place.storage_options}
        cloud = CloudTrainCallback("s3://bench/start", **options)
        args = _arguments(work.folder / "first", max_steps=1, save_steps=1)
        _trainer(bert(scale), args, sentences(64), cloud).train()
        saved = work.folder / "first" / "checkpoint-1"
        names = [path.name for path in saved.iterdir()]

        def ours(number: int) -> float:
            # One step more than the run has: each training stores its last one.
            args = _arguments(work.folder / f"ours-{number}", max_steps=2 + number, save_steps=100)
            cloud, first, model = CloudTrainCallback("s3://bench/start", **options), _First(), bert(scale)
            began = time.perf_counter()
            trainer = _trainer(model, args, sentences(64), cloud)
            trainer.add_callback(first)
            trainer.train(resume_from_checkpoint=cloud.restore(args))
            shutil.rmtree(args.output_dir)
            return first.at - began

        def plain(number: int) -> float:
            args = _arguments(work.folder / f"plain-{number}", max_steps=2, save_steps=100)
            first, model = _First(), bert(scale)
            began = time.perf_counter()
            _trainer(model, args, sentences(64), first).train(resume_from_checkpoint=str(saved))
            return first.at - began

        def raw(number: int) -> float:
            client, target = Obstore(place), work.fresh(f"raw-{number}")
            began = time.perf_counter()
            for name in names:
                client.get(f"start/checkpoint-1/{name}", target / name)
            return time.perf_counter() - began

        rounds = range(scale.pick(3, 1))
        mine = statistics.median([ours(number) for number in rounds])
        local = statistics.median([plain(number) for number in rounds])
        download = statistics.median([raw(number) for number in rounds])
    return at_most(
        "kill to first new step, our own part",
        f"{mine:.1f} s in all",
        f"raw download {download:.1f} s, plain Trainer from the disk {local:.1f} s",
        mine - local - download,
        OWN_TARGET,
        " s",
    )


def _arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def _trainer(
    model: torch.nn.Module, args: TrainingArguments, data: Any, callback: TrainerCallback
) -> Trainer:
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    return trainer
