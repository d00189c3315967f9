"""Small DataLoaders of every kind, and one epoch over them as TrainLoop trains it."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

from hf_cloudtrain.resume.data_position import DataPosition
from hf_cloudtrain.resume.random_state import RandomState

SIZE = 19
BATCHES = 5


class Rows(Dataset):
    """Each sample is its index and, with `noise`, a sum of one number from each global random state. `read`: what was fetched."""

    def __init__(self, size: int = SIZE, *, noise: bool = False) -> None:
        self.size = size
        self.noise = noise
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, float]:
        self.read.append(index)
        if not self.noise:
            return index, 0.0
        return index, float(torch.rand(1)) + random.random() + float(np.random.rand())


class Stream(IterableDataset):
    """The same as a stream without a state of its own."""

    def __init__(self, size: int = SIZE, *, noise: bool = False) -> None:
        self.rows = Rows(size, noise=noise)
        self.at = self.begin_at = 0

    def __iter__(self) -> Iterator[tuple[int, float]]:
        self.at, self.begin_at = self.begin_at, 0
        while self.at < len(self.rows):
            self.at += 1
            yield self.rows[self.at - 1]


class StatefulStream(Stream):
    """The same as a stream that saves and restores its position."""

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin_at = state["at"]


class OwnBatches:
    """A batch sampler of the user's own: neither a sampler inside nor a batch size."""

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SIZE).tolist()
        return (order[begin : begin + 4] for begin in range(0, SIZE, 4))


LOADERS: dict[str, Callable[[], Any]] = {
    "an order from the global state": lambda: loader(Rows(noise=True), shuffle=True),
    "no shuffling": lambda: loader(Rows(noise=True)),
    "a generator": lambda: loader(
        Rows(noise=True), shuffle=True, generator=torch.Generator().manual_seed(random.getrandbits(20))
    ),
    "a sampler with a generator": lambda: loader(
        Rows(noise=True), sampler=RandomSampler(Rows(), generator=torch.Generator().manual_seed(3))
    ),
    "weights": lambda: loader(Rows(noise=True), sampler=WeightedRandomSampler([1.0] * SIZE, SIZE)),
    "replacement": lambda: loader(
        Rows(noise=True), sampler=RandomSampler(Rows(), replacement=True, num_samples=SIZE)
    ),
    "one rank's share": lambda: loader(Rows(noise=True), sampler=DistributedSampler(Rows(), 1, 0)),
    "the user's own batches": lambda: DataLoader(Rows(noise=True), batch_sampler=OwnBatches()),
    "samples in place of batches": lambda: DataLoader(Rows(5, noise=True), batch_size=None, shuffle=True),
    "a last batch that is dropped": lambda: loader(Rows(22, noise=True), shuffle=True, drop_last=True),
    "a stream": lambda: loader(Stream(noise=True)),
    "a stream with a state": lambda: loader(StatefulStream(noise=True)),
}


class Read(NamedTuple):
    """What a process saw of an epoch."""

    seen: list[Any]
    record: dict[str, Any]
    now: RandomState


def loader(dataset: Any, **options: Any) -> Any:
    return DataLoader(dataset, batch_size=4, **options)


def another_process(seed: int) -> None:
    """All random states are different."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def train(
    dataloader: Any,
    *,
    stop: int | None = None,
    resume: Read | None = None,
    epoch: int = 1,
    ahead: int = 0,
    foreseen: bool = True,
) -> Read:
    """One epoch as TrainLoop goes through it; `ahead` batches are fetched before they are handed out."""
    position = DataPosition(dataloader)
    if resume is None:
        position.begin(epoch)
    else:
        position.begin(epoch, through_a_file(resume.record), resume.now)
    with position.watching():
        seen = list(batches_of(position, stop, ahead, foreseen))
    return Read(seen, position.state_dict(), position.random_state())


def batches_of(position: DataPosition, stop: int | None, ahead: int, foreseen: bool) -> Iterator[Any]:
    """Each batch and what training draws beside it."""
    batches = looked_ahead(iter(position.dataloader), ahead)
    for _ in range(position.to_read):
        next(batches)
    position.save_foreseen = foreseen
    while stop is None or position.batches < stop:
        batch = next(batches, None)
        position.settle()
        position.check_same_order()
        if batch is None:
            break
        yield [torch.as_tensor(part).tolist() for part in batch], training_draws()
        position.batches += 1


def training_draws() -> list[float]:
    return [float(torch.rand(1)), random.random(), float(np.random.rand())]


def looked_ahead(batches: Iterator[Any], ahead: int) -> Iterator[Any]:
    """As Accelerate's DataLoaders: they know that a batch is the last one only after they have asked for the next."""
    waiting = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > ahead:
            yield waiting.pop(0)
    yield from waiting


def through_a_file(record: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(record, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded
