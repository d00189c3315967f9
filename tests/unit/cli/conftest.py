"""Runs that the commands read."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from tests.unit.cli.terminal import Run


@pytest.fixture
def empty(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "mrpc", tmp_path / "out")


@pytest.fixture
def run(empty: Run) -> Run:
    """Killed after step 320, resumed from 200: 300 is there twice, 200 is the best, and `final` was saved twice."""
    empty.begin(ago=7200)
    empty.save(1, 100)
    empty.save(1, 200, best=True, metrics={"eval_loss": 0.25})
    empty.save(1, 300, exact=False, inexact_reason="an evaluation was dropped")
    empty.beat(1, ago=5000, step=320, total_steps=1000)
    empty.begin(ago=3600, resumed_from=CheckpointKey(1, 200))
    empty.save(2, 300)
    empty.save(2, 400, {"deep/er/rng_state_0.pth": b"x" * 1500}, origin={"torch": "2.13.0"})
    empty.save(2, 400, name="final")
    empty.save(2, 400, name="final")
    return empty
