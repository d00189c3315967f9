"""A curve in a few lines of text."""

from __future__ import annotations

import math

import pytest

from hf_cloudtrain.cli.curve import curve


class TestCurve:
    """A few lines of text that look like the values."""

    def test_it_falls_where_the_values_fall(self) -> None:
        assert curve([4, 3, 2, 1], 4, 4, ascii_only=True) == ["*", " *", "  *", "   *"]
        assert curve([4, 3, 2, 1], 2, 1) == ["⠑⢄"]

    def test_many_values_become_the_means_of_their_columns(self) -> None:
        assert curve([1, 1, 3, 3], 2, 2, ascii_only=True) == [" *", "*"]
        lines = curve([math.exp(-step / 3000) for step in range(10_000)], 48, 5)
        assert {len(line) for line in lines} == {48}
        assert lines[0][0] != "⠀"
        assert lines[-1][-1] != "⠀"

    def test_a_steep_slope_is_a_line(self) -> None:
        lines = curve([0, 1], 1, 3)
        assert all(line != "⠀" for line in lines)

    @pytest.mark.parametrize("values", [[], [math.nan], [math.inf]])
    def test_nothing_to_draw_is_nothing(self, values: list[float]) -> None:
        assert curve(values, 10, 3) == []

    def test_one_value_and_equal_values_are_a_level_line(self) -> None:
        assert curve([5.0], 3, 1) != []
        assert curve([5.0, 5.0, 5.0], 3, 3, ascii_only=True) == ["", "***", ""]
