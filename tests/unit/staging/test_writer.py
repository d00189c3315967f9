"""What the writer does with a job, and when it notices that its training has ended. It runs in the test's own process."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.errors import StorageUnavailableError
from hf_cloudtrain.staging import writer as writer_module
from hf_cloudtrain.staging.job import StagedFile, WriteJob
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.writer import Writer, upload, write
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.testing import FaultyDisk
from tests.faults.runs import bytes_of, contents, entry_of, write_files
from tests.faults.staged import MODEL, staged_bytes

SAVING = "_cloudtrain/saving/checkpoint-5-x"


@pytest.fixture
def memory() -> Iterator[StagingMemory]:
    memory = StagingMemory(2**22)
    yield memory
    memory.close()


@pytest.fixture
def job(memory: StagingMemory, tmp_path: Path) -> WriteJob:
    """Step 5 as a training hands it over."""
    files = bytes_of(5)
    data = files.pop(MODEL)
    offset = memory.put(data)
    assert offset is not None
    folder = tmp_path / "out" / SAVING
    write_files(folder, files)
    url = f"file://{tmp_path}/run"
    return WriteJob(
        output_dir=str(tmp_path / "out"),
        folder=str(folder),
        target=str(tmp_path / "out/checkpoint-5"),
        inode=folder.stat().st_ino,
        files=[
            StagedFile(
                MODEL, "safetensors", [("a", "U8", [len(data)], offset, len(data))], {"metadata": None}
            )
        ],
        entry=entry_of(url, 1, 5).encode().decode(),
        connection=(url, {}),
    )


def test_a_job_may_be_written_again_at_any_time(job: WriteJob, memory: StagingMemory) -> None:
    """A writer that was killed after the rename, or before it, is followed by a new one."""
    for _ in range(3):
        result = write(job, memory)
        assert result == {"done": str(Path(job.output_dir, "_cloudtrain/outbox/000001-0000000005"))}
        assert contents(Path(job.target)) == staged_bytes(5)
        assert contents(Path(result["done"], "files")) == staged_bytes(5)
    os.rename(job.target, job.folder)
    write(job, memory)
    assert contents(Path(job.target)) == staged_bytes(5)


def test_a_folder_that_was_removed_meanwhile_is_an_error_and_never_a_partial_checkpoint(
    job: WriteJob, memory: StagingMemory
) -> None:
    other = Path(job.folder).with_name("other")
    write_files(other, {"config.json": b"{}"})
    write_files(Path(job.target), {"config.json": b"{}"})  # an older one of this name
    shutil.rmtree(job.folder)
    for there in (False, True):
        if there:
            os.rename(other, job.folder)  # it is not the same folder
        with pytest.raises(FileNotFoundError, match="removed while it was written"):
            write(job, memory)
        assert Outbox(Path(job.output_dir)).entries() == []
    assert list(contents(Path(job.target))) == ["config.json"]


def test_a_full_disk_leaves_nothing_of_the_save(job: WriteJob, memory: StagingMemory) -> None:
    """The training may be gone; the next one needs the room."""
    with (
        FaultyDisk(Path(job.output_dir, "_cloudtrain/outbox")),
        pytest.raises(OSError, match="No space left"),
    ):
        write(job, memory)
    assert contents(Path(job.output_dir)) == {}


def test_an_older_checkpoint_of_the_name_is_replaced_and_others_are_deleted(
    job: WriteJob, memory: StagingMemory
) -> None:
    older = Path(job.output_dir, "checkpoint-1")
    for folder in (older, Path(job.target)):
        write_files(folder, {"config.json": b"old"})
    write(replace(job, delete=[str(older), str(older.with_name("gone"))]), memory)
    assert contents(Path(job.target)) == staged_bytes(5)
    assert not older.exists()
    assert os.listdir(Path(job.folder).parent) == []


def test_a_checkpoint_is_never_half_deleted_under_its_name(
    job: WriteJob, memory: StagingMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = Path(job.output_dir, "checkpoint-1")
    write_files(older, {"config.json": b"old"})
    deleted = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: deleted.append(Path(path).name))
    write(replace(job, delete=[str(older)]), memory)
    assert not older.exists()
    assert [
        name.partition("-")[0] for name in deleted if "outbox" not in name and not name.startswith(".")
    ] == ["gone"]


def test_a_save_that_cannot_be_renamed_is_kept_for_upload_and_said(
    job: WriteJob, memory: StagingMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def refuse(source: str | Path, target: str | Path) -> None:
        if str(target) == job.target:
            raise OSError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    result = write(job, memory)
    assert "checkpoint-5 is kept for upload" in result["trouble"]
    assert contents(Path(result["done"], "files")) == staged_bytes(5)


def test_the_job_of_a_training_that_is_gone_is_written_and_uploaded(
    job: WriteJob, memory: StagingMemory, caplog: pytest.LogCaptureFixture
) -> None:
    """It was killed before it had read what it was told: the job is still in the socket, and then comes a reset."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b'{"done": "an earlier one"}\n')
    data = job.encode()
    memory.put_job(data)
    ours.sendall(json.dumps({"size": len(data)}).encode() + b"\n")
    ours.close()
    Writer(theirs, memory, os.getppid()).work()
    theirs.close()
    assert Catalog(Storage(job.connection[0] if job.connection else "")).checkpoints() == [
        CheckpointKey(1, 5)
    ]
    assert "The training was killed; committed: checkpoint-5." in caplog.text
    assert Outbox(Path(job.output_dir)).entries() == []


