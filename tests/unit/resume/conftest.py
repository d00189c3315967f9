"""The tests of this room draw random numbers, and leave the global random states as they were."""

from __future__ import annotations

from typing import Any

import pytest

from hf_cloudtrain.resume.random_state import RandomState


@pytest.fixture(autouse=True)
def _keeps_random_states() -> Any:
    before = RandomState.capture()
    yield
    before.restore()
