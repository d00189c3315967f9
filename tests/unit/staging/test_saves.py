"""Staged saves with a real writer process: what becomes of a folder, whatever fails."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.local_home import own_writers, wait_for_writer
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.errors import NotCommittedError
from hf_cloudtrain.staging import saves as saves_module
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.process import WriterProcess
from hf_cloudtrain.storage.names import LOCAL
from tests.faults.runs import Machines, contents, wait_until, write_files
from tests.faults.staged import (
    MODEL,
    StagedMachine,
    crash_at,
    stage,
    staged_bytes,
    wait_for_no_writer,
    whole_or_absent,
    writer_program,
)


@pytest.fixture(autouse=True)
def writers_start_fast() -> Iterator[None]:
    with writer_program():
        yield
    assert own_writers == {}
    wait_until(
        lambda: "cloudtrain-writer" not in {thread.name for thread in threading.enumerate()}, "the writers"
    )


@pytest.fixture
def machine(machines: Machines, tmp_path: Path) -> StagedMachine:
    machine = StagedMachine(tmp_path / "out", machines.storage.url)
    machines.made.append(machine)
    return machine


def test_a_staged_save_is_committed_and_has_its_name_once_it_is_whole(
    machine: StagedMachine, machines: Machines
) -> None:
    machine.start()
    writer = machine.saves.writer_pid
    folder = machine.save(5)
    machine.save(10, delete=(5,))
    machine.wait()
    assert contents(machine.output_dir / "checkpoint-10") == staged_bytes(10)
    assert not folder.exists(), "it was rotated away, after the newer one was whole"
    assert machines.committed() == [(1, 5), (1, 10)]
    assert machines.restored("elsewhere") == staged_bytes(10)
    assert not os.listdir(machine.output_dir / LOCAL / "saving")
    assert (machine.saves.staged, machine.saves.writer_pid) == (2, writer)
    machine.stop()
    assert writer is not None
    with pytest.raises(ProcessLookupError):
        os.kill(writer, 0)


def test_a_checkpoint_has_no_name_and_the_older_one_stays_until_the_writer_is_done(
    machine: StagedMachine,
) -> None:
    machine.start()
    machine.save(5)
    machine.saves.settle()
    os.kill(machine.saves.writer_pid or 0, signal.SIGSTOP)
    machine.save(10, delete=(5,))
    assert names(machine) == ["checkpoint-5"]
    assert not machine.saves._process.wait(0.05)
    with pytest.raises(NotCommittedError, match="in memory and not written"):
        machine.saves.settle(0.05)
    os.kill(machine.saves.writer_pid or 0, signal.SIGCONT)
    machine.saves.settle()
    assert names(machine) == ["checkpoint-10"]
    assert whole_or_absent(machine.output_dir) == []


def test_a_killed_writer_is_replaced_and_writes_the_save_again(
    machine: StagedMachine, machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    """As by the OOM killer."""
    machine.start()
    writer = machine.saves.writer_pid or 0
    os.kill(writer, signal.SIGSTOP)
    machine.save(5)
    os.kill(writer, signal.SIGKILL)
    machine.wait()
    assert machine.saves.writer_pid != writer
    assert "has ended unexpectedly (exit code -9). Its messages are in " in caplog.text
    assert whole_or_absent(machine.output_dir) == []
    assert machines.restored("elsewhere") == staged_bytes(5)


def test_a_writer_that_dies_between_two_saves_is_replaced_by_the_next(machine: StagedMachine) -> None:
    machine.start()
    machine.save(5)
    machine.saves.settle()
    os.kill(machine.saves.writer_pid or 0, signal.SIGKILL)
    wait_until(lambda: machine.saves.writer_pid is None, "the end of the writer")
    machine.save(10)
    machine.wait()
    assert contents(machine.output_dir / "checkpoint-10") == staged_bytes(10)


def test_a_save_over_which_every_writer_dies_is_lost_with_an_error_at_the_end(
    machine: StagedMachine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with writer_program(*crash_at(1, tmp_path / "out")):
        machine.start()
        machine.save(5)
        machine.saves.settle()
    assert "checkpoint-5 could not be kept for upload: 3 writer processes have ended over it" in caplog.text
    assert not os.listdir(machine.output_dir / LOCAL / "saving")
    with pytest.raises(NotCommittedError, match="3 writer processes"):
        machine.wait()
    machine.save(10)
    machine.wait()
    assert names(machine) == ["checkpoint-10"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_the_writer_loses_the_save_with_an_error_and_keeps_the_older_one(
    machine: StagedMachine, machines: Machines, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: int
) -> None:
    full = [
        "from hf_cloudtrain.testing import FaultyDisk",
        f"FaultyDisk({str(tmp_path / 'out' / LOCAL / 'outbox')!r}, {error}).__enter__()",
    ]
    with writer_program(*full):
        machine.start()
    write_files(machine.output_dir / "checkpoint-1", staged_bytes(1))
    machine.save(5, delete=(1,))
    machine.saves.settle()
    assert f"checkpoint-5 could not be kept for upload: OSError: [Errno {error}]" in caplog.text
    assert names(machine) == ["checkpoint-1"], "what the framework wanted to delete is all that is left"
    assert not os.listdir(machine.output_dir / LOCAL / "saving"), "the next save needs the room"
    with pytest.raises(NotCommittedError, match=os.strerror(error)):
        machine.wait()
    assert machines.committed() == []


def test_what_was_staged_and_not_saved_is_written_before_anything_else(machine: StagedMachine) -> None:
    """An exception between the framework's save and its event, which a script may catch."""
    machine.start()
    folder = machine.output_dir / "checkpoint-5"
    write_files(folder, {"config.json": b"{}"})
    write_files(machine.output_dir / "checkpoint-1", {"config.json": b"{}"})
    stage(machine.saves, folder, {MODEL: b"weights"})
    window = machine.saves._window
    assert window is not None
    window.deleted.append(str(machine.output_dir / "checkpoint-1"))
    machine.saves.open(machine.output_dir / "checkpoint-10")
    machine.saves.close()
    assert sorted(contents(folder)) == ["config.json", MODEL]
    assert names(machine) == ["checkpoint-5"]


