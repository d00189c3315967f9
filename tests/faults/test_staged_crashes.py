"""The training, its writer or both are killed at any point of a staged save: nothing is partial, nothing handed over is lost."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.names import LOCAL
from hf_cloudtrain.testing import CRASH_STATUS
from tests.faults.killed_run import ACCEPTED, DISK, skip_the_probe
from tests.faults.runs import DEADLINE, Machines, contents, left_overs
from tests.faults.small_disk import why_impossible
from tests.faults.staged import MODEL, StagedMachine, staged_bytes, wait_for_no_writer, writer_program
from tests.faults.staged_run import KILLED, staged_run
from tests.faults.test_crashes import FORKS, why_it_failed
from tests.faults.test_disk_faults import ROOT


@pytest.mark.slow
def test_a_real_full_disk_loses_a_staged_save_and_not_the_training(tmp_path: Path) -> None:
    """torch and safetensors fail in the middle of their files. `/dev/shm` of 64 kB, as in a container, does not matter."""
    if reason := why_impossible():
        pytest.skip(f"no small disk can be mounted here: {reason}")
    command = [sys.executable, "-m", "tests.faults.staged_tight_run", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for step in (1, 2):
        assert (
            f"checkpoint-{step} could not be kept for upload: OSError: [Errno 28] checkpoint-{step} needs 8.4 MB, and only "
            in ended.stdout
        )
    assert ended.stdout.splitlines()[-1] == "['checkpoint-10', 'checkpoint-20']"


EVERY = {"writer": (60, 1), "both": (60, 1), "training": (110, 2)}
"""Of how many changes one is tried, by `make test` and by `make test-slow`."""


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("who", EVERY)
def test_law_4_a_staged_save_survives_a_kill_at_any_change_of_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, who: str, which: int
) -> None:
    """Kill at one change after the other, until a run ends before it reaches its change."""
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(Storage, "check", skip_the_probe)
    problems: dict[int, str] = {}
    step = EVERY[who][which]
    for number in range(max(1, step // 2), 10_000, step):
        folder = tmp_path / f"{number:03d}"
        ended = run_until_killed(folder, who, number)
        assert ended in (0, CRASH_STATUS, -9), f"change {number}: {why_it_failed(folder)}"
        if problem := first_problem(folder, may_lose=who == "both"):
            problems[number] = problem
        killed = ended != 0 or (folder / KILLED).exists()
        shutil.rmtree(folder)
        if not killed:
            break
    assert not problems, "\n".join(f"change {number}: {problem}" for number, problem in problems.items())
    assert number > 50, "the sweep must cover the whole run"


def run_until_killed(folder: Path, who: str, number: int) -> int | None:
    folder.mkdir()
    child = FORKS.Process(target=staged_run, args=(folder, who, number))
    child.start()
    child.join(DEADLINE)
    if child.exitcode is None:
        child.kill()
        child.join()
    wait_for_no_writer(folder / DISK / "out")
    return child.exitcode


def first_problem(folder: Path, *, may_lose: bool) -> str:
    """The first broken promise as text, or an empty string. The next training starts on the same disk.

    Args:
        may_lose: whether a save that only the writer had may be lost, because it was killed, too.
    """
    saved = [int(step) for step in (folder / ACCEPTED).read_text().split()]
    with Machines(folder / DISK) as machines, writer_program():
        out = StagedMachine(folder / DISK / "out", machines.storage.url)
        machines.made.append(out)
        kept = {*machines.committed(), *((key.attempt, key.step) for key in out.waiting())}
        newest = max((step for _, step in kept), default=0)
        if saved and saved[-1] > newest and not may_lose:
            return f"step {saved[-1]} was handed over and then lost: {sorted(kept)}"
        # The framework itself was killed while it wrote the one after that.
        found = {path: contents(path) for path in out.output_dir.glob("checkpoint-*")}
        for path, files in found.items():
            step = int(path.name.rpartition("-")[2])
            if files != staged_bytes(step) and (step in saved or MODEL in files):
                return f"{path.name} is partial: {sorted(files)}"
        if (
            saved
            and not kept
            and not any(files == staged_bytes(5) for files in found.values())
            and not may_lose
        ):
            return "nothing is left"
        if (resumed_at := out.start()) != newest:
            return f"the next start resumed at {resumed_at}, and {newest} was kept"
        if newest and contents(out.output_dir / f"checkpoint-{newest}") != staged_bytes(newest):
            return f"the files restored for step {newest} differ from those saved"
        out.save(20)
        out.wait()
        if machines.committed()[-1][1] != 20 or machines.restored("third") != staged_bytes(20):
            return f"step 20 was not committed: {machines.committed()}"
        rest = [*left_overs(out.output_dir), *(out.output_dir / LOCAL / "saving").iterdir()]
        return f"unfinished work was not removed: {rest}" if rest else ""
