"""Patches: a browser that applies them has what the server has, and receives only what is new."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_cloudtrain.runtime.patches import patch
from tests.served import applied

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from((0.0, 1.0, 1.5)) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES, VALUES)
def test_a_browser_that_applies_a_patch_has_the_new_document(old: Any, new: Any) -> None:
    change = patch(old, new)
    if change is None:
        assert json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)
    else:
        sent = json.loads(json.dumps(change))
        after = applied(copy.deepcopy(old), sent)
        assert json.dumps(after, sort_keys=True) == json.dumps(new, sort_keys=True)


@pytest.mark.parametrize(
    "wrap", [lambda value: value, lambda value: [value], lambda value: [[value], {"a": value}]]
)
@pytest.mark.parametrize(
    ("old", "new"), [(False, 0), (0, False), (True, 1), (1, True), (1, 1.0), (0.0, False)]
)
def test_numbers_and_truth_values_are_different(old: Any, new: Any, wrap: Any) -> None:
    assert patch(wrap(old), wrap(old)) is None
    change = patch(wrap(old), wrap(new))
    assert change is not None
    assert json.dumps(applied(wrap(old), change)) == json.dumps(wrap(new))


def test_only_the_new_points_of_a_curve_are_sent() -> None:
    before = {"charts": [{"name": "loss", "data": [{"x": list(range(4_000)), "y": [1.5] * 4_000}]}]}
    after = copy.deepcopy(before)
    after["charts"][0]["data"][0]["x"].append(4_000)  # type: ignore[index, attr-defined]
    change = patch(before, after)
    assert change is not None
    assert len(json.dumps(change)) < 200
    assert applied(before, change) == after
