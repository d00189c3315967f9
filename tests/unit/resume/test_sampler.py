"""Each sample once per epoch, wherever training stops and on however many processes it continues."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hf_cloudtrain import ResumableSampler
from hf_cloudtrain.errors import ConfigurationError, PositionError


def ranks(length: int, world_size: int, state: dict[str, Any] | None = None, **options: Any) -> list[Any]:
    """The samplers of all processes, each started from that state."""
    made = [
        ResumableSampler(length, num_replicas=world_size, rank=rank, **options) for rank in range(world_size)
    ]
    for sampler in made:
        if state is not None:
            sampler.load_state_dict(state)
    return made


def train(samplers: list[Any], steps: int, batch: int) -> list[int]:
    """Train so many steps on all processes; returns the samples in the common order."""
    taken = [list(sampler)[: steps * batch] for sampler in samplers]
    for sampler, mine in zip(samplers, taken, strict=True):
        sampler.advance(len(mine))
    return [sample for turn in zip(*taken, strict=True) for sample in turn]


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 60),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    attempts=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6), st.integers(1, 4)), max_size=6),
    last=st.integers(1, 5),
)
def test_any_split_of_an_epoch_into_attempts_of_any_size_sees_each_sample_once(
    length: int,
    seed: int,
    shuffle: bool,
    drop_last: bool,
    attempts: list[tuple[int, int, int]],
    last: int,
) -> None:
    options = {"seed": seed, "shuffle": shuffle, "drop_last": drop_last}
    seen: list[int] = []
    state = None
    for world_size, steps, batch in attempts:
        samplers = ranks(length, world_size, state, **options)
        seen += train(samplers, steps, batch)[: length - len(seen)]
        states = [sampler.state_dict() for sampler in samplers]
        assert all(other == states[0] for other in states), "every process saves the same position"
        state = states[0]
    rest = train(ranks(length, last, state, **options), length, 1)
    (whole,) = ranks(length, 1, **options)
    order = list(whole)
    assert sorted(order) == list(range(length))
    if drop_last:
        assert seen + rest == order[: len(seen) + len(rest)]
        assert length - len(seen) - len(rest) < last
    else:
        assert (seen + rest)[:length] == order
        assert len(seen) + len(rest) - length < last, "less than a round is filled up"


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("length", "world_size"), [(10, 1), (10, 3), (9, 3), (2, 5), (1, 1)])
def test_from_the_start_it_returns_the_indices_of_distributed_sampler(
    length: int, world_size: int, shuffle: bool, drop_last: bool
) -> None:
    if drop_last and length < world_size:
        pytest.skip("DistributedSampler has a negative number of samples there")
    for epoch in (0, 1):
        for rank, sampler in enumerate(
            ranks(length, world_size, seed=5, shuffle=shuffle, drop_last=drop_last)
        ):
            theirs = DistributedSampler(
                range(length), world_size, rank, shuffle=shuffle, seed=5, drop_last=drop_last
            )
            theirs.set_epoch(epoch)
            sampler.set_epoch(epoch)
            assert list(sampler) == list(theirs)
            assert len(sampler) == len(theirs)


def test_on_as_many_processes_it_continues_as_if_it_had_not_stopped() -> None:
    for before, after in zip(ranks(11, 2), ranks(11, 2), strict=True):
        uninterrupted = list(before)
        before.advance(4)
        after.load_state_dict(before.state_dict())
        assert list(after) == uninterrupted[4:]
        assert len(after) == 2


def test_a_new_epoch_has_a_different_order_and_starts_at_its_first_sample() -> None:
    (sampler,) = ranks(20, 1)
    first = list(sampler)
    sampler.advance(7)
    sampler.set_epoch(1)
    assert sampler.samples_seen == 0
    assert list(sampler) != first
    assert sorted(sampler) == list(range(20))


def test_the_current_epoch_keeps_its_position() -> None:
    (sampler,) = ranks(20, 1)
    sampler.set_epoch(3)
    sampler.advance(5)
    state = sampler.state_dict()
    (resumed,) = ranks(20, 1, state)
    resumed.set_epoch(3)
    assert (resumed.epoch, len(resumed)) == (3, 15)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_fetch_ahead_does_not_count_as_seen(workers: int) -> None:
    data = TensorDataset(torch.arange(24))
    sampler = ResumableSampler(data, seed=3)
    loader = DataLoader(data, batch_size=4, sampler=sampler, num_workers=workers)
    order = list(ResumableSampler(24, seed=3))
    batches = iter(loader)
    for _ in range(2):
        (batch,) = next(batches)
        sampler.advance(len(batch))
    resumed = ResumableSampler(data, seed=3)
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.samples_seen == 8
    assert list(resumed) == order[8:]
    assert len(DataLoader(data, batch_size=4, sampler=resumed)) == 4


def test_a_state_without_any_advance_is_an_error() -> None:
    (sampler,) = ranks(10, 1)
    assert sampler.state_dict()["samples_seen"] == 0
    next(iter(sampler))
    with pytest.raises(PositionError, match=r"Call sampler\.advance\(len\(batch\)\)"):
        sampler.state_dict()
    sampler.advance(0)
    assert sampler.state_dict()["samples_seen"] == 0


def test_the_next_epoch_needs_its_own_advance() -> None:
    (sampler,) = ranks(4, 1)
    list(sampler)
    sampler.advance(4)
    sampler.set_epoch(1)
    next(iter(sampler))
    with pytest.raises(PositionError):
        sampler.state_dict()


def test_iterating_a_complete_epoch_is_an_error_that_names_set_epoch() -> None:
    (sampler,) = ranks(4, 1)
    list(sampler)
    sampler.advance(4)
    assert len(sampler) == 0
    with pytest.raises(ConfigurationError, match=r"Epoch 0 is complete\. Call set_epoch\(1\)"):
        list(sampler)


def test_an_epoch_that_was_complete_when_it_was_saved_has_nothing_left() -> None:
    (sampler,) = ranks(4, 1)
    sampler.advance(4)
    (resumed,) = ranks(4, 1, sampler.state_dict())
    assert list(resumed) == []
    resumed.set_epoch(1)
    assert len(list(resumed)) == 4


def test_samples_that_fill_up_the_last_round_are_not_counted() -> None:
    for sampler in ranks(5, 2):
        sampler.advance(3)
        assert sampler.state_dict()["samples_seen"] == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"length": 11}, "saved with length=11, but this sampler has length=10"),
        ({"seed": 1}, "saved with seed=1, but this sampler has seed=0"),
        ({"shuffle": False}, "saved with shuffle=False, but this sampler has shuffle=True"),
        ({"samples_seen": 11}, "not a position in 10 samples"),
        ({"samples_seen": -1}, "not a position in 10 samples"),
        ({"epoch": -1}, "not a position in 10 samples"),
        ({"epoch": None}, "not a state of a ResumableSampler"),
        ({"seed": "0"}, "not a state of a ResumableSampler"),
    ],
)
def test_a_position_that_does_not_fit_is_an_error(change: dict[str, Any], said: str) -> None:
    (sampler,) = ranks(10, 1)
    with pytest.raises(PositionError, match=said):
        sampler.load_state_dict(sampler.state_dict() | change)
    assert (sampler.epoch, sampler.samples_seen) == (0, 0)


def test_anything_but_a_state_is_an_error() -> None:
    (sampler,) = ranks(10, 1)
    for state in ({}, None, [], {"seed": 0}):
        with pytest.raises(PositionError, match="not a state"):
            sampler.load_state_dict(state)


def test_a_negative_advance_is_an_error() -> None:
    (sampler,) = ranks(10, 1)
    with pytest.raises(ConfigurationError, match=r"advance\(-1\) must not be negative"):
        sampler.advance(-1)


@pytest.mark.parametrize(("num_replicas", "rank"), [(2, 2), (2, -1), (None, 1), (0, None)])
def test_a_rank_out_of_range_is_an_error(num_replicas: int | None, rank: int | None) -> None:
    with pytest.raises(ConfigurationError, match="is out of range"):
        ResumableSampler(10, num_replicas=num_replicas, rank=rank)


def test_an_empty_dataset_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="must not be empty; its length is 0"):
        ResumableSampler([])


def test_without_a_process_group_rank_and_size_come_from_the_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (ResumableSampler(10).rank, ResumableSampler(10).num_replicas) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert (ResumableSampler(10).rank, ResumableSampler(10).num_replicas) == (2, 3)
