"""Counters and times of a server, as Prometheus reads them.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
PREFIX = "cloudtrain_serve"


class _Histogram:
    def __init__(self, name: str, bounds: tuple[float, ...], help_text: str) -> None:
        self._name, self._bounds, self._help = name, bounds, help_text
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self) -> Iterator[str]:
        name, total = f"{PREFIX}_{self._name}", 0
        yield f"# HELP {name} {self._help}"
        yield f"# TYPE {name} histogram"
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What a server has done so far.

    Args:
        facts: of the model: run, checkpoint, task.
    """

    def __init__(self, facts: Mapping[str, str]) -> None:
        self._facts = facts
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._rows: Counter[str] = Counter()
        self._seconds = _Histogram(
            "request_seconds", SECONDS, "Time from the head of a request to its answer."
        )
        self._model = _Histogram("batch_seconds", SECONDS, "Time of the model for a batch.")
        self._batches = _Histogram("batch_rows", ROWS, "Rows of a batch.")

    def request(self, status: int, seconds: float) -> None:
        """An answered request to /invocations."""
        with self._lock:
            self._requests[status] += 1
            self._seconds.add(seconds)

    def rows(self, answered: int, failed: int) -> None:
        """The rows of a request."""
        with self._lock:
            self._rows["answered"] += answered
            self._rows["failed"] += failed

    def batch(self, rows: int, seconds: float) -> None:
        """A batch of the model."""
        with self._lock:
            self._batches.add(rows)
            self._model.add(seconds)

    def text(self, waiting: int) -> str:
        """All of them.

        Args:
            waiting: rows that wait now.
        """
        with self._lock:
            return "\n".join([*self._lines(waiting), ""])

    def _lines(self, waiting: int) -> Iterator[str]:
        labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in self._facts.items())
        yield from _head("info", "gauge", "The model that is served.")
        yield f"{PREFIX}_info{{{labels}}} 1"
        yield from _head("requests_total", "counter", "Answered requests, by status.")
        for status, count in sorted(self._requests.items()):
            yield f'{PREFIX}_requests_total{{code="{status}"}} {count}'
        yield from _head("rows_total", "counter", "Rows, by outcome.")
        for outcome, count in sorted(self._rows.items()):
            yield f'{PREFIX}_rows_total{{outcome="{outcome}"}} {count}'
        yield from _head("waiting_rows", "gauge", "Rows that wait for the model.")
        yield f"{PREFIX}_waiting_rows {waiting}"
        for histogram in (self._seconds, self._model, self._batches):
            yield from histogram.lines()


def _head(name: str, kind: str, help_text: str) -> Iterator[str]:
    yield f"# HELP {PREFIX}_{name} {help_text}"
    yield f"# TYPE {PREFIX}_{name} {kind}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
