"""TrainLoop: what it adds to a save and to a step of a loop on Accelerate.

The model, the link and the saves are those of `stall`: a checkpoint of 1.3 GB after each step, during an upload. The stall is the whole
save without Accelerate's own `save_state`, which is given for comparison; the hooks of this package inside it count as stall. These are
ordinary saves; of asynchronous ones, `save_state` itself is what takes less time (`staging` has those of Trainer). With two
ranks (a BERT of 4 layers, hidden size 256, 134 MB) a save starts with the first rank, and the stall is the time before and after
the `save_state` of the last rank.

A step is `loop.steps` and `loop.log` around an empty body, minus the same with Accelerate's loader alone. Stretches of 500 batches
take turns; the data is shuffled, a tensor is logged, and the progress bar is drawn to /dev/null. Torch operations are those of the loop minus
those of the loader, without the reports every `logging_steps`; a logged tensor is detached, which does not involve the device.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.clients import Place
from benchmarks.measure import SLOW_LINK, Scale, Workplace
from benchmarks.report import Row
from benchmarks.sink import Sink
from benchmarks.stall import RANKS, SAVES, bert, is_uploading, sentences, share_row, stall_rows
from benchmarks.step import STRETCHES, CountOperations, operations_row, step_row
from hf_cloudtrain import TrainLoop
from hf_cloudtrain.integrations.loop.steps import EpochSteps

RANK_SAVES = 30
MEDIAN_TARGET, STEP_TARGET = 5.0, 25.0
"""Milliseconds of a save of one rank; microseconds of a step."""


def run(scale: Scale) -> list[Row]:
    with Workplace() as work:
        with Sink(SLOW_LINK) as sink, _no_bar():
            saves = _train(bert(scale), Place.of(sink), work.folder / "out", scale.pick(SAVES, 3))
        stalls = [_stall([save]) for save in saves]
        beside = f"{sum(save.beside_upload for save in saves)} of {len(saves)} beside an upload"
        rows = [
            *stall_rows("stall of a save, in TrainLoop", stalls, beside, MEDIAN_TARGET),
            share_row(
                "stall beside Accelerate's save_state", stalls, "Accelerate", [save.own for save in saves]
            ),
        ]
        with Sink(SLOW_LINK) as sink:
            stalls = _two_ranks(Place.of(sink), work, scale)
        rows += stall_rows(f"stall of a save, TrainLoop, {RANKS} ranks", stalls, f"{len(stalls)} saves")
        with Sink() as sink, _no_bar():
            return rows + step_rows(Place.of(sink), work, scale.pick(500, 20))


@dataclass(frozen=True)
class _Save:
    """One save of one rank, in seconds."""

    before: float
    """Of this package, before Accelerate's own part and inside it."""
    own: float
    """Of Accelerate."""
    ended: float
    """When Accelerate's part ended, by the clock of the machine."""
    done: float
    """When training continued."""
    beside_upload: bool


def _stall(ranks: list[_Save]) -> float:
    """Time while one rank is still in Accelerate's part does not count as stall."""
    after = max(save.done for save in ranks) - max(save.ended for save in ranks)
    return max(save.before for save in ranks) + after


class _TimedAccelerator(Accelerator):
    """Records when its `save_state` ran, and the seconds of its hooks."""

    began = ended = hooks = 0.0

    def save_state(self, *args: Any, **kwargs: Any) -> Any:
        self.hooks, self.began = 0.0, time.monotonic()
        answer = super().save_state(*args, **kwargs)
        self.ended = time.monotonic()
        return answer

    def register_save_state_pre_hook(self, hook: Any) -> Any:
        def timed(*args: Any) -> None:
            start = time.monotonic()
            hook(*args)
            self.hooks += time.monotonic() - start

        return super().register_save_state_pre_hook(timed)


@contextlib.contextmanager
def _timed_saves(loop: TrainLoop) -> Iterator[list[_Save]]:
    """The seconds of each save that the loop makes."""
    saves: list[_Save] = []
    real, inner = EpochSteps.save, loop.accelerator

    def save(self: EpochSteps, *args: Any, **kwargs: Any) -> None:
        busy, start = is_uploading(loop.output_dir), time.monotonic()
        real(self, *args, **kwargs)
        done, own = time.monotonic(), inner.ended - inner.began - inner.hooks
        saves.append(_Save(inner.began - start + inner.hooks, own, inner.ended, done, busy))

    EpochSteps.save = save  # type: ignore[method-assign]
    try:
        yield saves
    finally:
        EpochSteps.save = real  # type: ignore[method-assign]


