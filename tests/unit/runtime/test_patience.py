"""A wait of more than a few seconds says what it waits for, once."""

from __future__ import annotations

import logging
import threading

import pytest

from hf_cloudtrain.runtime import patience
from hf_cloudtrain.runtime.patience import told_if_slow
from tests.faults.runs import wait_until


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_cloudtrain")


def test_a_long_wait_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.01)
    with told_if_slow("reach 's3://b'"):
        wait_until(lambda: caplog.messages, "the message")
    assert caplog.messages == ["Waiting for more than 0 s to reach 's3://b'."]


def test_a_short_one_is_not_and_leaves_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    with told_if_slow("reach 's3://b'"):
        pass
    wait_until(
        lambda: "cloudtrain-patience" not in {thread.name for thread in threading.enumerate()}, "its end"
    )
    assert caplog.messages == []
