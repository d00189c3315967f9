"""Rows of many requests share batches: while the model works on one, the next collects, so no request waits for a timer.

    event loop: Batcher.answer ──> waiting requests ──> one thread: model ──> the futures of the requests

A batch takes one row of each waiting request in turn, and those that gave rows wait behind the others. So a request of thousands of
rows does not hold up the small ones, whatever their parameters.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from hf_cloudtrain.serving.metrics import Metrics
from hf_cloudtrain.serving.models.predictor import RowError
from hf_cloudtrain.serving.models.tasks import RequestError

logger = logging.getLogger(__name__)

Work = Callable[[Sequence[Any], dict[str, Any]], list[Any]]


class _Waiting:
    """A request whose rows are not all answered."""

    def __init__(self, rows: Sequence[Any], parameters: dict[str, Any]) -> None:
        self.parameters = parameters
        self.answers: list[Any] = list(rows)  # of a row that failed while it was read, its error
        self.queue = deque((i, row) for i, row in enumerate(rows) if not isinstance(row, RowError))
        self.open = len(self.queue)
        self.done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()


_Batch = list[tuple[_Waiting, int, Any]]


class Batcher:
    """The thread of the model, and the rows that wait for it.

    Args:
        work: answers the rows of a batch, one answer a row.
        largest: rows of a batch, at most.
        room: rows that may wait.
    """

    def __init__(self, work: Work, metrics: Metrics, *, largest: int, room: int) -> None:
        self._work, self._metrics = work, metrics
        self._largest, self._room = largest, room
        self._requests: list[_Waiting] = []
        self._changed = threading.Condition()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="cloudtrain-model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread of the model runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return sum(len(request.queue) for request in tuple(self._requests) if not request.done.done())

    def answer(self, rows: Sequence[Any], parameters: dict[str, Any]) -> asyncio.Future[list[Any]]:
        """The answers, in order. If the future is cancelled, rows that still wait are dropped.

        Raises:
            RequestError: too many rows wait.
        """
        request = _Waiting(rows, parameters)
        if not request.open:
            request.done.set_result(request.answers)
            return request.done
        with self._changed:
            if self.waiting + request.open > self._room:
                raise RequestError("Too many rows wait. Try again.", 503)
            self._requests.append(request)
            self._changed.notify()
        request.done.add_done_callback(lambda done: self._drop(request) if done.cancelled() else None)
        return request.done

    def _drop(self, request: _Waiting) -> None:
        """Let go of the rows of a request that was cancelled: the model may take long to come to the next batch."""
        with self._changed:
            request.queue.clear()
            request.answers.clear()

    def _run(self) -> None:
        while True:
            self._answer(self._awaited_batch())  # and no variable, which would hold the rows until the next

    def _awaited_batch(self) -> _Batch:
        with self._changed:
            while not (batch := self._next_batch()):
                self._changed.wait()
            return batch

    def _answer(self, batch: _Batch) -> None:
        rows = [row for _, _, row in batch]
        self._metrics.batch_rows.observe(len(rows))
        try:
            with self._metrics.batch_seconds.time():
                answers = self._work(rows, batch[0][0].parameters)
        except Exception:
            logger.exception("A batch of %d rows failed.", len(rows))
            answers = [RowError("The server failed; its log says why.", is_input=False)] * len(rows)
        self._loop.call_soon_threadsafe(_deliver, batch, answers)

    def _next_batch(self) -> _Batch:
        """Rows with equal parameters: one of each request in turn, beginning with the request that has waited longest."""
        waiting = [request for request in self._requests if request.queue and not request.done.done()]
        turn = [request for request in waiting if request.parameters == waiting[0].parameters]
        batch: _Batch = []
        while turn and len(batch) < self._largest:
            now = turn[: self._largest - len(batch)]
            batch += [(request, *request.queue.popleft()) for request in now]
            turn = [request for request in turn if request.queue]
        served = {id(request) for request, _, _ in batch}
        left = (request for request in waiting if request.queue)
        self._requests = sorted(left, key=lambda request: id(request) in served)
        return batch


def _deliver(batch: _Batch, answers: list[Any]) -> None:
    for (request, index, _), answer in zip(batch, answers, strict=True):
        if request.done.done():
            continue
        request.answers[index] = answer
        request.open -= 1
        if request.open == 0:
            request.done.set_result(request.answers)
