"""The card of a run in a notebook, renewed while a cell trains: from what the training has in memory, without a request.

The training only adds what it logs to a list; a thread draws. Nothing that goes wrong here reaches the training.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from dataclasses import fields
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.report.card import card, facts
from hf_cloudtrain.report.curves import loss_chart
from hf_cloudtrain.runtime.threads import SafeTurn
from hf_cloudtrain.tracking.history import AttemptInfo, History, history_of
from hf_cloudtrain.tracking.status import RunState, losses
from hf_cloudtrain.tracking.tracker import StepTracker

DRAW_SECONDS = 2.0
"""Between two drawings."""
SHARE = 0.02
"""Most of the time that is spent on drawing."""
MOST_LOGS = 20_000
"""Losses that are kept; above it, every second one."""
LAST_SECONDS = 10.0
"""The end of a training waits so long for the last drawing."""


def kernel() -> Any:
    """The shell of the notebook whose kernel this process is; None elsewhere, and in a fork of one, which cannot display."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    session = getattr(getattr(shell, "kernel", None), "session", None)
    return shell if session is not None and getattr(session, "pid", None) == os.getpid() else None


def show(bundle: dict[str, str]) -> Any:
    """Show something in the output of the cell that runs, by MIME type; `update` of what is returned replaces it."""
    ipython: Any = importlib.import_module("IPython.display")
    return ipython.display(bundle, raw=True, display_id=True)


class LiveCard:
    """The card of the attempt that a cell trains.

    Args:
        catalog: of the run; its records are read once, for the curve of earlier attempts.
        attempt: the number of the attempt.
        tracker: of the attempt.

    Example:
        >>> live = LiveCard.of(catalog, 3, tracker)      # None if this is not a notebook
        >>> if live is not None:
        ...     live.close()
    """

    def __init__(self, catalog: Catalog, attempt: int, tracker: StepTracker) -> None:
        self._catalog = catalog
        self._attempt = attempt
        self._tracker = tracker
        self._logs: list[dict[str, Any]] = []
        self._history: History | None = None
        self._closing = threading.Event()
        self._turn = SafeTurn("The card of the run")
        self._handle: Any = None
        self._thread = threading.Thread(target=self._draw_again, name="cloudtrain-card", daemon=True)

    @classmethod
    def of(cls, catalog: Catalog, attempt: int, tracker: StepTracker) -> LiveCard | None:
        """A card in the output of the cell that runs; None if this is not a notebook."""
        if kernel() is None:
            return None
        live = cls(catalog, attempt, tracker)
        with live._turn:
            live._handle = show(live.bundle())
            tracker.on_log = live.note
            live._thread.start()
        return live

    def note(self, step: int, metrics: dict[str, Any]) -> None:
        """Note what the training logs of its loss."""
        shown: dict[str, Any] = {name: metrics[name] for name in ("loss", "eval_loss") if name in metrics}
        if not shown:
            return
        self._logs.append({**shown, "step": step, "time": time.time(), "attempt": self._attempt})
        if len(self._logs) > MOST_LOGS:
            self._logs = self._logs[::2]

    def close(self) -> None:
        """Draw the last time, after the end of the attempt is recorded."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(LAST_SECONDS)

    def bundle(self) -> dict[str, str]:
        """What the cell shows now, by MIME type."""
        beat = self._tracker.heartbeat()
        names = {field.name for field in fields(RunState)}
        known = {**{key: beat[key] for key in beat if key in names}, **losses(beat)}
        now = RunState(self._catalog.storage.url, **known)
        chart = loss_chart(self.history())
        plain = f"{now.run_url}: {now.state}, {', '.join(facts(now))}"
        return {"text/html": card(now, None if chart is None else chart.figure), "text/plain": plain}

    def history(self) -> History:
        """Earlier attempts as their records tell, and this one as far as it has logged."""
        before = self._history
        if before is None:
            before = History(self._catalog.storage.url, [_attempt(self._attempt)], [], [], {})
        logs = [log for log in before.logs if log["attempt"] != self._attempt]
        return History(before.run_url, before.attempts, [*logs, *self._logs], before.superseded, {})

    def _draw_again(self) -> None:
        with self._turn:
            self._history = history_of(self._catalog)
        pause = DRAW_SECONDS
        is_over = False
        while not is_over:
            is_over = self._closing.wait(pause)
            began = time.perf_counter()
            with self._turn:
                self._handle.update(self.bundle(), raw=True)
            pause = max(DRAW_SECONDS, (time.perf_counter() - began) / SHARE)


def _attempt(number: int) -> AttemptInfo:
    now = time.time()
    return AttemptInfo(number, now, now, "training", 0, 0, None)
