"""The machines of one run, storage that fails on request, and no pauses between retries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.runtime import threads
from hf_cloudtrain.storage import client, retries
from tests.faults.runs import Machines


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PAUSES", (0.0,) * len(retries.PAUSES))
    monkeypatch.setattr(client, "LISTED_AFTER", (0.0, 0.0))
    monkeypatch.setattr(upload_queue, "PAUSES", (0.01,))
    monkeypatch.setattr(threads, "TURN", 0.01)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with Machines(tmp_path) as all_machines:
        yield all_machines
