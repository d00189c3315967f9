"""The writer process: what it imports, when it ends, and that its death is noticed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.local_home import wait_for_writer
from hf_cloudtrain.staging import process as process_module
from hf_cloudtrain.staging.job import StagedFile, WriteJob
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.process import WriterProcess
from hf_cloudtrain.storage.names import LOCAL
from tests.faults.runs import wait_until
from tests.faults.staged import wait_for_no_writer, writer_program


@pytest.fixture
def memory() -> Iterator[StagingMemory]:
    memory = StagingMemory(2**16)
    yield memory
    memory.close()


def test_the_writer_has_a_session_of_its_own_and_ignores_the_signals_that_stop_a_training(
    memory: StagingMemory, tmp_path: Path
) -> None:
    with writer_program(f"open({str(tmp_path / 'ready')!r}, 'w').close()"):
        process = WriterProcess(tmp_path, memory)
    pid = process.pid or 0
    assert os.getsid(pid) == pid
    wait_until(lambda: ignored(pid, signal.SIGUSR2), "its signal handlers")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, number)
    assert os.getpriority(os.PRIO_PROCESS, pid) >= 10
    assert Path(f"/proc/{pid}/cwd").resolve() == Path("/")
    process.end()
    assert process.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_modules_of_the_user_do_not_replace_those_of_python_and_the_package_is_that_of_the_training(
    memory: StagingMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do warnings become errors."""
    for name in ("socket", "json", "logging", "hf_cloudtrain", "usercustom"):
        (tmp_path / f"{name}.py").write_text(
            "raise RuntimeError('a module of the user')" if name != "usercustom" else ""
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    report = tmp_path / "report"
    with writer_program(
        "import hf_cloudtrain, usercustom, warnings",
        "warnings.warn('a warning')",
        f"open({str(report)!r}, 'w').write(hf_cloudtrain.__file__)",
    ):
        process = WriterProcess(tmp_path / "out", memory)
    wait_until(lambda: report.exists() and report.read_text(), "the writer")
    assert report.read_text() == str(Path(process_module.__file__).parents[1] / "__init__.py")
    process.end()


def test_a_writer_that_dies_is_noticed_although_a_fork_holds_its_end_of_the_socket(
    memory: StagingMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process_module, "LOOK", 0.05)
    pidfile = tmp_path / "fork"
    with writer_program(
        f"open({str(pidfile)!r}, 'w').write(str(os.getpid()))",
        "os.fork() or __import__('time').sleep(60)",
    ):
        process = WriterProcess(tmp_path / "out", memory)
    pid = process.pid or 0
    wait_until(lambda: children(pid), "the fork")
    (fork,) = children(pid)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: process.pid is None, "the end of the writer")
    assert "has ended unexpectedly (exit code -9)" in caplog.text
    os.kill(fork, signal.SIGKILL)
    wait_for_no_writer(tmp_path / "out")


def test_a_forked_process_does_not_end_the_writer(memory: StagingMemory, tmp_path: Path) -> None:
    with writer_program():
        process = WriterProcess(tmp_path, memory)
    child = os.fork()
    if child == 0:
        process._job = (b"", print, print)  # as if a save were under way
        code = int(process.is_busy or not process.wait(60))
        process.end()
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert process.pid is not None
    os.kill(process.pid, 0)
    process.end()
    process.end()


def test_the_lock_is_held_from_the_start_and_free_after_the_end(
    memory: StagingMemory, tmp_path: Path
) -> None:
    """Also while the writer has not run a line yet: the next start must not tidy what it is about to write."""
    with writer_program("__import__('time').sleep(60)"):
        process = WriterProcess(tmp_path, memory)
    with pytest.raises(BlockingIOError):
        WriterProcess(tmp_path, memory)
    process.end()
    (tmp_path / LOCAL / "saving/left").mkdir(parents=True)
    wait_for_writer(tmp_path)
    assert not (tmp_path / LOCAL / "saving").exists()


def test_a_long_description_is_handed_over_while_the_writer_stands_still(
    memory: StagingMemory, tmp_path: Path
) -> None:
    """It has 10,000 parameters with AdamW. A socket would take a tenth of it, and hold up the training for the rest."""
    parts = [(f"data/{number}", 64 * number, 12) for number in range(30_000)]
    job = WriteJob(str(tmp_path), "/gone", "/gone", [StagedFile("optimizer.pt", "torch", parts)], entry="")
    reasons: list[str] = []
    process = WriterProcess(tmp_path, memory)
    os.kill(process.pid or 0, signal.SIGSTOP)
    process.write(job, done=print, failed=reasons.append)
    assert process.is_busy
    os.kill(process.pid or 0, signal.SIGCONT)
    assert process.wait(60)
    assert "The folder was removed while it was written" in reasons[0], "so it was read to its end"
    process.end()


def test_a_program_that_cannot_be_started_is_an_error_and_holds_nothing(
    memory: StagingMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, threads = len(os.listdir("/proc/self/fd")), {*threading.enumerate()}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(FileNotFoundError):
            WriterProcess(tmp_path, memory)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not {*threading.enumerate()} - threads
    wait_for_writer(tmp_path)


def test_without_threads_a_writer_is_an_error_and_holds_nothing(
    memory: StagingMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(OSError, match="cannot be watched: no more threads"):
        WriterProcess(tmp_path, memory)
    assert len(os.listdir("/proc/self/fd")) == before
    wait_for_no_writer(tmp_path)


def test_a_save_whose_writer_cannot_be_replaced_is_lost_with_a_reason_and_no_wait_for_it_goes_on(
    memory: StagingMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []
    with writer_program("__import__('time').sleep(60)"):
        process = WriterProcess(tmp_path, memory)
    process._job = (b"", print, reasons.append)  # as if a save were under way
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    os.kill(process.pid or 0, signal.SIGKILL)
    assert process.wait(60)
    assert "no more threads" in reasons[0]
    wait_for_no_writer(tmp_path)


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("no more threads")


def ignored(pid: int, number: int) -> bool:
    """Whether a process ignores a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
