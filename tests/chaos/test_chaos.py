"""SIGKILL at random moments of real training runs: in the step loop, a save, an upload, a commit, a restore, …

Half-written files, half-sent folders and half-done renames must never be taken for checkpoints, and in the end the
weights are those of a training that nobody killed. `make chaos` does it 200 times.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos._chaos import Chaos
from tests.integration._zygote import Zygote
from tests.servers import MotoServer


def test_20_kills_restore_nothing_partial_lose_no_commit_and_change_no_weight(
    moto: MotoServer, tmp_path: Path
) -> None:
    print(kill(moto, tmp_path, 20))


@pytest.mark.chaos
def test_many_kills(moto: MotoServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = kill(moto, tmp_path, int(os.environ.get("CHAOS_KILLS", "20")))
    with capsys.disabled():
        print(f"\n{table}")


def kill(moto: MotoServer, folder: Path, kills: int) -> str:
    """The table of what happened, where all is well."""
    seed = int(os.environ.get("CHAOS_SEED", time.time_ns() % 10**6))
    with Zygote(folder, "tests.integration._attempts") as zygote:
        chaos = Chaos(zygote, folder, places(moto, folder), kills=kills, seed=seed)
        try:
            tally = chaos.go()
        finally:
            print(chaos.table())
    assert tally.kills == kills
    assert tally.wrong_picks == []
    assert tally.lost == []
    assert tally.broken == []
    assert tally.differences == [0.0] * tally.runs
    return chaos.table()


def places(moto: MotoServer, folder: Path) -> Callable[[int], tuple[str, dict[str, Any]]]:
    """Runs on a disk and on S3 in turn."""

    def place(number: int) -> tuple[str, dict[str, Any]]:
        if number % 2:
            return f"file://{folder}/storage-{number}", {}
        return f"s3://{moto.make_bucket()}/runs/chaos", moto.storage_options

    return place
