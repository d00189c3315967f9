"""What the tests of several integrations use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from tests.faults.runs import Machines


@pytest.fixture
def checkpointer(machines: Machines, tmp_path: Path) -> Iterator[Checkpointer]:
    made = Checkpointer(machines.storage.url, tmp_path / "out")
    made.begin(0)
    yield made
    made.close()
