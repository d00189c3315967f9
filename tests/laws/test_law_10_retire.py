"""Law 10, Retire: the manifest goes first, then the data; never what somebody still needs."""

from __future__ import annotations

import pytest

from hf_cloudtrain.catalog import CheckpointKey
from hf_cloudtrain.errors import NoCheckpointError, StorageError
from tests.faults.runs import Machine, Machines, bytes_of

OLD, NEW = CheckpointKey(1, 5), CheckpointKey(1, 10)


@pytest.fixture
def machine(machines: Machines) -> Machine:
    """A machine that has committed steps 5 and 10."""
    machine = machines.new()
    machine.start()
    for step in (5, 10):
        machine.save(step)
        machine.wait()
    return machine


def test_law_10_the_manifest_goes_before_any_data(machines: Machines, machine: Machine) -> None:
    machines.storage.calls.clear()
    machines.catalog.retire(OLD)
    deleted = [call.path for call in machines.storage.calls if call.kind == "delete"]
    assert deleted[0] == ".cloudtrain/checkpoints/000001-0000000005.json"
    assert set(deleted) == {
        deleted[0],
        *(f"checkpoint-5/{path}" for path in bytes_of(5)),
        ".cloudtrain/claims/checkpoint-5.json",
    }
    assert machines.committed() == [(1, 10)]
    assert not (machines.run / "checkpoint-5").exists()
    assert machines.restored("elsewhere") == bytes_of(10)


@pytest.mark.parametrize("call", range(1, 8))
def test_law_10_a_retirement_that_breaks_off_leaves_no_half_checkpoint(
    machines: Machines, machine: Machine, call: int
) -> None:
    machines.storage.calls.clear()
    machines.storage.fail("delete", StorageError("broken off"), call=call, times=100)
    try:
        machines.catalog.retire(OLD)
    except StorageError:
        broken = True
    else:
        broken = False
    machines.storage.heal()
    assert broken == (machines.storage.count("delete") >= call)
    # Either whole, or none at all: `committed` reads every byte.
    assert machines.committed() in ([(1, 5), (1, 10)], [(1, 10)])
    assert ((1, 5) in machines.committed()) == (call == 1)
    assert machines.restored("elsewhere") == bytes_of(10)


def test_law_10_what_a_broken_retirement_left_is_never_written_into_by_another_attempt(
    machines: Machines, machine: Machine
) -> None:
    machines.storage.fail("delete", StorageError("broken off"), path="checkpoint-5/*", times=100)
    with pytest.raises(StorageError):
        machines.catalog.retire(OLD)
    machines.storage.heal()

    second = machines.new("second", fresh=True)
    second.start()
    second.save(5, salt="second")
    second.wait()
    assert machines.catalog.read(CheckpointKey(2, 5)).folder == "checkpoint-5.a2"
    assert machines.restored("elsewhere") == bytes_of(5, "second")


def test_law_10_the_newest_the_best_and_the_one_resumed_from_are_protected_with_the_reason(
    machines: Machines, machine: Machine
) -> None:
    machine.save(15, best=True)
    machine.save(20)
    machine.wait()
    resumed = machines.new("resumed")
    assert resumed.start() == 20
    resumed.save(25)
    resumed.wait()
    assert machines.catalog.protected() == {
        CheckpointKey(1, 15): "it is the best one",
        CheckpointKey(1, 20): "attempt 2 resumed from it",
        CheckpointKey(2, 25): "it is the newest one",
    }


def test_law_10_the_one_resumed_from_is_protected_before_a_newer_is_committed(
    machines: Machines, machine: Machine
) -> None:
    """The newer attempt has saved nothing yet: without what it began from, its work so far is lost."""
    machines.new("resumed").checkpointer.begin(5)
    assert machines.catalog.protected() == {
        OLD: "attempt 2 resumed from it",
        NEW: "it is the newest one",
    }


def test_law_10_a_checkpoint_that_is_gone_cannot_be_retired_twice(
    machines: Machines, machine: Machine
) -> None:
    machines.catalog.retire(OLD)
    with pytest.raises(NoCheckpointError, match="000001-0000000005"):
        machines.catalog.retire(OLD)


def test_law_10_a_step_that_was_retired_can_be_saved_again(machines: Machines, machine: Machine) -> None:
    machines.catalog.retire(OLD)
    again = machines.new("again", fresh=True)
    again.start()
    again.save(5, salt="again")
    again.wait()
    assert machines.catalog.read(CheckpointKey(2, 5)).folder == "checkpoint-5"
    assert machines.restored("elsewhere") == bytes_of(5, "again")
