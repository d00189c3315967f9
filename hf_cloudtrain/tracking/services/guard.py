"""An error of a tracker must not end a training: it is logged once, without secrets."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import copy_context
from time import monotonic

from hf_cloudtrain.runtime.redaction import redact, secrets_of_environment
from hf_cloudtrain.runtime.threads import answer_in_time

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 10.0
"""Longest time that an emergency save gives a tracker; it has at most a quarter of the time that is left."""


class TrackerGuard:
    """Catches the errors of one tracker.

    Example:
        >>> guard = TrackerGuard("mlflow")
        >>> with guard("failed"):
        ...     mlflow.log_metrics(metrics, step=step)
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._told: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Within it, an error is a warning, the first time.

        Args:
            what: what the tracker did, as in "did not start".
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of any library
            kind = type(error).__name__
            say = logger.debug if f"{what} {kind}" in self._told else logger.warning
            self._told.add(f"{what} {kind}")
            text = redact(str(error), secrets_of_environment())[:500]
            say("The tracker %s %s. Training goes on. %s: %s", self._name, what, kind, text)

    def flush(self, work: Callable[[], None], seconds_left: float) -> None:
        """Let a tracker send what waits, in a thread that is left alone when its time is over.

        Args:
            seconds_left: until the machine ends.
        """
        seconds = min(FLUSH_SECONDS, seconds_left / 4)
        until, here = monotonic() + seconds, copy_context()
        with self(f"did not send everything within {seconds:.1f} s"):
            answer_in_time(lambda: here.run(work), lambda: monotonic() > until)
