"""Each sample once an epoch, wherever training stops and on however many processes it goes on."""

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
    """The samplers of all processes, as a start from that state has them."""
    made = [
        ResumableSampler(length, num_replicas=world_size, rank=rank, **options) for rank in range(world_size)
    ]
    for sampler in made:
        if state is not None:
            sampler.load_state_dict(state)
    return made


def train(samplers: list[Any], steps: int, batch: int) -> list[int]:
    """So many steps on all processes in turn; what was seen, by position in the common order."""
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
def test_from_the_start_it_deals_as_distributed_sampler_does(
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


def test_on_as_many_processes_it_goes_on_as_if_nothing_had_happened() -> None:
    for before, after in zip(ranks(11, 2), ranks(11, 2), strict=True):
        uninterrupted = list(before)
        before.advance(4)
        after.load_state_dict(before.state_dict())
        assert list(after) == uninterrupted[4:]
        assert len(after) == 2


def test_another_epoch_has_another_order_and_begins_at_its_beginning() -> None:
    (sampler,) = ranks(20, 1)
    first = list(sampler)
    sampler.advance(7)
    sampler.set_epoch(1)
    assert sampler.samples_seen == 0
    assert list(sampler) != first
    assert sorted(sampler) == list(range(20))


def test_the_epoch_under_way_keeps_its_place() -> None:
    (sampler,) = ranks(20, 1)
    sampler.set_epoch(3)
    sampler.advance(5)
    state = sampler.state_dict()
    (resumed,) = ranks(20, 1, state)
    resumed.set_epoch(3)
    assert (resumed.epoch, len(resumed)) == (3, 15)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_loader_workers_fetch_ahead_is_not_seen(workers: int) -> None:
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


def test_a_state_without_any_advance_is_refused() -> None:
    (sampler,) = ranks(10, 1)
    assert sampler.state_dict()["samples_seen"] == 0
    next(iter(sampler))
    with pytest.raises(PositionError, match=r"Call sampler\.advance\(len\(batch\)\)"):
        sampler.state_dict()
    sampler.advance(0)
    assert sampler.state_dict()["samples_seen"] == 0


def test_in_the_next_epoch_advance_is_asked_for_again() -> None:
    (sampler,) = ranks(4, 1)
    list(sampler)
    sampler.advance(4)
    sampler.set_epoch(1)
    next(iter(sampler))
    with pytest.raises(PositionError):
        sampler.state_dict()


def test_an_epoch_that_is_over_says_to_set_the_next() -> None:
    (sampler,) = ranks(4, 1)
    list(sampler)
    sampler.advance(4)
    assert len(sampler) == 0
    with pytest.raises(ConfigurationError, match=r"Epoch 0 is over\. Call set_epoch\(1\)"):
        list(sampler)


def test_an_epoch_that_was_over_when_it_was_saved_has_nothing_left() -> None:
    (sampler,) = ranks(4, 1)
    sampler.advance(4)
    (resumed,) = ranks(4, 1, sampler.state_dict())
    assert list(resumed) == []
    resumed.set_epoch(1)
    assert len(list(resumed)) == 4


def test_the_filling_of_the_last_round_is_not_counted() -> None:
    for sampler in ranks(5, 2):
        sampler.advance(3)
        assert sampler.state_dict()["samples_seen"] == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"length": 11}, "saved with length=11, and here it is 10"),
        ({"seed": 1}, "saved with seed=1, and here it is 0"),
        ({"shuffle": False}, "saved with shuffle=False, and here it is True"),
        ({"samples_seen": 11}, "no place in 10 samples"),
        ({"samples_seen": -1}, "no place in 10 samples"),
        ({"epoch": -1}, "no place in 10 samples"),
        ({"epoch": None}, "no state of a ResumableSampler"),
        ({"seed": "0"}, "no state of a ResumableSampler"),
    ],
)
def test_a_position_that_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    (sampler,) = ranks(10, 1)
    with pytest.raises(PositionError, match=said):
        sampler.load_state_dict(sampler.state_dict() | change)
    assert (sampler.epoch, sampler.samples_seen) == (0, 0)


def test_what_is_no_state_at_all_is_refused() -> None:
    (sampler,) = ranks(10, 1)
    for state in ({}, None, [], {"seed": 0}):
        with pytest.raises(PositionError, match="no state"):
            sampler.load_state_dict(state)


def test_going_back_is_refused() -> None:
    (sampler,) = ranks(10, 1)
    with pytest.raises(ConfigurationError, match=r"advance\(-1\) goes back"):
        sampler.advance(-1)


@pytest.mark.parametrize(("num_replicas", "rank"), [(2, 2), (2, -1), (None, 1), (0, None)])
def test_a_rank_that_cannot_be_is_refused(num_replicas: int | None, rank: int | None) -> None:
    with pytest.raises(ConfigurationError, match="is none of"):
        ResumableSampler(10, num_replicas=num_replicas, rank=rank)


def test_a_data_set_without_samples_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="0 samples"):
        ResumableSampler([])


def test_without_a_process_group_the_launcher_says_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ResumableSampler(10).rank, ResumableSampler(10).num_replicas) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert (ResumableSampler(10).rank, ResumableSampler(10).num_replicas) == (2, 3)
