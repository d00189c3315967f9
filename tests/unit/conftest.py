"""Machines of one run, and no pauses between tries."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints import attempts as attempts_module
from hf_cloudtrain.checkpoints import upload_queue
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.storage import client, retries
from hf_cloudtrain.storage.client import Storage
from tests.faults.runs import Machines


@pytest.fixture(autouse=True)
def signal_handlers_are_restored() -> Iterator[None]:
    """Programs of nodes and containers install handlers for good; in a test, the next test is in the same process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PAUSES", (0.0,) * len(retries.PAUSES))
    monkeypatch.setattr(client, "LISTED_AFTER", (0.0, 0.0))
    monkeypatch.setattr(upload_queue, "PAUSES", (0.01,))
    monkeypatch.setattr(attempts_module, "SETTLE_SECONDS", 0.0)


@pytest.fixture
def machines(tmp_path: Path, no_pauses: None) -> Iterator[Machines]:
    with Machines(tmp_path) as found:
        yield found


@pytest.fixture
def catalog(tmp_path: Path, no_pauses: None) -> Catalog:
    """The catalog of an empty run."""
    return Catalog(Storage(f"file://{tmp_path / 'run'}"))
