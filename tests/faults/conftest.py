"""Machines of one run, storage that fails when told to, and no pauses between tries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain import process, storage, uploader
from tests.faults.runs import Machines


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "RETRY_PAUSES", (0.0,) * len(storage.RETRY_PAUSES))
    monkeypatch.setattr(uploader, "PAUSES", (0.01,))
    monkeypatch.setattr(process, "TURN", 0.01)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with Machines(tmp_path) as found:
        yield found
