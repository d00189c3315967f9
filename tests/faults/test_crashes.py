"""A process is killed at any point of save, upload, commit, restore and delete: nothing is partial, nothing is lost."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.leftovers import find
from hf_cloudtrain.checkpoints.retention import Policy, Retention
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.testing import CRASH_STATUS
from tests.faults.aftermath import first_broken_promise, is_whole_checkpoint
from tests.faults.killed_run import ACCEPTED, DISK, FAILED, killed_run, skip_the_probe
from tests.faults.runs import DEADLINE, Machines

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.faults.killed_run"])
AT_ONCE = 2


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_disk_operation_loses_nothing_and_leaves_no_partial_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Kill at operation 1, then at 1 + `every`, and so on, until a run ends before it reaches its operation."""
    caplog.set_level(logging.CRITICAL)  # each of hundreds of starts logs what it resumes from
    monkeypatch.setattr(Storage, "check", skip_the_probe)
    problems: dict[int, str] = {}
    killed = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(1, 10_000, AT_ONCE * every):
            numbers = range(first, first + AT_ONCE * every, every)
            folders = [tmp_path / str(number) for number in numbers]
            endings = list(pool.map(run_until_killed, folders, numbers))
            for number, folder, ended in zip(numbers, folders, endings, strict=True):
                assert ended in (0, CRASH_STATUS), f"operation {number}: {why_it_failed(folder)}"
                killed += ended == CRASH_STATUS
                if problem := check_after_kill(folder, over=ended == 0):
                    problems[number] = problem
                shutil.rmtree(folder)
            if 0 in endings:
                break
    assert not problems, "\n".join(f"operation {number}: {problem}" for number, problem in problems.items())
    assert killed > 100 // every, "the sweep must cover the whole run"


def run_until_killed(folder: Path, number: int) -> int | None:
    folder.mkdir()
    child = FORKS.Process(target=killed_run, args=(folder, number))
    child.start()
    child.join(DEADLINE)
    if child.exitcode is None:
        child.kill()
        child.join()
    return child.exitcode


def why_it_failed(folder: Path) -> str:
    report = folder / FAILED
    return report.read_text() if report.exists() else "it hung"


def check_after_kill(folder: Path, *, over: bool) -> str:
    """The first broken promise as text, or an empty string."""
    saved = [int(step) for step in (folder / ACCEPTED).read_text().split()]
    with Machines(folder / DISK) as machines:
        out = machines.new("out")
        kept = {*machines.committed(), *((key.attempt, key.step) for key in out.waiting())}
        if saved and (1, saved[-1]) not in kept:
            return f"step {saved[-1]} was accepted and then lost: {sorted(kept)}"
        if over and machines.committed() != [(1, 10)]:
            return f"the whole run committed {machines.committed()}"
        partial = [
            path.name
            for path in (folder / DISK / "elsewhere").glob("checkpoint-*")
            if not is_whole_checkpoint(path)
        ]
        if partial:
            return f"a partial checkpoint folder is visible: {partial}"
        if problem := first_broken_promise(machines, saved[-1] if saved else 0):
            return problem
        newest = machines.catalog.attempts.read_all()[-1]
        Retention(machines.catalog, Policy(1), newest).run()
        half = [left.name for left in find(machines.catalog) if left.what == "deletion"]
        return f"deletions left unfinished: {half}" if half else ""
