"""Law 9, Newest: by (attempt, step), not by step alone; and no run is started over by mistake."""

from __future__ import annotations

import pytest

from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import RunHasCheckpointsError
from hf_cloudtrain.testing import flip_bit
from tests.faults.runs import Machines, bytes_of, wait_until


def test_law_9_a_stale_higher_step_of_an_older_attempt_never_wins(machines: Machines) -> None:
    first, second = machines.new("first"), machines.new("second")
    first.start()
    first.save(5)
    first.wait()
    assert second.start() == 5
    first.save(900)  # the old attempt still runs for a while
    first.land()
    second.save(6)
    second.wait()

    assert machines.committed() == [(1, 5), (1, 900), (2, 6)]
    assert machines.catalog.newest() == CheckpointKey(2, 6)
    assert machines.new("third").start() == 6
    assert machines.catalog.pointer("last") == CheckpointKey(2, 6)


def test_law_9_a_late_commit_of_an_older_attempt_does_not_move_the_pointers_back(machines: Machines) -> None:
    first, second = machines.new("first"), machines.new("second")
    first.start()
    second.start()
    second.save(5, best=True)
    second.wait()
    first.save(7, best=True)
    first.land()
    assert machines.catalog.pointer("last") == CheckpointKey(2, 5)
    assert machines.catalog.pointer("best") == CheckpointKey(2, 5)


def test_law_9_keys_sort_as_numbers_and_not_as_text() -> None:
    keys = [CheckpointKey(2, 5), CheckpointKey(10, 1), CheckpointKey(2, 10), CheckpointKey(1_000_000, 1)]
    assert sorted(keys) == [
        CheckpointKey(2, 5),
        CheckpointKey(2, 10),
        CheckpointKey(10, 1),
        CheckpointKey(1_000_000, 1),
    ]


def test_law_9_beyond_the_padding_the_newest_is_still_the_highest_attempt(machines: Machines) -> None:
    for number in (999_999, 1_000_000):
        machines.storage.write(f".cloudtrain/attempts/{number:06d}.json", b"{}")
        machines.storage.write(f".cloudtrain/checkpoints/{number:06d}-0000000005.json", b"{}")
    assert machines.catalog.newest() == CheckpointKey(1_000_000, 5)
    assert machines.catalog.attempts.numbers() == [999_999, 1_000_000]


def test_law_9_a_start_at_step_0_on_a_run_with_checkpoints_is_refused(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    with pytest.raises(RunHasCheckpointsError) as raised:
        machines.new("forgetful").checkpointer.begin(0)
    assert "trainer.train(resume_from_checkpoint=cloud.restore(args))" in str(raised.value)
    assert "fresh=True" in str(raised.value)
    assert machines.catalog.attempts.numbers() == [1], "it must be refused before it takes an attempt number"


def test_law_9_a_fresh_start_ranks_above_all_older_checkpoints(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(900)
    machine.wait()
    fresh = machines.new("fresh", fresh=True)
    assert fresh.start() == 0
    fresh.save(1)
    fresh.wait()
    assert machines.committed() == [(1, 900), (2, 1)]
    assert machines.new("next").start() == 1


def test_law_9_a_fresh_start_that_has_saved_nothing_yet_hides_nothing(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    machines.new("fresh", fresh=True).start()
    assert machines.new("next").start() == 5


def test_law_9_local_checkpoints_of_a_different_history_are_moved_aside_and_not_deleted(
    machines: Machines,
) -> None:
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    stray = machine.output_dir / "checkpoint-7/model.safetensors"
    stray.parent.mkdir()
    stray.write_bytes(b"never uploaded")

    assert machines.new().start() == 5
    assert not stray.exists()
    moved = machine.output_dir / "_cloudtrain/stale/checkpoint-7/model.safetensors"
    assert moved.read_bytes() == b"never uploaded"
    assert (machine.output_dir / "checkpoint-5").is_dir()


def test_law_9_a_resume_from_an_older_checkpoint_is_logged(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    machine = machines.new()
    machine.start()
    for step in (5, 10):
        machine.save(step)
        machine.wait()
    again = machines.new("again").checkpointer
    attempt = again.begin(5)  # the user passed checkpoint-5 to Trainer
    assert attempt.resumed_from == CheckpointKey(1, 5)
    assert "newest checkpoint" in caplog.text
    assert "is checkpoint-10 (attempt 1)" in caplog.text


def test_law_9_resumed_from_names_the_restored_checkpoint_and_not_the_damaged_one(
    machines: Machines,
) -> None:
    machine = machines.new()
    machine.start()
    for step in (5, 10):
        machine.save(step)
        machine.wait()
    model = machines.run / "checkpoint-10/model.safetensors"
    model.write_bytes(flip_bit(model.read_bytes()))
    again = machines.new("again")
    assert again.start() == 5
    assert again.checkpointer.attempt.resumed_from == CheckpointKey(1, 5)
    again.save(10, salt="again")
    wait_until(lambda: len(machines.catalog.checkpoints()) == 3, "the commit")
    assert machines.restored("third") == bytes_of(10, "again")
