"""Ranks that are threads: they meet in the same turns as processes do, without torch and its seconds of start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from hf_cloudtrain.distributed import World
from hf_cloudtrain.meeting import Met
from tests.faults.runs import DEADLINE

if TYPE_CHECKING:
    import pytest

T = TypeVar("T")


class _Meeting:
    def __init__(self, size: int) -> None:
        self.size = size
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=DEADLINE)


class ThreadWorld(World):
    """One rank of a world whose ranks are threads."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        super().__init__(rank, meeting.size)
        self._meeting = meeting

    def barrier(self) -> None:
        self._meeting.barrier.wait()

    def begin_largest(self, values: list[float]) -> Met:
        return Met([max(column) for column in zip(*self._gather(values), strict=True)])

    def _gather(self, value: Any) -> list[Any]:
        self._meeting.values[self.rank] = value
        self.barrier()
        found = list(self._meeting.values)
        self.barrier()  # nobody writes the next one before all have read this
        return found

    def _broadcast(self, value: T) -> T:
        return self._gather(value)[0]  # type: ignore[no-any-return]


def on_ranks(size: int, work: Callable[[World], T], monkeypatch: pytest.MonkeyPatch) -> list[T | Exception]:
    """What `work` gives or raises on each rank; `World.current()` in it is that rank's."""
    meeting = _Meeting(size)
    here = threading.local()
    answers: list[Any] = [None] * size

    def run(rank: int) -> None:
        here.world = ThreadWorld(rank, meeting)
        try:
            answers[rank] = work(here.world)
        except Exception as error:  # noqa: BLE001 - a test looks at it
            answers[rank] = error

    with monkeypatch.context() as patched:
        patched.setattr(World, "current", classmethod(lambda kind, folder=None: here.world))
        ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    return answers
