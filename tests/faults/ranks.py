"""Ranks that are threads: they exchange values in the same order as processes, without the start-up time of torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from hf_cloudtrain.runtime.ranks import Ranks
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
    """One of several ranks that are threads."""

    def __init__(self, rank: int, rendezvous: _Rendezvous) -> None:
        super().__init__(rank, rendezvous.size)
        self._rendezvous = rendezvous

    def barrier(self) -> None:
        self._rendezvous.barrier.wait()

    def begin_largest(self, values: list[float]) -> Future[list[float]]:
        answer: Future[list[float]] = Future()
        answer.set_result([max(column) for column in zip(*self._gather(values), strict=True)])
        return answer

    def _gather(self, value: Any) -> list[Any]:
        self._rendezvous.values[self.rank] = value
        self.barrier()
        found = list(self._rendezvous.values)
        self.barrier()  # no rank writes its next value before all have read this one
        return found


def on_ranks(size: int, work: Callable[[Ranks], T], monkeypatch: pytest.MonkeyPatch) -> list[T | Exception]:
    """The result or the error of `work` on each rank; within `work`, `Ranks.current()` returns that rank."""
    rendezvous = _Rendezvous(size)
    here = threading.local()
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        here.ranks = ThreadRanks(rank, rendezvous)
        try:
            results[rank] = work(here.ranks)
        except Exception as error:  # noqa: BLE001 - returned to the test
            results[rank] = error

    with monkeypatch.context() as patched:
        patched.setattr(Ranks, "current", classmethod(lambda kind, folder=None: here.ranks))
        ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    return results
