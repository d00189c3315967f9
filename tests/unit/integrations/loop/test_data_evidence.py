"""Draws in loader processes, and data that keeps state, as a loop's save sees them."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_cloudtrain.integrations.loop.data_evidence import MOST_LOADERS, DataEvidence
from tests.unit.resume.test_outside_state import accelerator_of


class Samples(Dataset):  # type: ignore[type-arg]
    """Eight numbers, augmented or not."""

    def __init__(self, *, draws: bool) -> None:
        self.draws = draws

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        return index + (random.random() if self.draws else 0.0)


class Seeded(Samples):
    """Augmented by the index of the sample."""

    def __getitem__(self, index: int) -> float:
        random.seed(index)
        return index + random.random()


class Drawing(IterableDataset):  # type: ignore[type-arg]
    """A stream of random numbers."""

    def __iter__(self) -> Any:
        return (torch.rand(1) for _ in range(8))


class Keeps(Samples):
    """Has a generator of its own, and a state_dict that no loader asks for."""

    def __init__(self) -> None:
        self.generator = random.Random(0)

    def __getitem__(self, index: int) -> float:
        return index + self.generator.random()

    def state_dict(self) -> dict[str, int]:
        return {}


class Passes(IterableDataset):  # type: ignore[type-arg]
    """A stream that differs in each pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter([torch.tensor(float(self.passes))] * 4)


def look(loader: Any, *, between_epochs: bool = False) -> tuple[bool | None, str]:
    evidence = DataEvidence(accelerator_of())
    evidence.begin(loader)
    for _ in loader:
        pass
    evidence.begin(loader)
    found = evidence.look(between_epochs=between_epochs)
    return found.exact, str(found.reason)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("between_epochs", [False, True])
def test_loader_processes_that_draw(*, persistent: bool, between_epochs: bool) -> None:
    loader = DataLoader(Samples(draws=True), batch_size=2, num_workers=1, persistent_workers=persistent)
    is_lost = persistent or not between_epochs  # new processes draw their seeds from the states of the save
    exact, reason = look(loader, between_epochs=between_epochs)
    assert exact is (not is_lost)
    assert ("loader processes draw" in reason) is is_lost


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_draws_nothing(workers: int) -> None:
    assert look(DataLoader(Samples(draws=False), batch_size=2, num_workers=workers))[0] is True


def test_draws_in_this_process_are_repeated_by_a_resume() -> None:
    assert look(DataLoader(Samples(draws=True), batch_size=2))[0] is True


def test_loader_processes_that_were_not_seen() -> None:
    evidence = DataEvidence(accelerator_of())
    evidence.begin(DataLoader(Samples(draws=False), num_workers=1))
    assert evidence.look(between_epochs=False).exact is None
    assert evidence.look(between_epochs=True).exact is True


def test_a_stream_is_read_again_by_new_processes() -> None:
    for persistent, exact in ((False, True), (True, False)):
        loader = DataLoader(Drawing(), batch_size=2, num_workers=1, persistent_workers=persistent)
        assert look(loader)[0] is exact


def test_loader_processes_that_seed_are_not_verified() -> None:
    exact, reason = look(DataLoader(Seeded(draws=True), batch_size=2, num_workers=1))
    assert (exact, "Seeded seeds random numbers" in reason) == (None, True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_generator_of_the_datasets_own(workers: int) -> None:
    exact, reason = look(DataLoader(Keeps(), batch_size=2, num_workers=workers))
    assert (exact, "'generator'" in reason) == (None, True)


def test_a_stream_that_is_shuffled_without_a_seed() -> None:
    stream = datasets.Dataset.from_dict({"x": [1, 2]}).to_iterable_dataset()
    assert look(DataLoader(stream.shuffle(seed=1)))[0] is True
    exact, reason = look(DataLoader(stream.shuffle()))
    assert (exact, "without a seed" in reason) == (None, True)


def test_a_collate_function_that_knows_the_model() -> None:
    model = torch.nn.Linear(1, 1)

    def collate(samples: list[float]) -> tuple[list[float], Any]:
        return samples, model.weight

    evidence = DataEvidence(accelerator_of(model))
    evidence.begin(DataLoader(Samples(draws=False), collate_fn=collate))
    torch.nn.init.zeros_(model.weight)
    assert evidence.look(between_epochs=True).exact is True


def test_data_that_keeps_state_is_named() -> None:
    exact, reason = look(DataLoader(Passes(), batch_size=2))
    assert exact is None
    assert "Passes (dataset) keeps state ('passes')" in reason


def test_data_with_a_state_dict_is_saved_with_the_position() -> None:
    class Saved(Passes):
        def state_dict(self) -> dict[str, int]:
            return {"passes": self.passes}

        def load_state_dict(self, state: dict[str, int]) -> None: ...

    assert look(DataLoader(Saved(), batch_size=2))[0] is True


def test_loaders_that_are_made_for_each_epoch_do_not_stay_in_memory() -> None:
    evidence = DataEvidence(accelerator_of())
    made = []
    for _ in range(20):
        loader = DataLoader(Samples(draws=False))
        made.append(weakref.ref(loader))
        evidence.begin(loader)
    del loader
    gc.collect()
    assert sum(reference() is not None for reference in made) <= MOST_LOADERS
    assert evidence.look(between_epochs=True).exact is True
