"""The position in new steps, and what cannot be converted; law 8 itself is in tests/laws."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.errors import PositionError
from hf_cloudtrain.resume.topology import (
    Epoch,
    batches_per_epoch,
    check_same_length,
    check_same_topology,
    convert,
)

SAVED = Position(
    global_step=500,
    world_size=4,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    max_steps=1_000,
)


def test_the_same_topology_passes() -> None:
    check_same_topology(SAVED, replace(SAVED, global_step=0, max_steps=2_000), "checkpoint-500")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("world_size", "4 processes before, 3 now"),
        ("per_device_train_batch_size", "8 samples per batch and process before, 3 now"),
        ("gradient_accumulation_steps", "2 batches per optimizer step before, 3 now"),
    ],
)
def test_each_change_is_an_error_that_names_it(name: str, text: str) -> None:
    with pytest.raises(PositionError, match=f"checkpoint-500 cannot be resumed here: {text}"):
        check_same_topology(SAVED, replace(SAVED, **{name: 3}), "checkpoint-500")


def test_all_changes_are_named_at_once() -> None:
    with pytest.raises(PositionError, match=r"4 processes before, 2 now; 8 samples .* 16 now"):
        check_same_topology(
            SAVED, replace(SAVED, world_size=2, per_device_train_batch_size=16), "checkpoint-500"
        )


def test_a_value_that_one_side_does_not_know_is_not_a_difference() -> None:
    check_same_topology(Position(global_step=500), SAVED, "checkpoint-500")
    check_same_topology(SAVED, replace(SAVED, per_device_train_batch_size=None), "checkpoint-500")


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 11, 12, 13, 24])
def test_batches_are_counted_as_accelerate_distributes_them(
    samples: int, processes: int, drop_last: bool
) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    batches = BatchSampler(range(samples), 4, drop_last)
    lengths = {len(BatchSamplerShard(batches, processes, index)) for index in range(processes)}
    assert lengths == {batches_per_epoch(samples, 4, processes, drop_last=drop_last)}


def test_an_epoch_that_was_shorter_than_its_dataset_keeps_its_saved_length() -> None:
    """With drop_last: 2 steps of 8 and 6 samples left out, then the second epoch."""
    saved = replace(SAVED, world_size=1, gradient_accumulation_steps=1, max_steps=6, dataset_length=22)
    saved = replace(saved, global_step=3, samples_seen=30, epoch_steps=2)
    conversion = convert(saved, replace(saved, world_size=2), Epoch(22, 5, 4), "checkpoint-3")
    assert (conversion.global_step, conversion.max_steps) == (5 + 2, 15)
    assert conversion.step_of(1) == 2
    assert conversion.is_renumbered


def test_steps_of_the_same_size_keep_their_numbers() -> None:
    saved = replace(SAVED, dataset_length=6_400, samples_seen=32_000)
    conversion = convert(
        saved,
        replace(saved, world_size=8, gradient_accumulation_steps=1),
        Epoch(6_400, 100, 64),
        "checkpoint-500",
    )
    assert conversion.global_step == 500
    assert not conversion.is_renumbered
    assert conversion.changes == "4 processes before, 8 now; 2 batches per optimizer step before, 1 now"


@pytest.mark.parametrize(
    ("old", "now", "text"),
    [
        (24, 22, "had 24 samples; it has 22 samples now"),
        (24, None, "had 24 samples; it is streamed now"),
        (None, 22, "was streamed; it has 22 samples now"),
    ],
)
def test_a_dataset_of_a_different_length_is_an_error(old: int | None, now: int | None, text: str) -> None:
    with pytest.raises(PositionError, match=f"checkpoint-5 was saved when the training dataset {text}"):
        check_same_length(old, now, "checkpoint-5")
