"""Training during an upload, and beside the writer of an asynchronous save: step time with it relative to the step time without.

A BERT of 4 layers, hidden size 256, batches of 4 x 128 tokens, torch with 1 thread; the endpoint is pinned to the other core. Stretches
with and without an upload alternate, and so do the clients; each client sends in threads of the training process, as this package
does.

For the writer, the training is pinned to one core and the writer to the other one, while it writes 1.3 GB. A process that does nothing but
loop takes turns with it: what that costs, the machine takes (shared caches, clock rates, the host).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.clients import Ours, Place, raw_uploads
from benchmarks.measure import SLOW_LINK, Checkpoint, Scale, Workplace, pin
from benchmarks.peers import Ours as OurSaves
from benchmarks.peers import with_state
from benchmarks.report import Row, at_most
from benchmarks.sink import Sink
from benchmarks.stall import bert

TARGET = 1.05
WRITER_TARGET = 1.03
"""Or what a loop in its place costs."""


def run(scale: Scale) -> list[Row]:
    with Workplace() as work, Sink(SLOW_LINK) as sink:
        pin(sink.pid, (os.cpu_count() or 1) - 1)
        # 450 MB take 3.6 s on this link.
        checkpoint = Checkpoint(work.folder / "checkpoint", scale.pick(150_000_000, 20_000_000))
        place = Place.of(sink)
        with Ours(place, checkpoint, work) as ours:
            uploads = {contestant.name: contestant.run for contestant in raw_uploads(place, checkpoint)}
            uploads = {"ours": ours.save_and_commit, **uploads}
            measured = _measure(uploads, scale)
    slower = {name: statistics.median(each.ratios) for name, each in measured.items()}
    rates = {name: checkpoint.size / statistics.median(each.seconds) / 1e6 for name, each in measured.items()}
    others = ", ".join(f"{name} {slower[name]:.3f}" for name in slower if name != "ours")
    steps = statistics.median(measured["ours"].steps) * 1e3
    shown = f"{steps:.0f} ms a step, {rates['ours']:.0f} MB/s"
    return [at_most("step time beside an upload", shown, others, slower["ours"], TARGET), _writer_row(scale)]


def _writer_row(scale: Scale) -> Row:
    model = bert(scale)
    optimizer = with_state(model)
    step = _trainer()
    last = (os.cpu_count() or 1) - 1
    beside: dict[str, list[float]] = {"writer": [], "spin": []}
    seconds = []
    with Workplace() as work, Sink(None) as sink, OurSaves(Place.of(sink), work, model, optimizer) as ours:
        torch.set_num_threads(1)
        pin(os.getpid(), 0)
        pin(ours.writer_pid, last)
        alone = _alone(step, scale)
        for _ in range(scale.pick(5, 1)):
            ours.prepare()
            ours.save()
            began, steps = time.perf_counter(), [step()]
            while ours.is_writing:
                steps.append(step())
            seconds.append(time.perf_counter() - began)
            ours.wait()
            before, alone = alone, _alone(step, scale)
            beside["writer"].append(statistics.median(steps) / statistics.median(before + alone))
            with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as spin:
                pin(spin.pid, last)
                steps = _alone(step, scale)
                spin.kill()
            before, alone = alone, _alone(step, scale)
            beside["spin"].append(statistics.median(steps) / statistics.median(before + alone))
    writer, spin_ratio = statistics.median(beside["writer"]), statistics.median(beside["spin"])
    limit = max(WRITER_TARGET, spin_ratio)
    shown = f"{statistics.median(seconds):.1f} s of writing"
    return at_most(
        "step time beside the writer", shown, f"a spin loop {spin_ratio:.3f}", writer, round(limit, 3)
    )


@dataclass
class _Measured:
    """Results of one client, one value for each round."""

    ratios: list[float]
    """Median step during the upload, relative to the median step of the stretches before and after it."""
    seconds: list[float]
    """Of the upload."""
    steps: list[float]
    """Median step during the upload, in seconds."""


def _measure(uploads: dict[str, Callable[[], None]], scale: Scale) -> dict[str, _Measured]:
    torch.set_num_threads(1)
    step = _trainer()
    measured = {name: _Measured([], [], []) for name in uploads}
    for _ in range(scale.pick(10, 2)):
        step()
    alone = _alone(step, scale)
    names = list(uploads)
    for number in range(scale.pick(5, 1)):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            thread = threading.Thread(target=uploads[name])
            start = time.perf_counter()
            thread.start()
            beside = []
            while thread.is_alive():
                beside.append(step())
            seconds = time.perf_counter() - start
            after = _alone(step, scale)
            measured[name].seconds.append(seconds)
            measured[name].steps.append(statistics.median(beside))
            measured[name].ratios.append(statistics.median(beside) / statistics.median(alone + after))
            alone = after
    return measured


def _alone(step: Callable[[], float], scale: Scale) -> list[float]:
    return [step() for _ in range(scale.pick(10, 2))]


def _trainer() -> Callable[[], float]:
    """Return a function that trains one step and returns its seconds."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens, labels = torch.randint(0, config.vocab_size, (4, 128)), torch.tensor([0, 1, 0, 1])

    def step() -> float:
        start = time.perf_counter()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step
