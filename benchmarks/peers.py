"""Beside other asynchronous savers: how long a save of the same model and optimizer keeps the caller waiting.

BERT base with the state of AdamW, 1.3 GB, in one process. The contestants take turns, and each begins when nothing of an earlier save
is still being written: this package (staging and hand-over, committed to an endpoint in the background);
`torch.distributed.checkpoint.async_save` with a thread and with a process, each with a stager that keeps its memory; and `torch.save` into
a folder in memory (`/dev/shm`), which nothing carries to a disk. Measured is the call alone.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_model
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from benchmarks.clients import Place
from benchmarks.measure import Contestant, Scale, Workplace, side_by_side
from benchmarks.report import Row
from benchmarks.sink import Sink
from benchmarks.stall import bert
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.staging.saves import AsyncSaves

ROUNDS = 5
OURS = "ours"


def run(scale: Scale) -> list[Row]:
    model = bert(scale)
    optimizer = with_state(model)
    with Workplace() as work, Sink(None) as sink:
        dist.init_process_group("gloo", init_method=f"file://{work.folder}/store", rank=0, world_size=1)
        memory = Path(tempfile.mkdtemp(prefix="cloudtrain-bench-", dir="/dev/shm"))
        with Ours(Place.of(sink), work, model, optimizer) as ours:
            others = [Dcp(work, model, optimizer, kind) for kind in AsyncCheckpointerType]
            contestants = [
                ours.contestant(),
                *(other.contestant() for other in others),
                Contestant("torch.save to /dev/shm", lambda: plain(memory, model, optimizer)),
            ]
            timings = side_by_side(contestants, scale.pick(ROUNDS, 2))
            for other in others:
                other.finish()
        shutil.rmtree(memory)
        dist.destroy_process_group()
    medians = {name: timing.median for name, timing in timings.items()}
    mine = medians.pop(OURS)
    best = min(medians.values())
    compared = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in medians.items())
    # The first round of each takes its memory.
    later = {name: statistics.median(timing.seconds[1:]) for name, timing in timings.items()}
    shown = f"{mine * 1e3:.0f} ms, after the first {later[OURS] * 1e3:.0f} ms"
    figure = mine / best
    return [Row("a save, over the best of the others", shown, compared, f"{figure:.2f}", "< 1", figure < 1)]


def with_state(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW after one step."""
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def plain(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As Trainer writes model and optimizer."""
    save_model(model, str(folder / "model.safetensors"))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


class Ours:
    """Staged saves, as the callback makes them."""

    def __init__(
        self, place: Place, work: Workplace, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        logging.getLogger("hf_cloudtrain").setLevel(logging.ERROR)
        self._model, self._optimizer = model, optimizer
        self._folder = work.fresh("peers")
        self._checkpointer = Checkpointer(
            "s3://bench/peers", self._folder, storage_options=place.storage_options
        )
        self._step = 0

    def __enter__(self) -> Ours:  # noqa: PYI034 - typing.Self came with Python 3.11
        self._checkpointer.storage.check()
        self._checkpointer.begin(0)
        size = sum(tensor.nbytes for tensor in self._model.parameters()) * 3
        self._saves = AsyncSaves(self._folder, expected=size)
        queue = self._checkpointer.upload_queue
        assert queue is not None
        queue.late = self._saves
        return self

    def __exit__(self, *error: object) -> None:
        self._saves.end()
        self._checkpointer.close()

    def contestant(self) -> Contestant:
        return Contestant(OURS, self.save, prepare=self.prepare)

    @property
    def writer_pid(self) -> int:
        pid = self._saves.writer_pid
        assert pid is not None
        return pid

    @property
    def is_writing(self) -> bool:
        return self._saves._process.is_busy

    def wait(self) -> None:
        """Until the last save is committed."""
        if self._step:
            self._checkpointer.wait()

    def prepare(self) -> None:
        self.wait()
        self._step += 1
        self._target = self._folder / f"checkpoint-{self._step}"
        self._target.mkdir()
        shutil.rmtree(self._folder / f"checkpoint-{self._step - 2}", ignore_errors=True)

    def save(self) -> None:
        self._saves.open(self._target)
        plain(self._target, self._model, self._optimizer)
        self._saves.close()
        self._checkpointer.save(self._target, Position(global_step=self._step))


class Dcp:
    """`torch.distributed.checkpoint.async_save`."""

    def __init__(
        self,
        work: Workplace,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        kind: AsyncCheckpointerType,
    ) -> None:
        self._work, self._model, self._optimizer, self._kind = work, model, optimizer, kind
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options)
        self.finish: Callable[[], Any] = lambda: None
        """Waits until the last save is written."""

    def contestant(self) -> Contestant:
        return Contestant(f"DCP async_save ({self._kind.value})", self._save, prepare=self._prepare)

    def _prepare(self) -> None:
        self.finish()
        self._folder = self._work.fresh(f"dcp-{self._kind.value}")

    def _save(self) -> None:
        response = dcp.async_save(
            {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()},
            checkpoint_id=str(self._folder),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        if isinstance(response, AsyncSaveResponse):
            response.staging_completion.result()  # before that, the optimizer must not change the tensors
            response = response.upload_completion
        self.finish = response.result
