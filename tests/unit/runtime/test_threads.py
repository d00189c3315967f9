"""Work in threads: an error does not keep alive what the work has seen."""

from __future__ import annotations

import gc
import weakref

import pytest

from hf_cloudtrain.runtime.threads import answer_in_time


class Data:
    """Stands for gigabytes."""


def fail() -> weakref.ref[Data]:
    data = Data()
    alive = weakref.ref(data)

    def work(data: Data = data) -> None:
        raise ValueError(f"cannot send {data}")

    with pytest.raises(ValueError, match="cannot send"):
        answer_in_time(work, lambda: False)
    return alive


def test_an_error_is_freed_at_once_with_all_that_the_work_has_seen() -> None:
    gc.collect()
    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()
