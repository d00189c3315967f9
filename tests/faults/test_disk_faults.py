"""A disk fills up, or turns read-only, at each disk operation of a run in turn: nothing is lost."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime import files
from hf_cloudtrain.testing import FaultyDisk
from tests.faults.aftermath import first_broken_promise, is_whole_checkpoint
from tests.faults.runs import DEADLINE, Machine, Machines, bytes_of, left_overs, one_fast
from tests.faults.small_disk import why_impossible

ROOT = Path(__file__).resolve().parent.parent.parent
SHORT = 0.1
"""Seconds of a wait that may fail on purpose."""
ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
EXPECTED = {"full": "space", "read-only": "Read-only"}


def saves(machine: Machine, accepted: list[int], seconds: float) -> None:
    """Start, save, commit, rotate, save again, commit."""
    machine.start()
    for step in (5, 10):
        machine.save(step)
        if machine.checkpointer._save_error is None:
            accepted.append(step)
        machine.checkpointer.wait(seconds)
        machine.rotate(5) if step == 5 else None


def disk_operations(folder: Path) -> int:
    """The number of disk operations of a run."""
    with Machines(folder) as machines, FaultyDisk(folder / "out", errno.EROFS, times=0) as disk:
        saves(machines.new(), [], DEADLINE)
        return len(disk.seen)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", one_fast(ERRORS))
def test_a_disk_that_fails_from_any_operation_on_loses_no_accepted_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    caplog.set_level(logging.CRITICAL)
    problems = []
    for number in range(1, disk_operations(tmp_path / "undisturbed") + 1):
        with Machines(tmp_path / str(number)) as machines:
            accepted: list[int] = []
            machine, message = None, ""
            with FaultyDisk(tmp_path / str(number) / "out", ERRORS[trouble], at=number) as disk:
                try:
                    saves(machine := machines.new(), accepted, SHORT)
                except (CloudTrainError, OSError) as error:
                    message = str(error)
            if machine is not None:
                machine.stop()
            unfinished = [name for name in left_overs(tmp_path / str(number) / "out") if "/." in name]
            if trouble == "full" and unfinished:
                problems.append(
                    f"operation {number}, {disk.seen[number - 1]}: {unfinished} stays on a full disk"
                )
            monkeypatch.setattr(files, "_making", set())  # as in a new process
            if (
                disk.refused
                and message
                and EXPECTED[trouble] not in message
                and "Not on storage yet" not in message
            ):
                problems.append(f"operation {number}, {disk.seen[number - 1]}: the error was {message!r}")
            if problem := first_broken_promise(machines, accepted[-1] if accepted else 0):
                problems.append(f"operation {number}, {disk.seen[number - 1]}: {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("trouble", ERRORS)
def test_a_restore_to_a_failing_disk_leaves_no_partial_checkpoint_and_reports_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    caplog.set_level(logging.CRITICAL)
    with Machines(tmp_path) as machines:
        machine = machines.new()
        machine.start()
        machine.save(5)
        machine.wait()
        number, refused = 0, 1
        while refused:
            number += 1
            elsewhere = f"elsewhere-{number}"
            with FaultyDisk(tmp_path / elsewhere, ERRORS[trouble], at=number) as disk:
                message = ""
                try:
                    machines.restored(elsewhere)
                except (CloudTrainError, OSError) as error:
                    message = str(error)
            refused = disk.refused
            assert not refused or EXPECTED[trouble] in message, (
                f"operation {number}, {disk.seen[number - 1]}: {message!r}"
            )
            assert all(is_whole_checkpoint(path) for path in (tmp_path / elsewhere).glob("checkpoint-*"))
            assert machines.restored(elsewhere) == bytes_of(5), (
                f"after the disk works again: operation {number}"
            )
        assert number > 8, "the sweep must cover the whole restore"


def test_a_real_disk_that_is_full_or_read_only_loses_nothing_and_reports_it(tmp_path: Path) -> None:
    """During the framework's save, the snapshot, the copy of the function API, and a restore."""
    if reason := why_impossible():
        pytest.skip(f"no small disk can be mounted here: {reason}")  # the sweeps above do not need one
    command = [sys.executable, "-m", "tests.faults.tight_run", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=DEADLINE)
    assert ended.returncode == 0, ended.stderr
