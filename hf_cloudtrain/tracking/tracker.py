"""The steps of an attempt while it trains: times, metrics and pauses, stored with its heartbeat.

A thread of rank 0 writes every 15 s a heartbeat (`progress/<attempt>.json`) and the new step and metric records
(`steps/<attempt>-<batch>.jsonl`; object stores cannot append, so the newest batch is rewritten until it is large enough).
The training loop only notes times in memory: no device sync, no collective, no network.

    {"kind": "steps", "first": 101, "seconds": [0.21, 0.2, …], "samples": 32, "time": 1790000000.0}
    {"kind": "log", "step": 110, "time": 1790000002.1, "metrics": {"loss": 0.53, "learning_rate": 4.1e-05}}
    {"kind": "pause", "step": 150, "why": "evaluation", "time": 1790000010.0, "seconds": 31.2}
    {"kind": "log", "step": 110, "rank": 2, "time": …, "metrics": {"loss": 0.55}}    in a file of that rank
    {"kind": "commit", "checkpoint": "000001-0000000150", "saved": 1790000041.0, "time": 1790000055.1, "size": 438000000}
"""

from __future__ import annotations

import logging
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.checkpoints.upload_status import UploadStatus
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.runtime.threads import SafeTurn, before_exit
from hf_cloudtrain.runtime.values import finite, recordable, utf8
from hf_cloudtrain.tracking.host import HostMetrics
from hf_cloudtrain.tracking.records import StepRecords, encode_lines
from hf_cloudtrain.tracking.services.event_files import EventFiles

logger = logging.getLogger(__name__)

BATCH_BYTES = 256 * 2**10
"""Size above which a new batch of records is started: some 5,000 steps, and little to rewrite every 15 s."""
SAVE_FLUSH_SECONDS = 2.0
"""Shortest time between two writes of records if saves are very frequent."""
PAUSE_SECONDS = 1.0
"""Shortest time between two steps that is recorded as a pause: a pause after every step must stay cheap."""
CLOSE_SECONDS = 30.0
"""Longest wait for the last records, at the end."""
RECENT_STEPS = 50
"""The latest steps, from which rate and eta are computed."""
RECENT_SAVES = 5
"""The latest saves, whose median length is told."""
MOST_DROPPED = 50
"""Metrics that are named because they cannot be recorded."""


