"""A step without a save: what the callbacks add to each step of Trainer.

10,000 steps of events (`on_step_begin`, `on_step_end`, and `on_log` every 10 steps) on Trainer's own state objects, with the heartbeat
thread running. The value is the median of 20 stretches. Torch operations are counted too: without any, no step waits for the device.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerControl, TrainerState, TrainingArguments

from benchmarks.clients import Place
from benchmarks.measure import Scale, Workplace
from benchmarks.report import Row, at_most
from benchmarks.sink import Sink
from hf_cloudtrain import CloudTrainCallback

TARGET = 50.0
"""Microseconds."""
STRETCHES = 20
LOGGING_STEPS = 10


def run(scale: Scale) -> list[Row]:
    stretch = scale.pick(500, 20)
    with Workplace() as work, Sink() as sink:
        options = Place.of(sink).storage_options
        events = _Events(CloudTrainCallback("s3://bench/steps", storage_options=options), work)
        micros = [events.steps(stretch) / stretch * 1e6 for _ in range(STRETCHES)]
        with CountOperations() as counted:
            events.steps(stretch)
        events.finish()
    return [
        step_row("a step without a save", micros),
        operations_row("torch operations in our events", counted.count),
    ]


def step_row(what: str, micros: Sequence[float], beside: str = "", target: float = TARGET) -> Row:
    """A row of microseconds per step, with one value for each stretch."""
    median = statistics.median(micros)
    slowest = f"slowest stretch {max(micros):.1f} us"
    shown = f"{beside}, {slowest}" if beside else slowest
    return at_most(what, f"{median:.1f} us", shown, median, target, " us")


def operations_row(what: str, count: int) -> Row:
    """A row of the torch operations that this package adds; the target is 0."""
    return Row(what, str(count), "", str(count), "0", count == 0)


class _Events:
    """The events of a Trainer without the training."""

    def __init__(self, callback: CloudTrainCallback, work: Workplace) -> None:
        self._args = TrainingArguments(
            output_dir=str(work.folder / "out"), save_steps=10**6, report_to=[], use_cpu=True
        )
        self._state = TrainerState(max_steps=10**6, num_train_epochs=1, train_batch_size=8)
        self._control = TrainerControl()
        self._callback = callback
        callback.on_train_begin(self._args, self._state, self._control, train_dataloader=None)

    def steps(self, count: int) -> float:
        """Run `count` steps; return the seconds inside the callback."""
        callback, args, state, control = self._callback, self._args, self._state, self._control
        logs = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4, "epoch": 0.5}
        start = time.perf_counter()
        for _ in range(count):
            callback.on_step_begin(args, state, control)
            state.global_step += 1
            callback.on_step_end(args, state, control)
            if state.global_step % LOGGING_STEPS == 0:
                callback.on_log(args, state, control, logs=logs)
        return time.perf_counter() - start

    def finish(self) -> None:
        """Save, and end the training: an end without any save is an error."""
        folder = f"{self._args.output_dir}/checkpoint-{self._state.global_step}"
        os.makedirs(folder)
        self._state.save_to_json(f"{folder}/trainer_state.json")
        self._callback.on_save(self._args, self._state, self._control)
        self._callback.on_train_end(self._args, self._state, self._control)


class CountOperations(TorchDispatchMode):
    """Counts the torch operations in its `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Number of operations."""
        return self.names.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))
