"""Sizes, spans of time and moments as text."""

from __future__ import annotations

import pytest

from hf_cloudtrain.runtime import text as runtime_text


class TestText:
    @pytest.mark.parametrize(
        ("count", "text"),
        [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_317_921_234, "1.3 GB"), (10**18, "1000.0 PB")],
    )
    def test_sizes_are_in_powers_of_ten(self, count: int, text: str) -> None:
        assert runtime_text.size_text(count) == text

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (None, None),
            (float("nan"), None),
            (-1.0, "0 ms"),
            (0.25, "250 ms"),
            (2.125, "2.12 s"),
            (61.0, "1 min 1 s"),
            (3600.0, "1 h"),
            (90061.0, "1 d 1 h"),
        ],
    )
    def test_spans_of_time_have_two_units(self, seconds: float | None, text: str | None) -> None:
        assert runtime_text.duration_text(seconds) == text

    @pytest.mark.parametrize("seconds", [1e300, -1e300, float("inf"), float("nan")])
    def test_a_time_outside_the_calendar_is_still_shown(self, seconds: float) -> None:
        assert runtime_text.time_text(seconds)
