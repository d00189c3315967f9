"""Draws in loader processes, and data that keeps state, as a loop's save sees them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_cloudtrain.integrations.loop.data_evidence import DataEvidence


class Samples(Dataset):  # type: ignore[type-arg]
    """Eight numbers, augmented or not."""

    def __init__(self, *, draws: bool) -> None:
        self.draws = draws

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        return index + (random.random() if self.draws else 0.0)


class Passes(IterableDataset):  # type: ignore[type-arg]
    """A stream that differs in each pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter([torch.tensor(float(self.passes))] * 4)


def look(loader: Any, *, between_epochs: bool = False) -> tuple[bool | None, str]:
    evidence = DataEvidence()
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
    evidence = DataEvidence()
    evidence.begin(DataLoader(Samples(draws=False), num_workers=1))
    assert evidence.look(between_epochs=False).exact is None
    assert evidence.look(between_epochs=True).exact is True


def test_data_that_keeps_state_is_named() -> None:
    exact, reason = look(DataLoader(Passes(), batch_size=2))
    assert exact is None
    assert "Passes (dataset) keeps state ('passes')" in reason


def test_data_with_a_state_dict_is_saved_with_the_position() -> None:
    class Saved(Passes):
        def state_dict(self) -> dict[str, int]:
            return {"passes": self.passes}

    assert look(DataLoader(Saved(), batch_size=2))[0] is True
