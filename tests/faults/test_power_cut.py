"""The power fails before an accepted checkpoint is fully on the disk: a damaged checkpoint is never committed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints import frozen
from hf_cloudtrain.checkpoints.manifest import Position
from tests.faults.runs import Machine, Machines, bytes_of, contents, wait_until


def cut(size: int) -> Callable[[Path], None]:
    """The file lacks the blocks that were not written, although the journal has its times."""

    def damage(path: Path) -> None:
        before = os.stat(path)
        os.truncate(path, size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return damage


def lose_blocks(path: Path) -> None:
    """safetensors sets the size first, so the journal may have size and times while the disk has none of the blocks."""
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
    "a file is missing": (MODEL, os.unlink),
    "the entry is empty": (ENTRY, cut(0)),
    "the entry is truncated": (ENTRY, cut(100)),
    "the entry is zeros": (ENTRY, lose_blocks),
    "the entry is missing": (ENTRY, os.unlink),
}


@pytest.fixture
def home(machines: Machines) -> Path:
    """The outbox entry of step 10, accepted but not uploaded, on a stopped machine that has committed step 5."""
    machine = machines.new()
    machine.start()
    machine.save(5)
    machine.wait()
    machines.storage.fail("files", path="checkpoint-10/*", times=1_000_000)
    machine.save(10)
    wait_until(lambda: machine.checkpointer.upload_queue.last_error, "a failed try")
    machine.stop()
    machine.rotate(10)
    machines.storage.heal()
    [home] = (machine.output_dir / "_cloudtrain/outbox").glob("[!.]*")
    return home


def start_after_reboot(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(frozen, "boot_id", lambda: "a new boot id")
    machine = machines.new()
    machine.resumed_after = machine.start()  # type: ignore[attr-defined]
    return machine


@pytest.mark.parametrize("loss", LOSSES)
def test_an_entry_that_did_not_reach_the_disk_is_not_committed_and_is_reported(
    machines: Machines,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    loss: str,
) -> None:
    path, lose = LOSSES[loss]
    lose(home / path)
    machine = start_after_reboot(machines, monkeypatch)
    assert machine.resumed_after == 5
    assert machines.committed() == [(1, 5)]
    message = "cannot be committed" if path != ENTRY else "Cannot read"
    assert message in caplog.text
    assert str(home) in caplog.text
    kept = list(machine.output_dir.rglob("state/rng_state_0.pth"))
    assert len(kept) >= 2, "the remaining files are kept for the user to inspect"


def test_an_entry_that_reached_the_disk_is_committed_after_the_reboot(
    machines: Machines, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = start_after_reboot(machines, monkeypatch)
    assert machine.resumed_after == 10
    assert machines.restored("elsewhere") == bytes_of(10)
    assert contents(machine.output_dir / "checkpoint-10") == bytes_of(10)


def test_a_restored_folder_that_did_not_reach_the_disk_is_restored_again(
    machines: Machines, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in contents(machines.made[0].output_dir / "checkpoint-5"):
        lose_blocks(machines.made[0].output_dir / "checkpoint-5" / file)
    lose_blocks(home / MODEL)
    machine = start_after_reboot(machines, monkeypatch)
    assert machine.resumed_after == 5
    assert contents(machine.output_dir / "checkpoint-5") == bytes_of(5)


def test_a_file_with_holes_is_valid_unless_the_machine_rebooted(machines: Machines) -> None:
    """Holes are suspicious only after a power cut: a user's own file may be sparse."""
    machine = machines.new()
    machine.start()
    folder = machine.output_dir / "checkpoint-5"
    folder.mkdir()
    with (folder / "sparse").open("wb") as file:
        file.truncate(2**21)
    machine.checkpointer.save(folder, Position(global_step=5))
    machine.wait()
    assert machines.committed() == [(1, 5)]
