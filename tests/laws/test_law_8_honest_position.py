"""Law 8, Honest position: the position is converted to a new process count, batch and accumulation, or restore stops.

This file tests the arithmetic against a count batch by batch. Real training is in
tests/integration/test_trainer_topology.py and test_loop_topology.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.errors import PositionError
from hf_cloudtrain.resume.topology import Epoch, batches_per_epoch, convert

EPOCHS = 3


@dataclass(frozen=True)
class Setup:
    """The settings that decide how many samples a step covers."""

    processes: int
    batch: int
    accumulation: int

    def steps(self, samples: int) -> list[int]:
        """Samples seen after each step of the training, counted batch by batch."""
        seen, ends = 0, []
        for epoch in range(1, EPOCHS + 1):
            rounds = math.ceil(math.ceil(samples / self.batch) / self.processes)
            for batch in range(1, rounds + 1):
                seen = min(seen + self.batch * self.processes, epoch * samples)
                if batch % self.accumulation == 0 or batch == rounds:
                    ends.append(seen)
        return ends

    def epoch(self, samples: int) -> Epoch:
        batches = batches_per_epoch(samples, self.batch, self.processes, drop_last=False)
        return Epoch(
            samples,
            math.ceil(batches / self.accumulation),
            self.processes * self.batch * self.accumulation,
        )

    def position(self, samples: int, step: int) -> Position:
        return Position(
            global_step=step,
            samples_seen=self.epoch(samples).samples_at(step),
            world_size=self.processes,
            per_device_train_batch_size=self.batch,
            gradient_accumulation_steps=self.accumulation,
            max_steps=len(self.steps(samples)),
            dataset_length=samples,
        )


setups = st.builds(Setup, st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))


@given(setups, st.integers(1, 60))
def test_law_8_samples_seen_match_a_count_batch_by_batch(setup: Setup, samples: int) -> None:
    ends = setup.steps(samples)
    assert [setup.epoch(samples).samples_at(step) for step in range(len(ends) + 1)] == [0, *ends]


@given(setups, setups, st.integers(1, 60), st.data())
def test_law_8_a_position_is_converted_to_the_same_samples_or_refused(
    old: Setup, new: Setup, samples: int, data: st.DataObject
) -> None:
    before, after = old.steps(samples), new.steps(samples)
    step = data.draw(st.integers(1, len(before)))
    seen = before[step - 1]
    saved, now = old.position(samples, step), new.position(samples, 0)
    if seen in after:
        conversion = convert(saved, now, new.epoch(samples), "checkpoint-1")
        assert after[conversion.global_step - 1] == seen
        assert conversion.max_steps == len(after), "the schedule ends with the data"
        assert conversion.step_of(step) == conversion.global_step
    else:
        with pytest.raises(PositionError, match=f"It was saved after {seen} samples"):
            convert(saved, now, new.epoch(samples), "checkpoint-1")


@given(setups, setups, st.integers(1, 60))
def test_law_8_converted_steps_stay_in_order_and_never_claim_unseen_samples(
    old: Setup, new: Setup, samples: int
) -> None:
    before, after = old.steps(samples), new.steps(samples)
    saved = old.position(samples, len(before))
    conversion = convert(saved, new.position(samples, 0), new.epoch(samples), "checkpoint-1")
    steps = [conversion.step_of(step) for step in range(len(before) + 1)]
    assert steps == sorted(steps)
    for step, seen in zip(steps, [0, *before], strict=True):
        assert [0, *after][step] <= seen


@pytest.mark.parametrize("unknown", ["samples_seen", "dataset_length", "world_size"])
def test_law_8_an_unknown_value_is_not_guessed(unknown: str) -> None:
    facts = vars(Setup(2, 4, 1).position(24, 3)) | {unknown: None}
    new = Setup(1, 4, 2)
    with pytest.raises(PositionError, match="cannot be resumed here"):
        convert(Position(**facts), new.position(24, 0), new.epoch(24), "checkpoint-3")