class StepTracker:
    """Tracks the steps of one attempt.

    Args:
        samples_per_step: samples of all processes in one optimizer step; None if unknown.
        uploads: the state of this process's uploads, read at each heartbeat.
        ownership: whether the attempt is still the newest; once it is not, the state is `overtaken`.
        pages: where users find its tracker runs, by service; read at each heartbeat.
        files: event files of its tracker runs, by service; stored after each save.
        rank: one other than 0 records what it logs, and sends no heartbeat.

    Example:
        >>> tracker = StepTracker(catalog, attempt=3, first_step=500, total_steps=1_000)
        >>> tracker.start()
        >>> tracker.begin_step(); train(); tracker.end_step(501)
        >>> tracker.log(501, {"loss": 0.53})
        >>> tracker.close("finished")
    """

    def __init__(
        self,
        catalog: Catalog,
        attempt: int,
        *,
        first_step: int,
        total_steps: int | None,
        samples_per_step: int | None = None,
        uploads: UploadStatus | None = None,
        ownership: Ownership | None = None,
        pages: dict[str, str] | None = None,
        files: dict[str, EventFiles] | None = None,
        rank: int = 0,
    ) -> None:
        self.step = first_step
        self.productive_seconds = 0.0
        self._catalog = catalog
        self._attempt, self._rank = attempt, rank
        self._total_steps = total_steps
        self._samples_per_step = samples_per_step
        self._uploads = uploads or UploadStatus()
        self._pages = {} if pages is None else pages
        self._files = {} if files is None else files
        self._host, self._price = HostMetrics(), _price()
        self._commit_lag: float | None = None
        self._ownership = ownership
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._saves: deque[float] = deque(maxlen=RECENT_SAVES)
        self._steps: list[tuple[int, float]] = []
        self._logs: list[dict[str, Any]] = []
        self._last_metrics: dict[str, tuple[int, Any]] = {}
        """The step and the value of each metric when it was reported last."""
        self.on_log: Callable[[int, dict[str, Any]], None] | None = None
        """Receives each step and its metrics at once."""
        self._dropped: set[str] = set()
        """Metrics that were named in a warning because they cannot be recorded."""
        self._tokens: tuple[int, float] | None = None
        self._tokens_per_second: float | None = None
        self._mark: float | None = None
        self._pause: tuple[float, str] | None = (time.perf_counter(), "start")
        """When the current pause started, and why."""
        self._last_step_time = time.time()
        """When the last step was finished; before the first one, when tracking started."""
        self._state = "training"
        self._batch = 1
        self._batch_data = b""
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._flush_now = False
        self._interval = env.heartbeat()
        self._warned: set[str] = set()
        self._turn = SafeTurn("The heartbeat")
        self._thread = threading.Thread(target=self._beat, name="cloudtrain-heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread that writes the heartbeats."""
        self._thread.start()
        before_exit(self._close_at_exit)

    def expect(self, total_steps: int | None, samples_per_step: int | None) -> None:
        """Correct what was expected of the training, as its first steps show it."""
        self._total_steps, self._samples_per_step = total_steps, samples_per_step

    def begin_step(self) -> None:
        """Mark the start of a step: the first one, or the first after a pause. Others start when the last one ends."""
        if self._mark is None:
            self._mark = time.perf_counter()
            self._end_pause(self._mark)

    def end_step(self, step: int, tokens_seen: int | None = None) -> None:
        """Mark the end of optimizer step `step`; `tokens_seen` since the start of the run, if tokens are counted."""
        now = time.perf_counter()
        seconds = now - self._mark if self._mark is not None else 0.0
        self._mark = now
        with self._lock:
            self.step = step
            self._last_step_time = time.time()
            self.productive_seconds += seconds
            self._recent.append(seconds)
            self._steps.append((step, seconds))
        if tokens_seen:
            if self._tokens is not None and now > self._tokens[1]:
                self._tokens_per_second = (tokens_seen - self._tokens[0]) / (now - self._tokens[1])
            self._tokens = (tokens_seen, now)

    def pause(self, why: str = "pause") -> None:
        """Exclude the time from the end of the last step to the next `begin_step` (an `evaluation`, a `save`)."""
        if self._mark is not None:
            self._pause = (self._mark, why)
        self._mark = None

    def _end_pause(self, now: float) -> None:
        if self._pause is None:
            return
        (began, why), self._pause = self._pause, None
        seconds = now - began
        if why == "save":
            self._saves.append(seconds)
        if seconds >= PAUSE_SECONDS:
            times = {"time": time.time() - seconds, "seconds": round(seconds, 3)}
            with self._lock:
                self._logs.append({"kind": "pause", "step": self.step, "why": why, **times})

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Note metrics as they were reported: numbers, also those that are not finite, and texts."""
        kept = {}
        for name, value in metrics.items():
            try:
                kept[utf8(str(name))] = recordable(value)
            except Exception as error:  # noqa: BLE001 - whatever a value raises, the training continues
                self._name_dropped(name, error)
        with self._lock:
            self._last_metrics.update({name: (step, value) for name, value in kept.items()})
            of_rank = {"rank": self._rank} if self._rank else {}
            self._logs.append({"kind": "log", "step": step, "time": time.time(), "metrics": kept, **of_rank})
        if self.on_log is not None:
            self.on_log(step, kept)

    def flush_soon(self) -> None:
        """Store the records now instead of with the next heartbeat, so that those up to a checkpoint are not lost."""
        self._flush_now = True
        self._wake.set()

    def close(self, state: str) -> None:
        """Write the last records and the last heartbeat, with `state`: `finished`, `failed`, `stopped` or `preempted`."""
        if self._closed:
            return
        self._state = state
        self._closed = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=CLOSE_SECONDS)

    def _name_dropped(self, name: object, error: Exception) -> None:
        shown = repr(name)[:100] if isinstance(name, str) else f"of type {type(name).__name__}"
        if shown not in self._dropped and len(self._dropped) < MOST_DROPPED:
            self._dropped.add(shown)
            logger.warning(
                "The metric %s is not recorded: it is %s. Report numbers and texts only.", shown, error
            )

    def _close_at_exit(self) -> None:
        self.close("stopped" if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt) else "failed")
        if self._thread.is_alive():
            self._name_files("There was no time to store everything")

    def _name_files(self, why: str) -> None:
        if self._files:
            logger.warning(
                "%s: the end of the event files in %s may be on this machine only. Copy them to keep it.",
                why,
                " and ".join(repr(str(files.folder)) for files in self._files.values()),
            )

    def heartbeat(self) -> dict[str, Any]:
        """The content of `progress/<attempt>.json` now. Rates are per second over the last 50 steps, times in seconds."""
        with self._lock:
            typical = statistics.median(self._recent) if self._recent else None
            mean = statistics.fmean(self._recent) if self._recent else None
            step, metrics = self.step, dict(self._last_metrics)
        loss_step, loss = metrics.get("loss", (None, None))
        left = max(0, self._total_steps - step) if self._total_steps is not None else None
        uploads = self._uploads
        overtaken = self._ownership is not None and self._ownership.overtaken_by is not None
        beat = {
            "attempt": self._attempt,
            "state": "overtaken" if overtaken else self._state,
            "time": time.time(),
            "interval_seconds": self._interval,
            "step": step,
            "total_steps": self._total_steps,
            "step_seconds": typical,
            "samples_per_second": self._samples_per_step / mean if self._samples_per_step and mean else None,
            "tokens_per_second": self._tokens_per_second,
            "eta_seconds": left * mean if left is not None and mean is not None else None,
            "productive_seconds": self.productive_seconds,
            "price_per_hour": self._price,
            "save_seconds": statistics.median(self._saves) if self._saves else None,
            "loss": loss,
            "loss_step": loss_step,
            "learning_rate": metrics.get("learning_rate", (None, None))[1],
            "last_committed": _text(uploads.last_committed),
            "last_step_time": self._last_step_time,
            "last_saved": _text(uploads.last_saved),
            "last_saved_time": uploads.last_saved_time,
            "commit_lag_seconds": self._commit_lag,
            "trackers": dict(self._pages),
        }
        return {name: finite(value) for name, value in beat.items()}

    def _beat(self) -> None:
        last_flush = time.monotonic()
        next_beat = last_flush
        while True:
            # Read before the work: a `close` in the meantime takes effect in the next round.
            closed = self._closed
            self._wake.clear()
            now = time.monotonic()
            with self._turn:
                self._note_uploads()
            saved = False
            if closed or now >= self._next_flush(last_flush):
                saved, self._flush_now, last_flush = self._flush_now or closed, False, now
                self._store(self._store_records)
            if closed or now >= next_beat:
                next_beat = now + self._interval
                if not self._rank:
                    self._store(self._write_heartbeat)
            if saved and not (self._ownership and self._ownership.overtaken_by):
                store = partial(self._store_files, to_their_end=closed)
                if not self._store(store, "event files of a tracker") and closed:
                    self._name_files("The last event files of a tracker could not be stored")
            if closed:
                return
            if not self._closed:
                self._wake.wait(max(0.0, min(next_beat, self._next_flush(last_flush)) - time.monotonic()))

    def _store(self, write: Callable[[], None], what: str = "the heartbeat") -> bool:
        """Call `write`, which may fail: the others still have their turn, and each has its next one. Whether it did not."""
        with self._turn:
            try:
                write()
                return True
            except CloudTrainError as error:
                say = logger.debug if what in self._warned else logger.warning
                say("Cannot store %s: %s", what, error)
                self._warned.add(what)
        return False

    def _write_heartbeat(self) -> None:
        self._catalog.attempts.write_progress(self._attempt, {**self.heartbeat(), "host": self._host.read()})

    def _store_files(self, *, to_their_end: bool) -> None:
        """A part of each; the rest of a large one has to wait for the next heartbeat, except at the end."""
        for files in list(self._files.values()):
            while (more := files.store()) and to_their_end:
                pass
            if more:
                self._flush_now = True

    def _next_flush(self, last: float) -> float:
        return last + min(self._interval, SAVE_FLUSH_SECONDS if self._flush_now else self._interval)

    def _note_uploads(self) -> None:
        for commit in self._uploads.take_commits():
            self._commit_lag = max(0.0, commit.committed - commit.saved)
            record = {"saved": commit.saved, "time": commit.committed, "size": commit.size}
            with self._lock:
                self._logs.append({"kind": "commit", "checkpoint": str(commit.key), **record})

    def _store_records(self) -> None:
        with self._lock:
            steps, self._steps = self._steps, []
            logs, self._logs = self._logs, []
        if not steps and not logs:
            return
        lines = [*_step_lines(steps, self._samples_per_step), *logs]
        data = self._batch_data + encode_lines(lines)
        try:
            StepRecords(self._catalog.storage).write(self._attempt, self._batch, data, self._rank)
        except Exception:
            with self._lock:  # for the next try
                self._steps[:0] = steps
                self._logs[:0] = logs
            raise
        self._batch_data = data
        if len(data) > BATCH_BYTES:
            self._batch, self._batch_data = self._batch + 1, b""


def _step_lines(steps: list[tuple[int, float]], samples: int | None) -> list[dict[str, Any]]:
    """One line for each range of consecutive steps."""
    lines: list[dict[str, Any]] = []
    for step, seconds in steps:
        if not lines or step != lines[-1]["first"] + len(lines[-1]["seconds"]):
            facts = {"samples": samples, "time": time.time()}
            lines.append({"kind": "steps", "first": step, "seconds": [], **facts})
        lines[-1]["seconds"].append(round(seconds, 6))
    return lines


def _text(key: CheckpointKey | None) -> str | None:
    return None if key is None else str(key)


def _price() -> float | None:
    try:
        return env.price()
    except ConfigurationError as error:  # not worth the end of a training
        logger.warning("%s The pages show no cost.", error)
        return None
