"""A step that would mean another place in the data is refused (the ground of law 8)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_cloudtrain.errors import PositionError
from hf_cloudtrain.manifest import Position
from hf_cloudtrain.position import refuse_other_topology

SAVED = Position(
    global_step=500,
    world_size=4,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    max_steps=1_000,
)


def test_the_same_topology_passes() -> None:
    refuse_other_topology(SAVED, replace(SAVED, global_step=0, max_steps=2_000), "checkpoint-500")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("world_size", "4 processes before, 3 now"),
        ("per_device_train_batch_size", "8 samples a batch and process before, 3 now"),
        ("gradient_accumulation_steps", "2 batches an optimizer step before, 3 now"),
    ],
)
def test_each_change_is_refused_and_named(name: str, words: str) -> None:
    with pytest.raises(PositionError, match=f"checkpoint-500 cannot be resumed here: {words}"):
        refuse_other_topology(SAVED, replace(SAVED, **{name: 3}), "checkpoint-500")


def test_all_changes_are_named_at_once() -> None:
    with pytest.raises(PositionError, match=r"4 processes before, 2 now; 8 samples .* 16 now"):
        refuse_other_topology(
            SAVED, replace(SAVED, world_size=2, per_device_train_batch_size=16), "checkpoint-500"
        )


def test_what_is_not_known_on_one_side_is_no_difference() -> None:
    refuse_other_topology(Position(global_step=500), SAVED, "checkpoint-500")
    refuse_other_topology(SAVED, replace(SAVED, per_device_train_batch_size=None), "checkpoint-500")
