"""The machine goes down before the disk has all that was accepted: nothing is committed that is not what was saved."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints import frozen
from hf_cloudtrain.checkpoints.manifest import Position
from tests.faults.runs import Machine, Machines, bytes_of, contents, wait_until


def cut(size: int) -> Callable[[Path], None]:
    """Blocks that were not written are not in the file, though a journal may have its time."""

    def damage(path: Path) -> None:
        before = os.stat(path)
        os.truncate(path, size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return damage


def lose_blocks(path: Path) -> None:
    """safetensors sets the size first; then the journal has size and time, and the disk none of the blocks."""
    before = os.stat(path)
    os.truncate(path, 0)
    os.truncate(path, before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


MODEL, SMALL, ENTRY = "files/model.safetensors", "files/trainer_state.json", "entry.json"

LOSSES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a file is empty": (MODEL, cut(0)),
    "a file is shorter": (MODEL, cut(2**20)),
    "a small file is empty": (SMALL, cut(0)),
    "a file has its size and no content": (MODEL, lose_blocks),
    "a small file has its size and no content": (SMALL, lose_blocks),
    "a file is not there": (MODEL, os.unlink),
    "the entry is empty": (ENTRY, cut(0)),
    "the entry is cut": (ENTRY, cut(100)),
    "the entry is zeros": (ENTRY, lose_blocks),
    "the entry is not there": (ENTRY, os.unlink),
}


@pytest.fixture
def home(machines: Machines) -> Path:
    """The entry of step 10, accepted and not sent, of a machine that has committed step 5 and is down."""
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    machines.storage.fail("files", path="checkpoint-10/*", times=1_000_000)
    machine.save(10)
    wait_until(lambda: machine.checkpointer._upload_queue.last_error, "a failed try")
    machine.stop()
    machine.rotate(10)
    machines.storage.heal()
    [home] = (machine.output_dir / ".cloudtrain/outbox").glob("[!.]*")
    return home


def starts_again(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(frozen, "boot_id", lambda: "the next life of the machine")
    machine = machines.new()
    machine.begins_after = machine.start()  # type: ignore[attr-defined]
    return machine


@pytest.mark.parametrize("loss", LOSSES)
def test_what_did_not_reach_the_disk_is_not_committed_and_it_is_said(
    machines: Machines,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    loss: str,
) -> None:
    path, lose = LOSSES[loss]
    lose(home / path)
    machine = starts_again(machines, monkeypatch)
    assert machine.begins_after == 5
    assert machines.committed() == [(1, 5)]
    said = "cannot be committed" if path != ENTRY else "Cannot read"
    assert f"{said}" in caplog.text
    assert f"{home}" in caplog.text
    kept = list(machine.output_dir.rglob("state/rng_state_0.pth"))
    assert len(kept) >= 2, "what is left of it stays, for a person to look at"


def test_what_was_on_the_disk_in_time_is_committed_in_the_next_life(
    machines: Machines, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = starts_again(machines, monkeypatch)
    assert machine.begins_after == 10
    assert machines.restored("elsewhere") == bytes_of(10)
    assert contents(machine.output_dir / "checkpoint-10") == bytes_of(10)


def test_a_restored_folder_that_did_not_reach_the_disk_is_restored_again(
    machines: Machines, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in contents(machines.made[0].output_dir / "checkpoint-5"):
        lose_blocks(machines.made[0].output_dir / "checkpoint-5" / file)
    lose_blocks(home / MODEL)
    machine = starts_again(machines, monkeypatch)
    assert machine.begins_after == 5
    assert contents(machine.output_dir / "checkpoint-5") == bytes_of(5)


def test_a_file_with_holes_is_as_good_as_any_while_the_machine_lives(machines: Machines) -> None:
    """Only a power cut makes them suspicious: a file of the user's own may have some."""
    machine = machines.new()
    machine.start()
    folder = machine.output_dir / "checkpoint-5"
    folder.mkdir()
    with (folder / "sparse").open("wb") as file:
        file.truncate(2**21)
    machine.checkpointer.save(folder, Position(global_step=5))
    machine.wait()
    assert machines.committed() == [(1, 5)]