def _train(model: Any, place: Place, output_dir: Path, steps: int) -> list[_Save]:
    """Train `steps` steps on this rank, with a save after each."""
    accelerator = _TimedAccelerator(cpu=True)
    loader = DataLoader(sentences(steps * accelerator.num_processes), batch_size=1)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loop = TrainLoop(accelerator, f"s3://{place.bucket}/{output_dir.name}", num_epochs=1, save_steps=1,
                     output_dir=output_dir, storage_options=place.storage_options, async_save=False)  # fmt: skip
    with _timed_saves(loop) as saves:
        for _ in loop.epochs():
            for batch in loop.steps(loader):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                loop.log(loss=loss)
    return saves


def _two_ranks(place: Place, work: Workplace, scale: Scale) -> list[float]:
    import torch.multiprocessing

    rendezvous = work.fresh("rendezvous")
    torch.multiprocessing.spawn(_rank, (place, str(rendezvous), scale.pick(RANK_SAVES, 3)), nprocs=RANKS)
    return [float(line) for line in (rendezvous / "stalls").read_text().split()]


def _rank(rank: int, place: Place, rendezvous: str, saves: int) -> None:
    import logging

    import torch.distributed as dist

    logging.getLogger("hf_cloudtrain").setLevel(logging.ERROR)
    # As torchrun sets them; the group uses a file, so that no port is needed.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}/store", rank=rank, world_size=RANKS)
    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    with _no_bar():
        mine = _train(BertForSequenceClassification(config), place, Path(rendezvous, "ranks"), saves)
    of_all: list[Any] = [None] * RANKS
    dist.all_gather_object(of_all, mine)
    if rank == 0:
        stalls = (_stall(list(save)) for save in zip(*of_all, strict=True))
        Path(rendezvous, "stalls").write_text("\n".join(map(repr, stalls)))
    dist.destroy_process_group()


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Draw progress bars to /dev/null."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def step_rows(place: Place, work: Workplace, stretch: int) -> list[Row]:
    """Rows of the seconds and torch operations of a step; `stretch` is a multiple of `logging_steps`."""
    accelerator = Accelerator(cpu=True)
    loss = torch.tensor(0.5, requires_grad=True) * 1  # not a leaf, like a loss

    def batches() -> Any:
        loader = DataLoader(
            range(stretch * (STRETCHES + 1) + 20), batch_size=1, shuffle=True, collate_fn=list
        )
        return accelerator.prepare(loader)

    accelerator.prepare(torch.nn.Linear(1, 1))
    loop = TrainLoop(accelerator, f"s3://{place.bucket}/steps", num_epochs=1, output_dir=work.folder / "steps",
                     storage_options=place.storage_options)  # fmt: skip
    for _ in loop.epochs():
        bare, ours = iter(batches()), _logged(loop, batches(), loss)
        _seconds(bare, stretch), _seconds(ours, stretch)  # warm up
        pairs = [(_seconds(bare, stretch), _seconds(ours, stretch)) for _ in range(STRETCHES)]
        _seconds(ours, 1)  # includes the report of the previous step
        operations = _operations(ours, loop.logging_steps - 1) - _operations(bare, loop.logging_steps - 1)
        ours.close()
    micros = [(with_loop - alone) / stretch * 1e6 for alone, with_loop in pairs]
    alone = sorted(alone for alone, _ in pairs)[STRETCHES // 2] / stretch * 1e6
    return [
        step_row(
            "a step without a save, in TrainLoop", micros, f"Accelerate's loader {alone:.1f} us", STEP_TARGET
        ),
        operations_row("torch operations in a step of TrainLoop", operations),
    ]


def _logged(loop: TrainLoop, loader: Any, loss: torch.Tensor) -> Generator[Any, None, None]:
    for batch in loop.steps(loader):
        yield batch
        loop.log(loss=loss)


def _seconds(batches: Iterator[Any], count: int) -> float:
    start = time.perf_counter()
    got = sum(1 for _ in islice(batches, count))
    seconds = time.perf_counter() - start
    assert got == count, f"the data ended after {got} of {count} batches"
    return seconds


def _operations(batches: Iterator[Any], count: int) -> int:
    """Torch operations of `count` steps, without `detach`."""
    with CountOperations() as counted:
        _seconds(batches, count)
    return counted.count - counted.names["aten::detach"]
