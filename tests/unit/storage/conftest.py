"""No test of this room waits for real."""

from __future__ import annotations

import pytest


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of all sleeps, which return at once."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited
