"""A run on a disk that is really full at the wrong moments: what the child process does. No torch, so it starts fast."""

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
    """The error is the framework's own; what it leaves is no checkpoint."""
    with full(disk, left=2**19):
        said = refused(lambda: machine.save(10))
    assert "No space left" in said, said
    machine.rotate(10)
    assert machine.checkpointer.last_saved.step == 5


def during_a_snapshot(machine: Machine, disk: Path) -> None:
    """Links need little, copies of small files need some. Training goes on, and its end says so."""
    machine.save(10)  # the folder is there ...
    machine.wait()
    retire(machine.checkpointer.catalog, machine.checkpointer.last_saved)
    machine.rotate(10)
    begun = machine.checkpointer.outbox.accept

    def accept(*arguments: object, **options: object) -> object:
        with full(disk):  # ... and then, when it is taken over, the space is not
            return begun(*arguments, **options)

    machine.checkpointer.outbox.accept = accept
    machine.save(15)
    machine.checkpointer.outbox.accept = begun
    said = refused(machine.wait)
    assert "is not on" in said, said
    assert "No space left" in said, said
    assert left_overs(machine.output_dir) == [], "what was begun is no more"


def during_a_copy(machine: Machine, disk: Path) -> None:
    """`upload_checkpoint` copies all of it."""
    from hf_cloudtrain.checkpoints.manifest import Position
    from tests.faults.runs import entry_of

    source = machine.output_dir / "checkpoint-15"
    entry = entry_of(machine.checkpointer.storage.url, 1, 15)
    assert Position(global_step=15) == entry.position
    with full(disk, left=2**19):
        said = refused(lambda: machine.checkpointer.outbox.accept(source, entry, link=False))
    assert "are free. Free some space" in said, said
    assert left_overs(machine.output_dir) == []
    machine.rotate(15)


def during_a_restore(machines: Machines, disk: Path) -> None:
    elsewhere = machines.new("elsewhere")
    said = refused(elsewhere.start)
    assert " are free. Free some space" in said, said  # it looks before the first byte
    download.SPARE_SPACE = -SIZE  # the space goes away after the look
    with full(disk, left=2**20):
        said = refused(elsewhere.start)
    assert "no space is left on the disk" in said, said
    assert not list(elsewhere.output_dir.glob("checkpoint-*"))
    assert elsewhere.start() == 20
    assert contents(elsewhere.output_dir / "checkpoint-20") == bytes_of(20)
    elsewhere.stop()


def on_a_read_only_disk(machines: Machines, disk: Path) -> None:
    make_read_only(disk)
    said = refused(machines.new("elsewhere").start)
    assert "cannot be written to (Read-only file system). Choose a different one." in said, said


def refused(call: object) -> str:
    try:
        call()  # type: ignore[operator]
    except (OSError, CloudTrainError) as error:
        return str(error)
    raise AssertionError("nothing was said")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
