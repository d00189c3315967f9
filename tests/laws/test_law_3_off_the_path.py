"""Law 3, Off the path: the step loop never waits for the network; a save makes links, small copies and one rename."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from hf_cloudtrain.checkpoints import frozen
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.testing import CrashPoint
from tests.faults.runs import DEADLINE, Machines, bytes_of, wait_until, write_checkpoint, write_files

if TYPE_CHECKING:
    import pytest


def in_time(work: object) -> None:
    """Run `work`, which must not wait for the storage; fail if it is still running after DEADLINE seconds."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive(), "the call waits for the storage"


def test_law_3_a_save_does_not_wait_for_storage_that_hangs(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.hold("any", machines.gate)
    in_time(lambda: machine.save(5))
    wait_until(lambda: machine.checkpointer.upload_queue._current, "the upload of the first")
    in_time(lambda: machine.save(10))
    assert [key.step for key in machine.waiting()] == [10, 5]
    machines.gate.set()
    machine.wait()
    assert machines.committed() == [(1, 5), (1, 10)]


def test_law_3_a_save_makes_no_request_on_the_training_thread(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    threads = set()
    request = machines.storage._request

    def recorded(kind: str, path: str) -> object:
        threads.add(threading.current_thread())
        return request(kind, path)

    machines.storage._request = recorded
    machine.save(5)
    wait_until(lambda: not machine.checkpointer.upload_queue.pending(), "the upload")
    assert threads, "the upload must make requests"
    assert threading.main_thread() not in threads


def test_law_3_large_files_are_linked_and_small_ones_copied(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.hold("upload", machines.gate)
    folder = machine.save(5)
    kept = machine.checkpointer.outbox.entries()[0].home / "files"
    same = {
        path: os.path.samefile(folder / path, kept / path)
        for path in ("model.safetensors", "trainer_state.json", "state/rng_state_0.pth", "empty")
    }
    assert same == {
        "model.safetensors": True,
        "trainer_state.json": False,  # frameworks rewrite these in place
        "state/rng_state_0.pth": False,
        "empty": False,
    }
    machines.gate.set()
    machine.wait()


def test_law_3_a_save_makes_links_small_copies_and_one_rename(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    machines.storage.hold("any", machines.gate)
    write_checkpoint(machine.output_dir, 5)
    with CrashPoint(below=machine.output_dir) as disk:
        machine.save(5)
    ours = [event for event in disk.seen if event in ("os.link", "os.rename")]
    assert ours == ["os.link", "os.rename"]
    small = len(bytes_of(5)) - 1
    written_by_the_framework = len(bytes_of(5))
    record_and_lock = 2
    assert disk.seen.count("open") <= written_by_the_framework + small + record_and_lock


def test_law_3_the_total_size_of_the_copies_of_a_save_is_bounded(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "SMALL_TOTAL", 3_000)
    machine = machines.new()
    machine.start()
    machines.storage.hold("upload", machines.gate)
    write_files(machine.output_dir / "checkpoint-5", {f"{number}.json": b"x" * 1_000 for number in range(9)})
    machine.save(5)
    entry = machine.checkpointer.outbox.entries()[0]
    copied = [
        file.size
        for file in entry.files
        if not os.path.samefile(entry.local_path(file), machine.output_dir / "checkpoint-5" / file.path)
    ]
    assert sum(copied) <= 3_000
    assert len(entry.files) == 9 + len(bytes_of(5))
    assert frozen.SMALL_FILE == 2**20, "the bound that the law names"


def test_law_3_files_older_than_a_save_do_not_belong_to_it(machines: Machines) -> None:
    machine = machines.new()
    machine.start()
    write_files(machine.output_dir / "checkpoint-5", {"rng_state_3.pth": b"of more ranks"})
    os.utime(machine.output_dir / "checkpoint-5/rng_state_3.pth", (1, 1))
    since_ns = machine.checkpointer.local.mark_save_begin()
    machine.save(5, since_ns=since_ns)
    machine.wait()
    assert machines.restored("elsewhere") == bytes_of(5)


def test_law_3_a_save_without_files_is_reported_and_training_continues(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    machine = machines.new()
    machine.start()
    (machine.output_dir / "checkpoint-5").mkdir()
    machine.checkpointer.save(machine.output_dir / "checkpoint-5", Position(global_step=5))
    assert "checkpoint-5 could not be kept for upload" in caplog.text
    machine.save(10)
    machine.wait()
    assert machines.committed() == [(1, 10)]
