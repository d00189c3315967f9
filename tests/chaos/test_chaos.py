"""SIGKILL at random moments: in the step loop, a save, an upload, a commit, a restore, a delete, …

A partly written file, a partly uploaded folder, an interrupted rename or delete must never count as a checkpoint, and the final
weights must equal those of an uninterrupted training. `make chaos` kills a thousand small runs and fifty torchrun jobs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import _quick
from tests.chaos._chaos import Chaos, Tally
from tests.integration._zygote import Zygote
from tests.servers import MotoServer

KILLS = int(os.environ.get("CHAOS_KILLS", "1000"))
"""Of small runs; torchrun jobs get a twentieth."""


@pytest.mark.slow
def test_100_kills_of_small_runs_restore_the_newest_lose_no_commit_and_change_no_weight(
    moto: MotoServer, tmp_path: Path
) -> None:
    assert of_small_runs(moto, tmp_path, 100).wrong() == []


@pytest.mark.slow
def test_5_kills_of_complete_torchrun_jobs_do_the_same(tmp_path: Path) -> None:
    assert of_jobs(tmp_path, 5).wrong() == []


@pytest.mark.chaos
def test_many_kills(moto: MotoServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "runs", tmp_path / "jobs"):
        folder.mkdir()
    runs = of_small_runs(moto, tmp_path / "runs", KILLS)
    jobs = of_jobs(tmp_path / "jobs", KILLS // 20)
    with capsys.disabled():
        print(f"\n{runs.table()}\n\n{jobs.table()}")
    assert runs.wrong() + jobs.wrong() == []
    assert KILLS < 1000 or runs.overtaken > 0


def of_small_runs(moto: MotoServer, folder: Path, kills: int) -> Tally:
    """One run in twelve is on S3, the others are on a disk."""

    def location(number: int) -> tuple[str, dict[str, Any]]:
        if number % 12 != 6:
            return f"file://{folder}/storage-{number}", {}
        return f"s3://{moto.make_bucket()}/runs/chaos", moto.storage_options

    with Zygote(folder, "tests.chaos._quick") as zygote:
        return killed(Chaos(_quick, zygote, folder, location, kills=kills, seed=seed()), kills)


def of_jobs(folder: Path, kills: int) -> Tally:
    """On a disk; one kill in five kills a single rank, which torchrun detects."""
    from tests.chaos import _job

    def location(number: int) -> tuple[str, dict[str, Any]]:
        return f"file://{folder}/storage-{number}", {}

    with Zygote(folder, "tests.integration._attempts") as zygote:
        chaos = Chaos(_job, zygote, folder, location, kills=kills, seed=seed(), ranks=_job.RANKS, alone=0.2)
        return killed(chaos, kills)


def killed(chaos: Chaos, kills: int) -> Tally:
    try:
        tally = chaos.go()
    finally:
        print(chaos.tally.table())
    assert tally.kills == kills
    assert len(tally.differences) == tally.runs
    return tally


def seed() -> int:
    """CHAOS_SEED repeats the random choices of a failed run; the arrival of a signal still depends on the machine."""
    return int(os.environ.get("CHAOS_SEED", time.time_ns() % 10**6))
