"""Frequent saves: the wall time of a training that saves every 10 steps, over the same training without a save.

200 steps of 0.2 s each and a checkpoint of 130 MB, in Trainer, with asynchronous saves to a local folder. A step computes for as long as the
model needs, and sleeps for the rest. The trainings take turns; measured is the time from the first step to the end of the last one.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.measure import Scale, Workplace
from benchmarks.report import Row, at_most
from hf_cloudtrain import CloudTrainCallback

TARGET = 1.05
STEP_SECONDS = 0.2
WEIGHTS = 10_800_000
"""130 MB with the state of AdamW."""
EVERY = 10


def run(scale: Scale) -> list[Row]:
    steps, rounds = scale.pick(200, 20), scale.pick(2, 1)
    seconds: dict[bool | None, list[float]] = {}
    for _ in range(rounds):
        for mode in (None, True, False):
            with Workplace() as work:
                seconds.setdefault(mode, []).append(_train(work, steps, mode))
    without, staged, ordinary = (statistics.median(seconds[mode]) for mode in (None, True, False))
    return [
        at_most(
            f"a save every {EVERY} steps of {STEP_SECONDS:g} s, over none",
            f"{staged:.1f} s",
            f"without {without:.1f} s, ordinary saves {ordinary:.1f} s",
            staged / without,
            TARGET,
        )
    ]


class Wide(torch.nn.Module):
    """Many weights, little work."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(WEIGHTS // 1024, 1024))

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": self.weights.mean() * x.mean()}


class Paced(TrainerCallback):
    """Steps of the same length."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0
        self._step_began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step_began = time.perf_counter()
        self.began = self.began or self._step_began

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(max(0.0, self._step_began + STEP_SECONDS - time.perf_counter()))
        self.ended = time.perf_counter()


def _train(work: Workplace, steps: int, async_save: bool | None) -> float:
    pace = Paced()
    cloud = CloudTrainCallback(work.folder / "run", async_save=async_save)
    args = TrainingArguments(
        output_dir=str(work.folder / "out"),
        max_steps=steps,
        save_strategy="no" if async_save is None else "steps",
        save_steps=EVERY,
        save_total_limit=1,
        per_device_train_batch_size=1,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"x": torch.ones(2)}] * steps
    callbacks: list[TrainerCallback] = [pace] if async_save is None else [pace, cloud]
    trainer = Trainer(model=Wide(), args=args, train_dataset=data, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return pace.ended - pace.began
