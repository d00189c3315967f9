"""Emptying an outbox, in the background or in the foreground."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints import flush as module
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.flush import flush
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.checkpoints.retention import Policy, Retention
from hf_cloudtrain.checkpoints.upload_queue import UploadQueue
from hf_cloudtrain.checkpoints.upload_status import UploadStatus
from hf_cloudtrain.errors import NotCommittedError
from hf_cloudtrain.runtime.progress import Progress
from hf_cloudtrain.testing import FaultyStorage
from tests.faults.runs import (
    DEADLINE,
    Machines,
    bytes_of,
    entry_of,
    wait_until,
    write_checkpoint,
    write_files,
)


class Disk:
    """An outbox, its storage, and upload queues that end with the test."""

    def __init__(self, folder: Path, machines: Machines) -> None:
        self.storage: FaultyStorage = machines.storage
        self.catalog = Catalog(machines.storage)
        self.outbox = Outbox(folder)
        self.gate = machines.gate
        self.upload_queues: list[UploadQueue] = []

    def entry(self, step: int, attempt: int = 1, **options: object) -> OutboxEntry:
        folder = write_checkpoint(self.outbox.output_dir, step)
        return self.outbox.accept(folder, entry_of(self.storage.url, attempt, step, **options))

    def upload_queue(self) -> UploadQueue:
        self.upload_queues.append(UploadQueue(self.catalog, self.outbox, UploadStatus()))
        self.upload_queues[-1].start()
        return self.upload_queues[-1]

    def commits(self) -> list[str]:
        """Names of the manifests that were created, in that order."""
        return [
            call.path.rpartition("/")[2].removesuffix(".json")
            for call in self.storage.calls
            if call.kind == "create" and "/checkpoints/" in call.path
        ]


@pytest.fixture
def disk(tmp_path: Path, machines: Machines) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", machines)
    yield made
    made.gate.set()
    made.storage.heal()
    for upload_queue in made.upload_queues:
        upload_queue.close()
        upload_queue._thread.join(DEADLINE)
        assert not upload_queue._thread.is_alive()


def test_entries_from_before_are_uploaded_newest_first(disk: Disk) -> None:
    for attempt, step in ((1, 900), (2, 5), (2, 10)):
        disk.entry(step, attempt)
    disk.upload_queue().wait(DEADLINE)
    assert disk.commits() == ["000002-0000000010", "000002-0000000005", "000001-0000000900"]
    assert disk.outbox.entries() == []


def test_the_newest_entry_follows_the_one_under_way(disk: Disk) -> None:
    upload_queue = disk.upload_queue()
    disk.storage.hold("upload", disk.gate)
    upload_queue.submit(disk.entry(1))
    wait_until(lambda: disk.storage.count("upload"), "the first upload")
    upload_queue.submit(disk.entry(2, best=True))
    upload_queue.submit(disk.entry(3))
    assert [entry.key.step for entry in upload_queue.pending()] == [3, 2, 1]
    disk.gate.set()
    upload_queue.wait(DEADLINE)
    assert disk.commits() == ["000001-0000000001", "000001-0000000003", "000001-0000000002"]


def test_the_thread_rests_after_the_end_of_an_attempt_until_there_is_work_again(disk: Disk) -> None:
    upload_queue = disk.upload_queue()
    upload_queue.follow(Ownership(disk.catalog, disk.catalog.attempts.begin(0.0, 0, None, {})))
    disk.storage.hold("upload", disk.gate)
    upload_queue.submit(disk.entry(1))
    upload_queue.follow(None)
    first = upload_queue._thread
    assert first.is_alive(), "it has work"
    disk.gate.set()
    first.join(DEADLINE)
    assert not first.is_alive()
    for step in (2, 3):
        upload_queue.submit(disk.entry(step))
        upload_queue.wait(DEADLINE)
        upload_queue._thread.join(DEADLINE)
    assert disk.commits() == [f"000001-000000000{step}" for step in (1, 2, 3)]


def test_a_thread_that_cannot_be_started_is_started_with_the_next_entry(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_queue = disk.upload_queue()
    upload_queue.follow(None)
    upload_queue._thread.join(DEADLINE)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            upload_queue.submit(disk.entry(1))
    upload_queue.submit(disk.entry(2))
    upload_queue.wait(DEADLINE)
    assert disk.commits() == ["000001-0000000002", "000001-0000000001"]


def steps_waiting(upload_queue: UploadQueue) -> list[tuple[int, int]]:
    return [(entry.key.attempt, entry.key.step) for entry in upload_queue.pending()]


def test_at_most_two_entries_wait_and_the_older_is_dropped(disk: Disk) -> None:
    upload_queue = UploadQueue(disk.catalog, disk.outbox, UploadStatus())  # not started: nothing is under way
    seen = []
    for step in (1, 2, 3):
        upload_queue.submit(disk.entry(step))
        seen.append(steps_waiting(upload_queue))
    assert seen == [[(1, 1)], [(1, 2), (1, 1)], [(1, 3), (1, 2)]]
    wait_until(
        lambda: [entry.key.step for entry in disk.outbox.entries()] == [3, 2], "the removal of the first"
    )


def test_a_save_does_not_wait_for_the_removal_of_one_that_it_replaces(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed, remove, may_remove = list[OutboxEntry](), disk.outbox.remove, threading.Event()

    def late(entry: OutboxEntry) -> None:
        assert may_remove.wait(DEADLINE)
        remove(entry)
        removed.append(entry)

    monkeypatch.setattr(disk.outbox, "remove", late)
    upload_queue = UploadQueue(disk.catalog, disk.outbox, UploadStatus())
    entries = [disk.entry(step) for step in (1, 2, 3)]
    for entry in entries:
        upload_queue.submit(entry)
    assert not removed
    may_remove.set()
    upload_queue._dropping.settle(DEADLINE)
    assert removed == entries[:1]


def test_entries_of_an_earlier_attempt_are_never_dropped(disk: Disk) -> None:
    upload_queue = UploadQueue(disk.catalog, disk.outbox, UploadStatus())
    for attempt, step in ((1, 5), (2, 1), (2, 2), (2, 3)):
        upload_queue.submit(disk.entry(step, attempt))
    assert steps_waiting(upload_queue) == [(2, 3), (2, 2), (1, 5)]


def test_the_newest_committed_checkpoint_is_known(disk: Disk) -> None:
    upload_queue = disk.upload_queue()
    assert upload_queue.uploads.last_committed is None
    for step in (10, 5):
        upload_queue.submit(disk.entry(step))
        upload_queue.wait(DEADLINE)
    assert upload_queue.uploads.last_committed == CheckpointKey(1, 10)


def test_a_named_folder_does_not_count_as_a_committed_checkpoint(disk: Disk) -> None:
    """It carries the step of the last save, which may not be uploaded yet."""
    upload_queue = disk.upload_queue()
    upload_queue.submit(disk.entry(5, name="final"))
    upload_queue.wait(DEADLINE)
    assert NamedFolders(disk.catalog).keys() == ["final-000001"]
    assert upload_queue.uploads.last_committed is None


def test_a_named_folder_keeps_its_version_after_a_failed_try(disk: Disk) -> None:
    upload_queue = disk.upload_queue()
    disk.storage.fail("upload", times=12)
    upload_queue.submit(disk.entry(5, name="final"))
    upload_queue.wait(DEADLINE)
    assert NamedFolders(disk.catalog).keys() == ["final-000001"]
    assert NamedFolders(disk.catalog).read("final-000001").folder == "final"


def test_bytes_are_counted_once_even_when_tries_fail(disk: Disk) -> None:
    upload_queue = disk.upload_queue()
    disk.storage.lose_answer("upload", times=3)
    entry = disk.entry(5)
    upload_queue.submit(entry)
    upload_queue.wait(DEADLINE)
    assert (upload_queue.progress.done, upload_queue.progress.total) == (entry.size, entry.size)
    assert upload_queue.progress.title == "Uploading checkpoint-5"


def test_a_long_outage_is_warned_about_once(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    upload_queue = disk.upload_queue()
    disk.storage.fail("create", path="*/claims/*", times=6 * 4)
    upload_queue.submit(disk.entry(5))
    upload_queue.wait(DEADLINE)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "The upload of checkpoint-5 failed and will be tried again; training continues" in warnings[0]
    assert upload_queue.last_error is None


def test_an_unexpected_error_does_not_end_the_thread(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = disk.catalog.claim
    surprises = [ZeroDivisionError("surprise"), RecursionError("surprise")]

    def surprising(*args: object, **options: object) -> object:
        if surprises:
            raise surprises.pop()
        return claim(*args, **options)

    monkeypatch.setattr(disk.catalog, "claim", surprising)
    upload_queue = disk.upload_queue()
    upload_queue.submit(disk.entry(5))
    upload_queue.wait(DEADLINE)
    assert disk.commits() == ["000001-0000000005"]


def test_wait_returns_if_nothing_is_pending(disk: Disk) -> None:
    disk.upload_queue().wait(0.0)


def test_a_closed_queue_keeps_entries_that_it_has_not_begun(disk: Disk) -> None:
    upload_queue = disk.upload_queue()
    disk.storage.hold("upload", disk.gate)
    upload_queue.submit(disk.entry(1))
    wait_until(lambda: disk.storage.count("upload"), "the first upload")
    upload_queue.submit(disk.entry(2))
    upload_queue.close()
    disk.gate.set()
    upload_queue._thread.join(DEADLINE)
    assert [entry.key.step for entry in disk.outbox.entries()] == [2]
    assert disk.commits() == ["000001-0000000001"], "the one under way is finished"
    with pytest.raises(NotCommittedError, match=r"checkpoint-2 \(attempt 1\)"):
        upload_queue.wait(DEADLINE)


def test_a_host_that_is_not_the_last_uploads_its_part_and_does_not_commit(disk: Disk) -> None:
    upload_queue = disk.upload_queue()
    upload_queue.submit(disk.entry(5, host=1, hosts=2))
    upload_queue.wait(DEADLINE)
    assert disk.catalog.checkpoints() == []
    assert upload_queue.uploads.last_committed is None
    assert disk.outbox.entries() == [], "its part is on storage"


def test_the_host_that_completes_the_set_commits_the_files_of_all_hosts(disk: Disk, tmp_path: Path) -> None:
    upload_queue = disk.upload_queue()
    upload_queue.submit(disk.entry(5, host=1, hosts=2))
    upload_queue.wait(DEADLINE)

    other = Outbox(tmp_path / "other host")
    write_files(other.output_dir / "checkpoint-5", {"rng_state_0.pth": b"0"})
    other.accept(other.output_dir / "checkpoint-5", entry_of(disk.storage.url, 1, 5, host=0, hosts=2))
    flush(disk.catalog, other, Progress())
    manifest = disk.catalog.read(CheckpointKey(1, 5))
    assert {file.path for file in manifest.files} == {*bytes_of(5), "rng_state_0.pth"}


def test_the_manifest_has_the_values_of_the_entry(disk: Disk) -> None:
    entry = disk.entry(
        5, exact=False, inexact_reason="why", created=7.0, metrics={"loss": 0.5}, origin={"host": "a"}
    )
    flush(disk.catalog, disk.outbox, Progress())
    manifest = disk.catalog.read(CheckpointKey(1, 5))
    for name in ("nonce", "position", "exact", "inexact_reason", "created", "metrics", "origin"):
        assert getattr(manifest, name) == getattr(entry, name)


def test_the_pointers_follow_a_commit(disk: Disk) -> None:
    disk.catalog.attempts.begin(0.0, 0, None, {})
    disk.entry(5, best=True, metrics={"best_metric": 0.9})
    flush(disk.catalog, disk.outbox, Progress())
    disk.entry(10)
    flush(disk.catalog, disk.outbox, Progress())
    assert disk.catalog.pointer("best") == CheckpointKey(1, 5)
    assert disk.catalog.pointer("last") == CheckpointKey(1, 10)


def test_a_flush_commits_only_the_entries_of_its_run(disk: Disk) -> None:
    disk.entry(5)
    folder = write_checkpoint(disk.outbox.output_dir, 7)
    other = disk.outbox.accept(folder, entry_of("file:///another/run", 1, 7))
    assert [entry.key.step for entry in flush(disk.catalog, disk.outbox, Progress())] == [5]
    assert disk.outbox.entries() == [other]


def test_two_flushes_at_once_are_an_error(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_PATIENCE", 0.0)
    disk.entry(5)
    with (
        disk.outbox.lock(),
        pytest.raises(NotCommittedError, match=r"Another process is uploading from .*outbox"),
    ):
        flush(disk.catalog, disk.outbox, Progress())
    assert len(disk.outbox.entries()) == 1


def test_the_queue_waits_for_the_lock_of_another_process(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    upload_queue = disk.upload_queue()
    with disk.outbox.lock():
        upload_queue.submit(disk.entry(5))
        wait_until(lambda: upload_queue._current is None and upload_queue._waiting, "it is put back")
        assert disk.storage.count("upload") == 0
    upload_queue.wait(DEADLINE)
    assert disk.commits() == ["000001-0000000005"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def entry_without_its_bytes(disk: Disk) -> OutboxEntry:
    entry = disk.entry(5)
    (entry.home / "files/model.safetensors").unlink()
    return entry


def test_a_flush_continues_after_an_entry_whose_files_are_gone(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    entry_without_its_bytes(disk)
    disk.entry(3)
    assert [entry.key.step for entry in flush(disk.catalog, disk.outbox, Progress())] == [3]
    assert disk.catalog.checkpoints() == [CheckpointKey(1, 3)]
    assert "'model.safetensors' of checkpoint-5" in caplog.text


def test_the_queue_continues_after_an_entry_whose_files_are_gone_with_an_error_in_the_log(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    upload_queue = disk.upload_queue()
    upload_queue.submit(entry_without_its_bytes(disk))
    upload_queue.wait(DEADLINE)
    assert "checkpoint-5 cannot be committed" in caplog.text
    upload_queue.submit(disk.entry(6))
    upload_queue.wait(DEADLINE)
    assert disk.catalog.checkpoints() == [CheckpointKey(1, 6)]


def test_the_best_checkpoint_stays_although_the_host_that_commits_it_has_not_moved_the_pointer(
    disk: Disk,
) -> None:
    first = disk.catalog.attempts.begin(0.0, 0, None, {})
    upload_queue = UploadQueue(
        disk.catalog, disk.outbox, UploadStatus(), retention=Retention(disk.catalog, Policy(1), first)
    )
    disk.upload_queues.append(upload_queue)
    upload_queue.start()
    best = disk.entry(5, host=0, hosts=2, best=True)
    upload_queue.submit(best)
    upload_queue.wait(DEADLINE)
    files = HostParts(disk.catalog, best.key, best.nonce, save=1, hosts=2)._files(0)
    manifest = Manifest(str(best.key), "checkpoint-5", 1, 5, best.nonce, tuple(files), best.position)
    disk.catalog.commit(manifest)
    for step in (10, 15):
        upload_queue.submit(disk.entry(step))
        upload_queue.wait(DEADLINE)
        upload_queue._retention.settle(DEADLINE)
    assert disk.catalog.checkpoints() == [best.key, CheckpointKey(1, 15)]


@pytest.mark.parametrize("broken", ["current", "set_aside"])
def test_the_queue_survives_an_error_while_it_handles_an_error(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """Nothing is lost either: the entry is tried again."""
    lost = disk.entry(5)
    (lost.home / "files" / lost.files[0].path).write_bytes(b"rewritten")

    def breaks(*_: object) -> None:
        raise KeyError("unexpected")

    monkeypatch.setattr(disk.outbox, broken, breaks)
    queue = disk.upload_queue()
    wait_until(lambda: "KeyError" in caplog.text, "the warning")
    monkeypatch.undo()
    queue.submit(disk.entry(6))
    wait_until(lambda: "000001-0000000006" in disk.commits(), "the commit of the next one")
    assert (
        sum("The upload queue met an unexpected error" in record.getMessage() for record in caplog.records)
        == 1
    )
