"""The child process of a run whose real disk is full at the worst moments. It imports no torch, so it starts fast."""

from __future__ import annotations

import sys
from pathlib import Path

from hf_cloudtrain.checkpoints import download, upload_queue
from hf_cloudtrain.checkpoints.deletion import retire
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime import threads
from hf_cloudtrain.storage import retries
from tests.faults.runs import Machine, Machines, bytes_of, contents, left_overs
from tests.faults.small_disk import full, make_read_only, mount_small_disk

SIZE = 6 * 2**20


def main(folder: Path) -> None:
    disk = folder / "disk"
    mount_small_disk(disk, SIZE)
    retries.PAUSES = (0.0,)
    upload_queue.PAUSES = (0.01,)
    threads.TURN = 0.01
    with Machines(folder) as machines:
        machines._folder = disk
        machine = machines.new("out")
        machine.start()
        machine.save(5)
        machine.wait()
        during_a_save_of_the_framework(machine, disk)
        during_a_snapshot(machine, disk)
        during_a_copy(machine, disk)
        machine.save(20)
        machine.wait()
        assert machines.committed() == [(1, 5), (1, 20)], machines.committed()
        for step in (5, 20):
            machine.rotate(step)
        during_a_restore(machines, disk)
        machine.stop()
        on_a_read_only_disk(machines, disk)


def during_a_save_of_the_framework(machine: Machine, disk: Path) -> None:
    """The framework raises the error; the partial folder that it leaves is not taken as a checkpoint."""
    with full(disk, left=2**19):
        message = error_of(lambda: machine.save(10))
    assert "No space left" in message, message
    machine.rotate(10)
    assert machine.checkpointer.last_saved.step == 5


def during_a_snapshot(machine: Machine, disk: Path) -> None:
    """Links need little space, copies of small files need some. Training continues, and its end reports the error."""
    machine.save(10)  # the folder is written ...
    machine.wait()
    retire(machine.checkpointer.catalog, machine.checkpointer.last_saved)
    machine.rotate(10)
    real_accept = machine.checkpointer.outbox.accept

    def accept(*arguments: object, **options: object) -> object:
        with full(disk):  # ... but the disk is full when the outbox accepts it
            return real_accept(*arguments, **options)

    machine.checkpointer.outbox.accept = accept
    machine.save(15)
    machine.checkpointer.outbox.accept = real_accept
    message = error_of(machine.wait)
    assert "is not on" in message, message
    assert "No space left" in message, message
    assert left_overs(machine.output_dir) == [], "the unfinished entry must be removed"


def during_a_copy(machine: Machine, disk: Path) -> None:
    """`upload_checkpoint` copies every file."""
    from hf_cloudtrain.checkpoints.manifest import Position
    from tests.faults.runs import entry_of

    source = machine.output_dir / "checkpoint-15"
    entry = entry_of(machine.checkpointer.storage.url, 1, 15)
    assert Position(global_step=15) == entry.position
    with full(disk, left=2**19):
        message = error_of(lambda: machine.checkpointer.outbox.accept(source, entry, link=False))
    assert "are free. Free some space" in message, message
    assert left_overs(machine.output_dir) == []
    machine.rotate(15)


def during_a_restore(machines: Machines, disk: Path) -> None:
    elsewhere = machines.new("elsewhere")
    message = error_of(elsewhere.start)
    assert " are free. Free some space" in message, message  # checked before the first byte
    download.SPARE_SPACE = -SIZE  # the space is used up after the check
    with full(disk, left=2**20):
        message = error_of(elsewhere.start)
    assert "no space is left on the disk" in message, message
    assert not list(elsewhere.output_dir.glob("checkpoint-*"))
    assert elsewhere.start() == 20
    assert contents(elsewhere.output_dir / "checkpoint-20") == bytes_of(20)
    elsewhere.stop()


def on_a_read_only_disk(machines: Machines, disk: Path) -> None:
    make_read_only(disk)
    message = error_of(machines.new("elsewhere").start)
    assert "cannot be written to (Read-only file system). Choose a different one." in message, message


def error_of(call: object) -> str:
    try:
        call()  # type: ignore[operator]
    except (OSError, CloudTrainError) as error:
        return str(error)
    raise AssertionError("no error was raised")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
