"""The signals that stop a job: a handler in the block, and what was there before after it."""

from __future__ import annotations

import contextlib
import signal

import pytest

from hf_cloudtrain.jobs.node.stopping import STOP_SIGNALS, stop_handler


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_handler_is_called_inside_the_block_only(number: signal.Signals) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda number, frame: received.append(0))
    try:
        with (
            contextlib.suppress(ZeroDivisionError),
            stop_handler(lambda number, frame: received.append(number)),
        ):
            signal.raise_signal(number)
            raise ZeroDivisionError
        signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert received == [number, 0]


def test_a_closed_terminal_that_is_ignored_stays_ignored() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_handler(lambda number, frame: received.append(number)):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert received == []
