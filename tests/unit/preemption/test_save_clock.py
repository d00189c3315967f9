from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.preemption import save_clock
from hf_cloudtrain.preemption.save_clock import FIRST_SECONDS, SaveClock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [1000.0]
    monkeypatch.setattr(save_clock, "time", SimpleNamespace(monotonic=lambda: time[0]))
    return time


def test_a_save_is_due_once_an_interval(now: list[float]) -> None:
    clock = SaveClock(10)
    now[0] += 9.9
    assert not clock.is_due()
    now[0] += 0.2
    assert [clock.is_due(), clock.is_due()] == [True, False]
    now[0] += 10
    assert clock.is_due()


def test_any_save_begins_the_interval_again(now: list[float]) -> None:
    clock = SaveClock(10)
    now[0] += 9
    clock.saved(1.0)
    now[0] += 9
    assert not clock.is_due()


def test_a_share_of_the_time_follows_the_median_of_the_last_saves(now: list[float]) -> None:
    clock = SaveClock(overhead=0.02)
    assert clock.seconds == FIRST_SECONDS
    for stall in (30.0, 2.0, 2.0, 2.0, 40.0):
        clock.saved(stall)
    assert clock.seconds == pytest.approx(98)  # 2 of 100 seconds
    clock.saved(None)
    assert clock.seconds == pytest.approx(98)


def test_with_both_a_save_is_due_when_both_allow_it(now: list[float]) -> None:
    clock = SaveClock(10, 0.5)
    assert clock.seconds == 10
    clock.saved(60.0)
    assert clock.seconds == 60
    clock = SaveClock(100, 0.5)
    clock.saved(60.0)
    assert clock.seconds == 100


@pytest.mark.parametrize(
    ("interval", "overhead", "named"),
    [
        (0, None, "save_interval_seconds=0"),
        (-1, None, "save_interval_seconds=-1"),
        (float("nan"), None, "save_interval_seconds=nan"),
        ("600", None, "save_interval_seconds='600'"),
        (True, None, "save_interval_seconds=True"),
        (None, 0, "save_overhead=0"),
        (None, "2%", "save_overhead='2%'"),
        (None, 2, "save_overhead=2"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(interval: Any, overhead: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        SaveClock.of(interval, overhead)


def test_the_first_line_names_what_was_asked_for() -> None:
    assert SaveClock.of(None, None) is None
    assert str(SaveClock(600)) == "every 600 s"
    assert str(SaveClock(600, 0.02)) == "every 600 s, for at most 2 % of the time"
