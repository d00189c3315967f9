"""Law 4, Kept: what was accepted into the outbox is not lost while the disk survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.flush import flush
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import ObjectNotFoundError, StorageError
from hf_cloudtrain.runtime.progress import Progress
from tests.faults.runs import Machine, Machines, bytes_of, wait_until, write_files

ROOT = Path(__file__).resolve().parent.parent.parent


def test_law_4_rotation_during_an_upload_loses_nothing(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.hold("upload", machines.gate)
    machine.save(5)
    wait_until(lambda: machines.storage.count("upload", "checkpoint-*"), "the upload")
    machine.rotate(5)
    machines.gate.set()
    machine.wait()
    assert machines.restored("elsewhere") == bytes_of(5)


def test_law_4_rotation_during_an_outage_loses_nothing(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail("any", times=1_000_000)
    machine.save(5)
    wait_until(lambda: machine.checkpointer.upload_queue.last_error, "a failed try")
    machine.save(10)
    machine.rotate(5)
    machine.rotate(10)
    machines.storage.heal()
    machine.wait()
    assert machines.committed()[-1] == (1, 10)
    assert machines.restored("elsewhere") == bytes_of(10)


KILLED = """
import sys
from pathlib import Path
from tests.faults.runs import Machines

with Machines(Path(sys.argv[1])) as machines:
    machine = machines.new("killed")
    machine.start()
    machines.storage.hold("upload", machines.gate, path="*/model.safetensors")
    machine.save(5)
    print("saved", flush=True)
    machines.gate.wait()
"""


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The disk of a trainer that was killed in the middle of its first upload, as attempt 1."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "saved\n"
        trainer.send_signal(signal.SIGKILL)
        assert trainer.wait() == -signal.SIGKILL
    return tmp_path / "killed"


def test_law_4_flush_finishes_a_killed_trainers_upload_under_its_own_attempt(
    machines: Machines, killed: Path
) -> None:
    newer = machines.new("newer")
    newer.start()
    newer.save(3)
    newer.wait()

    outbox = machines.new("killed").checkpointer.outbox
    assert [entry.key for entry in flush(machines.catalog, outbox, Progress())] == [CheckpointKey(1, 5)]

    assert machines.committed() == [(1, 5), (2, 3)]
    assert machines.restored("elsewhere") == bytes_of(3), "the older attempt must not win by its higher step"
    assert machines.catalog.pointer("last") == CheckpointKey(2, 3)
    assert outbox.entries() == []


def test_law_4_the_next_start_on_that_disk_finishes_the_upload_first(
    machines: Machines, killed: Path
) -> None:
    machine = machines.new("killed")
    assert machine.start() == 5
    assert machine.checkpointer.attempt.number == 2
    assert machines.committed() == [(1, 5)]
    assert machines.restored("elsewhere") == bytes_of(5)
    assert machine.waiting() == []


def test_law_4_a_failed_flush_keeps_the_remaining_entries(machines: Machines, killed: Path) -> None:
    outbox = machines.new("killed").checkpointer.outbox
    machines.storage.fail("upload", times=1_000)
    with pytest.raises(StorageError):
        flush(machines.catalog, outbox, Progress())
    machines.storage.heal()
    assert [entry.key for entry in flush(machines.catalog, outbox, Progress())] == [CheckpointKey(1, 5)]


def with_blocked_upload(machines: Machines) -> Machine:
    """A machine whose upload of step 1 is running until the gate opens."""
    machine = machines.new()
    machine.start()
    machines.storage.hold("upload", machines.gate)
    machine.save(1)
    wait_until(lambda: machines.storage.count("upload", "checkpoint-*"), "the upload of step 1")
    return machine


def test_law_4_only_entries_overtaken_before_their_upload_are_dropped_and_the_log_names_them(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    machine = with_blocked_upload(machines)
    for step in (2, 3, 4):
        machine.save(step)
    assert [key.step for key in machine.waiting()] == [4, 1]
    dropped = [record.getMessage() for record in caplog.records if "is not uploaded" in record.getMessage()]
    assert [text.split()[0] for text in dropped] == ["checkpoint-2", "checkpoint-3"]
    machines.gate.set()
    machine.wait()
    assert machines.committed() == [(1, 1), (1, 4)]


def test_law_4_the_best_checkpoint_is_never_dropped(machines: Machines) -> None:
    machine = with_blocked_upload(machines)
    machine.save(2, best=True)
    for step in (3, 4):
        machine.save(step)
    assert [key.step for key in machine.waiting()] == [4, 2, 1]
    machines.gate.set()
    machine.wait()
    assert machines.committed() == [(1, 1), (1, 2), (1, 4)]
    assert machines.catalog.pointer("best") == CheckpointKey(1, 2)


def test_law_4_entries_of_an_earlier_attempt_are_not_dropped_for_newer_ones(
    machines: Machines, killed: Path
) -> None:
    machine = machines.new("killed", fresh=True)
    machines.storage.hold("upload", machines.gate, path="checkpoint-*")
    machine.checkpointer.begin(0)
    wait_until(lambda: machines.storage.count("upload", "checkpoint-*"), "the upload of the old entry")
    for step in (1, 2, 3):
        machine.save(step)
    assert [(key.attempt, key.step) for key in machine.waiting()] == [(2, 3), (1, 5)]
    machines.gate.set()
    machine.wait()
    assert machines.committed() == [(1, 5), (2, 3)]


@pytest.mark.parametrize("kind", ["upload", "create", "list"])
def test_law_4_a_bucket_that_is_missing_for_a_while_loses_nothing(machines: Machines, kind: str) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail(kind, ObjectNotFoundError("NoSuchBucket"), times=5)
    machine.save(5)
    machine.wait()
    assert machines.committed() == [(1, 5)]


def test_law_4_flush_deletes_no_entry_that_it_could_not_commit(machines: Machines, killed: Path) -> None:
    """An outbox that was copied to a different disk has different inodes; it may be the only copy."""
    [home] = (killed / "_cloudtrain/outbox").iterdir()
    model = home / "files/model.safetensors"
    data = model.read_bytes()
    model.unlink()
    write_files(home / "files", {"model.safetensors": data})

    flush(machines.catalog, machines.new("killed").checkpointer.outbox, Progress())
    still_there = [path.read_bytes() == data for path in killed.glob("_cloudtrain/**/model.safetensors")]
    assert machines.committed() == [(1, 5)] or any(still_there)


def test_law_4_a_flush_during_training_destroys_no_running_save(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = machines.new()
    machine.start()
    rename = os.rename

    def rename_after_a_flush(source: str, target: str) -> None:
        """The user runs `cloudtrain checkpoint flush` just before the save moves its folder into the outbox."""
        monkeypatch.setattr(os, "rename", rename)
        flush(machines.catalog, machine.checkpointer.outbox, Progress())
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_after_a_flush)
    machine.save(5)
    machine.wait()
    assert machines.committed() == [(1, 5)]


def test_law_4_an_entry_that_a_different_process_flushed_is_not_reported_as_lost(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.fail("upload", path="*/model.safetensors", times=6)  # all retries of one try
    upload_queue = machine.checkpointer.upload_queue
    put_back = upload_queue._put_back

    def put_back_after_a_flush(*args: object) -> None:
        flush(machines.catalog, machine.checkpointer.outbox, Progress())
        put_back(*args)

    upload_queue._put_back = put_back_after_a_flush
    machine.save(5)
    machine.wait()
    assert machines.committed() == [(1, 5)]
    assert "lost" not in caplog.text
