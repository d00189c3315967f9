"""Random numbers that a fetch draws are seen, wherever they are drawn; nothing else counts as one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from hf_cloudtrain.resume.fetch_witness import FetchWitness

DRAWS: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.rand(1),
    "numpy": np.random.rand,
    "python": random.random,
}


class Data(Dataset):  # type: ignore[type-arg]
    def __init__(self, draw: str | None) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        if self.draw:
            DRAWS[self.draw]()
        return index


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        for number in range(12):
            torch.rand(1)
            yield number


def watched(loader: DataLoader[Any], step: Callable[[], object] = lambda: None) -> FetchWitness:
    """A witness of an epoch, in which each step draws random numbers as dropout does."""
    witness = FetchWitness(loader)
    for _ in loader:
        witness.step_began()
        torch.rand(3), np.random.rand(), random.random()
        witness.ended("on_step_end")
        step()
    return witness


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [*DRAWS])
def test_what_the_data_draws_is_seen(kind: str, workers: int) -> None:
    witness = watched(DataLoader(Data(kind), batch_size=2, num_workers=workers))
    assert witness.after(None if workers else "on_step_end").share == 1.0
    assert witness.last_drew == (not workers)
    if not workers:
        assert witness.after("on_step_end") == (5, 1.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_step_and_the_order_draw_is_not_the_data(workers: int) -> None:
    witness = watched(DataLoader(Data(None), batch_size=2, num_workers=workers, shuffle=True))
    assert witness.after("on_step_end" if not workers else None).watched >= 5
    assert witness.after("on_step_end").share == witness.after(None).share == 0.0
    assert not witness.last_drew


def test_what_a_stream_draws_is_seen() -> None:
    assert watched(DataLoader(Stream(), batch_size=2)).after("on_step_end").share == 1.0


def test_what_is_drawn_after_a_step_may_be_a_callback() -> None:
    witness = watched(DataLoader(Data(None), batch_size=2), step=lambda: torch.rand(1))
    assert witness.after("on_step_end").share == 1.0


def test_two_fetches_in_a_row_leave_no_doubt() -> None:
    loader = DataLoader(Data("torch"), batch_size=2)
    witness = FetchWitness(loader)
    list(loader)
    assert witness.after(None).share == 1.0


class Collate:
    field = 5

    def __call__(self, samples: list[int]) -> Any:
        return default_collate(samples)


def test_the_collate_function_looks_like_the_original_and_comes_back() -> None:
    original = Collate()
    loader = DataLoader(Data(None), batch_size=2, collate_fn=original)
    witness = FetchWitness(loader)
    replaced: Any = loader.collate_fn
    replaced.field = 7
    assert (replaced is original, replaced.field, original.field) == (False, 7, 7)
    assert not hasattr(replaced, "missing")
    witness.close()
    assert loader.collate_fn is original


class Keeps(Dataset):  # type: ignore[type-arg]
    """Opens something for the first sample, and draws from a generator of its own."""

    def __init__(self, *, draws: bool) -> None:
        self.draws, self.generator, self.file = draws, np.random.default_rng(0), None

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> float:
        self.file = self.file or Collate()  # type: ignore[assignment]
        return index + (self.generator.random() if self.draws else 0.0)


@pytest.mark.parametrize(("draws", "name"), [(True, "generator"), (False, None)])
def test_the_state_of_a_copy_in_a_worker_is_seen(*, draws: bool, name: str | None) -> None:
    loader = DataLoader(Keeps(draws=draws), batch_size=2, num_workers=1)
    assert watched(loader).changes_in_workers == name


class Both(Keeps):
    """Draws from torch, too."""

    def __getitem__(self, index: int) -> float:
        return super().__getitem__(index) + float(torch.rand(1))


def test_workers_that_are_spawned_are_seen_too() -> None:
    loader = DataLoader(Both(draws=True), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    witness = watched(loader)
    assert (witness.after(None).share, witness.changes_in_workers) == (1.0, "generator")


def test_another_kind_of_loader_cannot_be_watched() -> None:
    assert not FetchWitness([1, 2]).can_watch
