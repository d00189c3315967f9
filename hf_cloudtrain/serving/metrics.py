"""What a server has done so far, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
PREFIX = "cloudtrain_serve"


class Metrics:
    """The metrics of one server.

    Args:
        facts: of the model: run, checkpoint, task.
    """

    def __init__(self, facts: Mapping[str, str]) -> None:
        found = self._registry = CollectorRegistry()
        Info(PREFIX, "The model that is served.", registry=found).info(dict(facts))
        self.requests = Counter(
            f"{PREFIX}_requests", "Answered requests, by status.", ["code"], registry=found
        )
        self.rows = Counter(f"{PREFIX}_rows", "Rows, by outcome.", ["outcome"], registry=found)
        self.waiting = Gauge(f"{PREFIX}_waiting_rows", "Rows that wait for the model.", registry=found)
        self.request_seconds = Histogram(
            f"{PREFIX}_request_seconds",
            "Time from the head of a request to its answer.",
            buckets=SECONDS,
            registry=found,
        )
        self.batch_seconds = Histogram(
            f"{PREFIX}_batch_seconds", "Time of the model for a batch.", buckets=SECONDS, registry=found
        )
        self.batch_rows = Histogram(f"{PREFIX}_batch_rows", "Rows of a batch.", buckets=ROWS, registry=found)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
