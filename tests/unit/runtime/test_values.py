"""Values as JSON holds them. The table of metrics is in tests/unit/tracking/test_tracker.py."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from hf_cloudtrain.runtime.values import finite, metric, number, utf8


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, None),
        ([1.0, -math.inf, "nan"], [1.0, None, "nan"]),
        ((1, (math.nan,)), [1, [None]]),
        ({"a": {"b": math.inf}, 3: True, ("x",): None}, {"a": {"b": None}, "3": True, "('x',)": None}),
        ({"caf\udce9": 1}, {"caf\\udce9": 1}),
    ],
)
def test_finite_leaves_no_nan_in_json(value: Any, shown: Any) -> None:
    assert finite(value) == shown
    json.dumps(finite(value), allow_nan=False).encode()


@pytest.mark.parametrize("text", ["", "a", "é\u2028", "😀"])
def test_texts_that_utf_8_can_hold_stay_as_they_are(text: str) -> None:
    assert utf8(text) == text


@pytest.mark.parametrize(
    ("value", "as_number", "as_metric"),
    [
        (1, 1.0, 1.0),
        (0.5, 0.5, 0.5),
        (1e20, None, 1e20),
        (True, None, None),
        ("1", None, None),
        (None, None, None),
        ([1], None, None),
        ({}, None, None),
        (10**400, None, None),
    ],
)
def test_records_are_not_trusted(value: Any, as_number: float | None, as_metric: float | None) -> None:
    assert (number(value), metric(value)) == (as_number, as_metric)


def test_a_metric_that_is_not_finite_is_read_as_it_was_recorded() -> None:
    assert math.isnan(metric("nan") or 0.0)
    assert (metric("inf"), metric("-inf"), number("nan")) == (math.inf, -math.inf, None)