@pytest.mark.parametrize("end", ["settle", "end"])
def test_what_was_staged_is_written_at_the_end(machine: StagedMachine, end: str) -> None:
    machine.start()
    folder = machine.output_dir / "checkpoint-5"
    folder.mkdir()
    stage(machine.saves, folder, {MODEL: b"weights"})
    getattr(machine.saves, end)()
    assert list(contents(folder)) == [MODEL]


def test_a_save_of_a_different_folder_is_written_at_once(machine: StagedMachine, machines: Machines) -> None:
    machine.start()
    other = machine.output_dir / "checkpoint-7"
    other.mkdir()
    stage(machine.saves, other, {MODEL: b"weights"})
    folder = machine.output_dir / "checkpoint-5"
    write_files(folder, {"config.json": b"{}"})
    machine.checkpointer.save(folder, Position(global_step=5))
    machine.wait()
    assert (list(contents(other)), list(contents(folder))) == ([MODEL], ["config.json"])
    assert machines.committed() == [(1, 5)]
    assert machine.saves.staged == 0


def test_a_save_that_cannot_be_handed_over_is_written_at_once(
    machine: StagedMachine,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine.start()

    def refuse(*_: object) -> None:
        raise ValueError("The description of a save has too many bytes.")

    monkeypatch.setattr(StagingMemory, "put_job", refuse)
    machine.save(5)
    machine.wait()
    assert "checkpoint-5 is written at once: The description of a save has too many bytes." in caplog.text
    assert whole_or_absent(machine.output_dir) == []
    assert machines.restored("elsewhere") == staged_bytes(5)
    assert machine.saves.staged == 0


def test_the_same_step_saved_twice_is_the_second(machine: StagedMachine, machines: Machines) -> None:
    machine.start()
    machine.save(5, salt="first")
    machine.saves.settle()
    machine.checkpointer.upload_queue._held = None  # whether the first is committed before, or replaced
    machine.save(5, salt="second")
    machine.saves.settle()
    assert contents(machine.output_dir / "checkpoint-5") in [
        staged_bytes(5, "first"),
        staged_bytes(5, "second"),
    ]
    machine.wait()
    assert [step for _, step in machines.committed()] == [5]


def test_two_trainings_of_one_process_have_a_writer_each(machines: Machines, tmp_path: Path) -> None:
    pair = [StagedMachine(tmp_path / name, f"file://{tmp_path}/run-{name}") for name in ("one", "two")]
    machines.made += pair
    for machine in pair:
        machine.start()
    for step in (5, 10):
        for machine in pair:
            machine.save(step)
    for machine in pair:
        machine.wait()
        assert contents(machine.output_dir / "checkpoint-10") == staged_bytes(10)


def test_a_new_training_in_the_same_folder_ends_the_writer_of_the_one_before(
    machine: StagedMachine, machines: Machines
) -> None:
    """A notebook, in which an exception has ended the training and not the process."""
    machine.start()
    machine.save(5)
    first, writer = machine.saves, machine.saves.writer_pid or 0
    assert machine.start() == 5
    assert machine.saves.writer_pid != writer
    with pytest.raises(ProcessLookupError):
        os.kill(writer, 0)
    first.open(machine.output_dir / "checkpoint-7")
    assert first._window is None, "it stages nothing more"
    machine.save(10)
    machine.wait()
    first.end()
    assert machines.committed() == [(1, 5), (2, 10)]


def test_a_begin_in_the_same_process_waits_for_the_save_and_moves_it_away(machine: StagedMachine) -> None:
    """It goes back to an earlier step: what was saved after that belongs to a different history."""
    machine.start()
    machine.save(5)
    machine.wait()
    os.kill(machine.saves.writer_pid or 0, signal.SIGSTOP)
    machine.save(10)
    resume = threading.Timer(0.2, os.kill, [machine.saves.writer_pid or 0, signal.SIGCONT])
    resume.start()
    machine.checkpointer.begin(5)
    assert names(machine) == ["checkpoint-5"]
    assert (machine.output_dir / LOCAL / "stale/checkpoint-10").exists()


def test_a_folder_whose_writer_still_works_for_a_different_training_is_refused(tmp_path: Path) -> None:
    memory = StagingMemory(2**20)
    first = WriterProcess(tmp_path, memory)
    with pytest.raises(BlockingIOError):
        WriterProcess(tmp_path, memory)
    first.end()
    WriterProcess(tmp_path, memory).end()
    memory.close()


def test_the_writer_of_a_different_process_that_trains_is_not_waited_for(tmp_path: Path) -> None:
    """A newer attempt has priority over it."""
    lock = tmp_path / LOCAL / "writer.lock"
    ready, stop = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        memory = StagingMemory(2**20)
        process = WriterProcess(tmp_path, memory)
        os.write(ready[1], b".")
        os.read(stop[0], 1)
        process.end()
        os._exit(0)
    os.read(ready[0], 1)
    (tmp_path / LOCAL / "saving/checkpoint-5").mkdir(parents=True)
    wait_for_writer(tmp_path)
    assert lock.exists()
    assert (tmp_path / LOCAL / "saving/checkpoint-5").exists(), "it is being written"
    with pytest.raises(BlockingIOError):
        WriterProcess(tmp_path, StagingMemory(2**20))
    os.write(stop[1], b".")
    os.waitpid(child, 0)
    wait_for_writer(tmp_path)
    assert not (tmp_path / LOCAL / "saving").exists()
    for fd in (*ready, *stop):
        os.close(fd)


def test_an_interrupted_end_leaves_the_save_to_the_writer(
    machine: StagedMachine,
    machines: Machines,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine.start()
    writer = machine.saves.writer_pid or 0
    os.kill(writer, signal.SIGSTOP)
    machine.save(5)

    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(saves_module.WriterProcess, "wait", interrupt)
    machine.saves.end()
    assert "The writer process goes on when this one ends, and uploads it" in caplog.text
    os.kill(writer, signal.SIGCONT)
    wait_for_no_writer(machine.output_dir)
    assert names(machine) == ["checkpoint-5"]
    assert whole_or_absent(machine.output_dir) == []
    assert machines.committed() == [(1, 5)]


def test_the_end_does_not_wait_again_for_what_was_given_up(
    machine: StagedMachine, machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine that is preempted: the deadline was over, and the writer uses what is left of its life."""
    machine.start()
    writer = machine.saves.writer_pid or 0
    os.kill(writer, signal.SIGSTOP)
    machine.save(5)
    with pytest.raises(NotCommittedError, match="in memory and not written"):
        machine.checkpointer.wait(0.1, in_time=True)
    machine.saves.end()  # it would take half an hour
    os.kill(writer, signal.SIGCONT)
    wait_for_no_writer(machine.output_dir)
    assert whole_or_absent(machine.output_dir) == []
    assert machines.committed() == [(1, 5)]


def test_the_memory_is_given_back_at_the_end(machine: StagedMachine) -> None:
    """A notebook keeps its trainer, and with it all that a training had."""
    machine.start()
    machine.save(5)
    memory = os.dup(machine.saves._memory.fd)
    assert os.fstat(memory).st_blocks > 0
    machine.wait()
    machine.stop()
    assert os.fstat(memory).st_blocks == 0
    os.close(memory)


def names(machine: StagedMachine) -> list[str]:
    return sorted(path.name for path in machine.output_dir.glob("checkpoint-*"))
