"""Ranks that are threads: they meet in the same turns as processes do, without torch and its seconds of start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.runtime.rendezvous import Known
from tests.faults.runs import DEADLINE

if TYPE_CHECKING:
    import pytest

T = TypeVar("T")


class _Rendezvous:
    def __init__(self, size: int) -> None:
        self.size = size
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=DEADLINE)


class ThreadRanks(Ranks):
    """One rank of a world whose ranks are threads."""

    def __init__(self, rank: int, rendezvous: _Rendezvous) -> None:
        super().__init__(rank, rendezvous.size)
        self._rendezvous = rendezvous

    def barrier(self) -> None:
        self._rendezvous.barrier.wait()

    def begin_largest(self, values: list[float]) -> Known:
        return Known([max(column) for column in zip(*self._gather(values), strict=True)])

    def _gather(self, value: Any) -> list[Any]:
        self._rendezvous.values[self.rank] = value
        self.barrier()
        found = list(self._rendezvous.values)
        self.barrier()  # nobody writes the next one before all have read this
        return found

    def _broadcast(self, value: T) -> T:
        return self._gather(value)[0]  # type: ignore[no-any-return]


def on_ranks(size: int, work: Callable[[Ranks], T], monkeypatch: pytest.MonkeyPatch) -> list[T | Exception]:
    """What `work` gives or raises on each rank; `Ranks.current()` in it is that rank's."""
    rendezvous = _Rendezvous(size)
    here = threading.local()
    answers: list[Any] = [None] * size

    def run(rank: int) -> None:
        here.ranks = ThreadRanks(rank, rendezvous)
        try:
            answers[rank] = work(here.ranks)
        except Exception as error:  # noqa: BLE001 - a test looks at it
            answers[rank] = error

    with monkeypatch.context() as patched:
        patched.setattr(Ranks, "current", classmethod(lambda kind, folder=None: here.ranks))
        ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    return answers