def test_the_end_of_the_training_is_noticed_although_a_fork_holds_the_socket(
    memory: StagingMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "LOOK", 0.01)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Writer(theirs, memory, training=1 if os.getppid() != 1 else 2).work()


def test_a_training_with_many_open_files_has_a_writer(memory: StagingMemory) -> None:
    """Its end of the socket has the number that it has in the training."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, limits[1]))
    try:
        ours, theirs = socket.socketpair()
        with theirs, socket.socket(fileno=fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 2000)) as high:
            ours.close()
            Writer(high, memory, os.getppid()).work()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_description_that_cannot_be_read_is_a_failed_save(memory: StagingMemory) -> None:
    ours, theirs = socket.socketpair()
    memory.put_job(b"nonsense")
    with theirs:
        ours.sendall(b'{"size": 8}\n')
        ours.shutdown(socket.SHUT_WR)
        Writer(theirs, memory, os.getppid()).work()
    with ours, ours.makefile() as lines:
        assert "JSONDecodeError" in json.loads(lines.readline())["failed"]


def test_the_upload_is_tried_again_until_the_storage_answers(
    job: WriteJob, memory: StagingMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(job, memory)
    failures = [StorageUnavailableError("the network is down")] * 2

    def fail(*_: object) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(Storage, "check", fail)
    monkeypatch.setattr(writer_module, "PAUSES", (0.0,))
    assert job.connection is not None
    upload(Path(job.output_dir), *job.connection)
    assert caplog.text.count("the network is down") == 2
    assert Catalog(Storage(job.connection[0])).checkpoints() == [CheckpointKey(1, 5)]


def test_the_upload_is_given_up_when_the_end_of_a_training_would_be(
    job: WriteJob, memory: StagingMemory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(job, memory)

    def fail(*_: object) -> None:
        raise StorageUnavailableError("the network is down")

    monkeypatch.setattr(Storage, "check", fail)
    monkeypatch.setattr(env, "drain_timeout", lambda: 1.0)
    caplog.set_level(logging.WARNING)
    assert job.connection is not None
    upload(Path(job.output_dir), *job.connection)
    assert caplog.text.count("the network is down") == 1, "the next try would come after 5 s"
    assert [entry.title for entry in Outbox(Path(job.output_dir)).entries()] == ["checkpoint-5"]
