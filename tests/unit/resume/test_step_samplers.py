"""PeriFlow's two samplers: its names, arguments and order, and a resume at any step sees the same batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_cloudtrain import ResumableRandomSampler, ResumableSequentialSampler
from hf_cloudtrain.errors import ConfigurationError

BOTH = pytest.mark.parametrize("kind", [ResumableSequentialSampler, ResumableRandomSampler])


def batches(sampler: Any, epochs: int) -> list[list[int]]:
    return [batch for _ in range(epochs) for batch in sampler]


def test_the_sequential_order_is_that_of_the_dataset() -> None:
    sampler = ResumableSequentialSampler(samples_per_epoch=10, batch_size=4, drop_last=False)
    assert batches(sampler, 2) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2
    assert batches(ResumableSequentialSampler(10, 4, drop_last=True), 1) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_processes_share_each_batch_of_the_sequential_order() -> None:
    ranks = [
        ResumableSequentialSampler(8, 4, data_parallel_rank=rank, data_parallel_size=2) for rank in (0, 1)
    ]
    assert [batches(sampler, 1) for sampler in ranks] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_the_random_order_is_the_one_that_periflow_had() -> None:
    """The numbers were printed by periflow_sdk at b8d9c0b."""
    sampler = ResumableRandomSampler(samples_per_epoch=10, batch_size=4, seed=77)
    assert batches(sampler, 2) == [[3, 1, 9, 8], [7, 2, 6, 4], [0, 5], [9, 0, 4, 3], [2, 5, 8, 6], [1, 7]]
    ranks = [
        ResumableRandomSampler(8, 4, data_parallel_rank=rank, data_parallel_size=2, seed=3) for rank in (0, 1)
    ]
    assert [batches(sampler, 1) for sampler in ranks] == [[[2, 1], [3, 0]], [[6, 5], [7, 4]]]


@BOTH
@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 40),
    part=st.integers(1, 5),
    size=st.integers(1, 3),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_a_resume_at_any_step_sees_the_batches_of_an_uninterrupted_training(
    kind: Any, length: int, part: int, size: int, drop_last: bool, data: st.DataObject
) -> None:
    if not drop_last:
        length *= size
    if drop_last and length < part * size:
        length = part * size
    for rank in range(size):
        options = {"drop_last": drop_last, "data_parallel_rank": rank, "data_parallel_size": size}
        whole = batches(kind(length, part * size, **options), 3)
        done = data.draw(st.integers(0, len(whole) * 2 // 3))
        resumed = kind(length, part * size, **options)
        resumed.set_processed_steps(done)
        rest = list(
            itertools.islice(itertools.chain.from_iterable(itertools.repeat(resumed)), len(whole) - done)
        )
        assert rest == whole[done:]


@BOTH
def test_an_epoch_of_all_processes_has_each_sample_once(kind: Any) -> None:
    ranks = [kind(12, 6, data_parallel_rank=rank, data_parallel_size=3) for rank in range(3)]
    assert sorted(itertools.chain.from_iterable(batch for one in ranks for batch in one)) == list(range(12))


@BOTH
def test_it_is_the_batch_sampler_of_a_loader(kind: Any) -> None:
    loader = DataLoader(list(range(10)), batch_sampler=kind(10, 4))  # type: ignore[arg-type, unused-ignore]
    assert sorted(int(number) for batch in loader for number in batch) == list(range(10))
    assert len(kind(10, 4)) == 10, "as in PeriFlow"


@BOTH
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"batch_size": 5, "data_parallel_size": 2}, "batch_size=5 must be a multiple"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"samples_per_epoch": 9, "data_parallel_size": 2}, "drop_last=True"),
        ({"data_parallel_rank": 2, "data_parallel_size": 2}, "data_parallel_rank=2"),
        ({"samples_per_epoch": 3, "drop_last": True}, "no batch of 4"),
    ],
)
def test_what_cannot_be_divided_is_refused(kind: Any, options: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigurationError, match=part):
        kind(**{"samples_per_epoch": 8, "batch_size": 4, **options})
    with pytest.raises(ConfigurationError, match="processed_steps=-1"):
        kind(8, 4).set_processed_steps(-1)
