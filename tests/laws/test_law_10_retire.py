"""Law 10, Retire: a deletion removes the manifest first, then the data; a checkpoint in use is never deleted."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints import retention
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.deletion import retire, retiring
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.retention import Policy, Retention, pin, protected, unpin
from hf_cloudtrain.errors import NoCheckpointError, OvertakenError, StorageError
from tests.faults.runs import DEADLINE, Machine, Machines, bytes_of, contents, wait_until

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


def test_law_10_the_manifest_is_deleted_before_any_data(machines: Machines, machine: Machine) -> None:
    machines.storage.calls.clear()
    retire(machines.catalog, OLD)
    deleted = [call.path for call in machines.storage.calls if call.kind == "delete"]
    assert deleted[0] == ".cloudtrain/checkpoints/000001-0000000005.json"
    assert deleted[-1] == ".cloudtrain/retiring/000001-0000000005.json", (
        "deleted last, so that an interrupted deletion can be finished"
    )
    assert set(deleted) == {
        *(deleted[0], deleted[-1]),
        *(f"checkpoint-5/{path}" for path in bytes_of(5)),
        ".cloudtrain/pins/000001-0000000005.json",
    }
    assert machines.committed() == [(1, 10)]
    assert not (machines.run / "checkpoint-5").exists()
    assert machines.restored("elsewhere") == bytes_of(10)


@pytest.mark.parametrize("call", range(1, 8))
def test_law_10_an_interrupted_deletion_leaves_no_partial_checkpoint(
    machines: Machines, machine: Machine, call: int
) -> None:
    machines.storage.calls.clear()
    machines.storage.fail("delete", StorageError("interrupted"), call=call, times=100)
    try:
        retire(machines.catalog, OLD)
    except StorageError:
        failed = True
    else:
        failed = False
    machines.storage.heal()
    assert failed == (machines.storage.count("delete") >= call)
    # The checkpoint is complete or does not exist: `committed` verifies every byte.
    assert machines.committed() in ([(1, 5), (1, 10)], [(1, 10)])
    assert ((1, 5) in machines.committed()) == (call == 1)
    assert machines.restored("elsewhere") == bytes_of(10)


def test_law_10_a_newer_attempt_never_writes_into_the_folder_of_an_unfinished_deletion(
    machines: Machines, machine: Machine
) -> None:
    machines.storage.fail("delete", StorageError("interrupted"), path="checkpoint-5/*", times=100)
    with pytest.raises(StorageError):
        retire(machines.catalog, OLD)
    machines.storage.heal()

    second = machines.new("second", fresh=True)
    second.start()
    second.save(5, salt="second")
    second.wait()
    assert machines.catalog.read(CheckpointKey(2, 5)).folder == "checkpoint-5.a2"
    assert machines.restored("elsewhere") == bytes_of(5, "second")


def test_law_10_the_newest_and_the_best_checkpoint_are_protected_with_the_reason(
    machines: Machines, machine: Machine
) -> None:
    machine.save(15, best=True)
    machine.save(20)
    machine.wait()
    resumed = machines.new("resumed")
    assert resumed.start() == 20
    resumed.save(25)
    resumed.wait()
    assert protected(machines.catalog) == {
        CheckpointKey(1, 15): "it is the best one",
        CheckpointKey(2, 25): "it is the newest one",
    }


def test_law_10_the_checkpoint_resumed_from_is_protected_until_a_newer_one_is_committed(
    machines: Machines, machine: Machine
) -> None:
    """The newer attempt has saved nothing yet. Without the checkpoint that it resumed from, its work would be lost."""
    resumed = machines.new("resumed")
    resumed.checkpointer.begin(5)
    assert protected(machines.catalog) == {
        OLD: "attempt 2 resumed from it",
        NEW: "it is the newest one",
    }
    # A late commit of the older attempt: the newest attempt does not continue from that checkpoint.
    late = CheckpointKey(1, 15)
    changes = {"key": str(late), "step": 15, "folder": "checkpoint-15", "nonce": "late"}
    machines.catalog.commit(replace(machines.catalog.read(NEW), **changes))
    assert protected(machines.catalog) == {
        OLD: "attempt 2 resumed from it",
        late: "it is the newest one",
    }
    resumed.save(6)
    resumed.checkpointer.wait()
    assert protected(machines.catalog) == {CheckpointKey(2, 6): "it is the newest one"}


def test_law_10_a_pinned_checkpoint_is_protected_until_it_is_unpinned(
    machines: Machines, machine: Machine
) -> None:
    pin(machines.catalog, OLD)
    assert protected(machines.catalog)[OLD] == "it is pinned"
    unpin(machines.catalog, OLD)
    assert list(protected(machines.catalog)) == [NEW]


def test_law_10_a_checkpoint_cannot_be_deleted_twice(machines: Machines, machine: Machine) -> None:
    retire(machines.catalog, OLD)
    with pytest.raises(NoCheckpointError, match="000001-0000000005"):
        retire(machines.catalog, OLD)


def test_law_10_a_deleted_step_can_be_saved_again(machines: Machines, machine: Machine) -> None:
    retire(machines.catalog, OLD)
    again = machines.new("again", fresh=True)
    again.start()
    again.save(5, salt="again")
    again.wait()
    assert machines.catalog.read(CheckpointKey(2, 5)).folder == "checkpoint-5.a2"
    assert machines.restored("elsewhere") == bytes_of(5, "again")


def wait_for_retention(machine: Machine) -> None:
    """Wait for the end of the retention pass after the last commit."""
    upload_queue = machine.checkpointer.upload_queue
    assert upload_queue is not None
    wait_until(lambda: not upload_queue._retention.is_running, "the end of the retention pass")


def start_with_limit(machines: Machines, name: str = "out", limit: int = 2, n: int | None = None) -> Machine:
    machine = machines.new(name)
    machine.checkpointer.policy = Policy(limit, n)
    machine.start()
    return machine


def test_law_10_a_run_with_a_limit_keeps_the_newest_the_best_the_pinned_and_every_nth(
    machines: Machines,
) -> None:
    machine = start_with_limit(machines, limit=2, n=20)
    for step in (5, 10, 15, 20, 25, 30, 35):
        machine.save(step, best=step == 10)
        machine.wait()
        wait_for_retention(machine)
        if step == 15:
            pin(machines.catalog, CheckpointKey(1, 15))
    assert machines.committed() == [(1, 10), (1, 15), (1, 20), (1, 30), (1, 35)]
    assert not (machines.run / "checkpoint-5").exists()


def test_law_10_the_next_attempt_on_a_different_machine_applies_the_limit(machines: Machines) -> None:
    machine = start_with_limit(machines)
    for step in (5, 10, 15):
        machine.save(step)
        machine.wait()
        wait_for_retention(machine)
    second = start_with_limit(machines, "elsewhere", limit=1)
    assert machines.committed() == [(1, 10), (1, 15)], "nothing is deleted before the first commit"
    second.save(20)
    second.wait()
    wait_for_retention(second)
    assert machines.committed() == [(2, 20)]
    machine.save(20)
    with pytest.raises(OvertakenError):
        machine.wait()
    wait_for_retention(machine)
    assert machines.committed() == [(2, 20)], "the overtaken attempt deletes nothing"


def test_law_10_the_end_of_training_does_not_wait_for_deletes_that_hang(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "SETTLE_SECONDS", 0.01)
    machine = start_with_limit(machines, limit=1)
    machine.save(5)
    machine.wait()
    machines.storage.hold("delete", machines.gate)
    machine.save(10)
    ending = threading.Thread(target=machine.checkpointer.finish, daemon=True)
    ending.start()
    ending.join(DEADLINE)
    assert not ending.is_alive()
    machine.checkpointer.drain()
    upload_queue = machine.checkpointer.upload_queue
    assert upload_queue is not None
    assert upload_queue._retention.is_running, (
        "the delete hangs, and the end of training does not wait for it"
    )
    assert (1, 10) in machines.committed()


def test_law_10_the_end_of_training_waits_briefly_for_the_last_deletes(machines: Machines) -> None:
    machine = start_with_limit(machines, limit=1)
    machine.save(5)
    machine.wait()
    machines.storage.hold("delete", machines.gate)
    machine.save(10)
    opening = threading.Timer(0.3, machines.gate.set)
    opening.start()
    machine.checkpointer.finish()
    assert retiring(machines.catalog) == []
    assert machines.committed() == [(1, 10)]
    opening.join()


def test_law_10_deleting_stops_while_an_upload_is_pending(machines: Machines, machine: Machine) -> None:
    machine.save(15)
    machine.wait()
    machine.stop()
    machine = start_with_limit(machines, limit=1)
    deleting = threading.Event()
    machines.storage.hold("delete", deleting, path="*/checkpoints/*", times=1)
    machines.storage.hold("upload", machines.gate, path="checkpoint-25/*")
    machine.save(20)
    wait_until(lambda: machines.storage.count("delete", "*/checkpoints/*"), "the first delete")
    machine.save(25)
    wait_until(lambda: machines.storage.count("upload", "checkpoint-25/*"), "the upload")
    deleting.set()
    upload_queue = machine.checkpointer.upload_queue
    assert upload_queue is not None
    wait_until(lambda: not upload_queue._retention.is_running, "the end of the retention pass")
    assert machines.storage.count("delete", "*/checkpoints/*") == 1
    assert retiring(machines.catalog) == [CheckpointKey(1, 5)], "the deletion was interrupted"
    machines.gate.set()
    machine.wait()
    wait_for_retention(machine)
    assert machines.committed() == [(2, 25)]
    assert retiring(machines.catalog) == []


def test_law_10_a_new_checkpoint_does_not_wait_for_a_delete_that_hangs(
    machines: Machines, machine: Machine
) -> None:
    machine.save(15)
    machine.wait()
    machine.stop()
    machine = start_with_limit(machines, limit=1)
    machines.storage.hold("delete", machines.gate, path="*/checkpoints/*", times=1)
    machine.save(20)
    wait_until(lambda: machines.storage.count("delete", "*/checkpoints/*"), "the first delete")
    machine.save(25)
    machine.wait()
    assert machines.catalog.holds(CheckpointKey(2, 25))
    assert machines.storage.count("delete", "*/checkpoints/*") == 1, "the delete still hangs"
    machines.gate.set()
    wait_for_retention(machine)
    assert machines.committed() == [(2, 25)]
    assert not (machines.run / "checkpoint-5").exists(), "the deletion that hung must finish, too"


def test_law_10_an_outbox_with_slow_uploads_keeps_the_best_and_every_nth(machines: Machines) -> None:
    machine = start_with_limit(machines, limit=1, n=10)
    machines.storage.hold("upload", machines.gate)
    machine.save(5)
    wait_until(lambda: machines.storage.count("upload", "checkpoint-5/*"), "the first upload")
    for step in (6, 7, 10, 11, 12, 13):
        machine.save(step, best=step in (6, 7))
    assert [key.step for key in machine.waiting()] == [13, 10, 7, 5]


def test_law_10_a_restore_whose_checkpoint_is_deleted_continues_with_the_newer_one(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    """A different machine still trains. Its limit must not make this restore fail or return no checkpoint."""
    machine = start_with_limit(machines, limit=1)
    machine.save(5)
    machine.wait()
    elsewhere = machines.new("elsewhere")
    machines.storage.hold("download", machines.gate, path="checkpoint-5/*")
    steps: list[int] = []
    restoring = threading.Thread(target=lambda: steps.append(elsewhere.start()))
    restoring.start()
    wait_until(lambda: machines.storage.count("download", "checkpoint-5/*"), "the restore")
    machine.save(10)
    machine.wait()
    wait_for_retention(machine)
    assert machines.committed() == [(1, 10)]
    machines.gate.set()
    restoring.join(DEADLINE)
    assert steps == [10]
    assert contents(elsewhere.output_dir / "checkpoint-10") == bytes_of(10)


def test_law_10_a_deletion_killed_at_any_request_is_finished_by_the_next_pass(tmp_path: Path) -> None:
    """The process ends between any two requests; the next retention pass finishes the deletion."""
    for number in range(1, 100):
        with Machines(tmp_path / str(number)) as machines:
            machine = machines.new()
            machine.start()
            for step in (5, 10):
                machine.save(step)
                machine.wait()
            first = machines.catalog.attempts.read(1)
            machines.storage.fail("any", StorageError("killed"), call=number, times=10_000)
            Retention(Catalog(machines.storage), Policy(1), first).run()
            completed = machines.storage.count() and not machines.storage._faults[0].seen >= number
            machines.storage.heal()
            assert machines.committed() in ([(1, 5), (1, 10)], [(1, 10)])
            Retention(machines.catalog, Policy(1), first).run()
            assert machines.committed() == [(1, 10)]
            assert not (machines.run / "checkpoint-5").exists(), number
            assert retiring(machines.catalog) == []
            if completed:
                break
    assert number > 10, "the sweep must cover the whole pass"
