"""What a run did over all its attempts, without what a resume has superseded: curves never double."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeGuard

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, parse_checkpoint_key
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.client import READS_AT_ONCE, Storage
from hf_cloudtrain.tracking.records import StepRecords

SLOW_STEP = 10.0
"""A step that takes so many times as long as the usual one, and a second at least, is a stall."""
SLOW_STEP_SECONDS = 1.0
MOST_STRETCHES = 500
"""Pauses, and stalls, of one attempt that are kept: the longest."""


@dataclass(frozen=True)
class Stretch:
    """A time of one attempt in which no step was finished."""

    why: str
    """`start`, `evaluation`, `save`, `pause`, or `stall`: a step that took far longer than the others."""
    step: int
    """The last step that was done; of a stall, the slow one. As that attempt counted."""
    began: float
    seconds: float


@dataclass(frozen=True)
class CommitInfo:
    """When a checkpoint was saved, and when it was on storage; it may be gone since."""

    key: CheckpointKey
    saved: float
    committed: float
    size: int | None = None

    @property
    def lag(self) -> float:
        """Seconds for which a loss of the machine would have lost it."""
        return max(0.0, self.committed - self.saved)


@dataclass
class AttemptInfo:
    """One attempt, as far as its records tell."""

    number: int
    started: float
    """Seconds since 1970, as all times here."""
    last_seen: float
    """Last heartbeat."""
    state: str
    """`training`, `finished`, `failed`, `stopped`, `overtaken`; `training` with an old heartbeat was killed."""
    first_step: int
    """The step it began after."""
    last_step: int
    resumed_from: CheckpointKey | None
    checkpoints: list[CheckpointKey] = field(default_factory=list)
    kept_steps: int = 0
    redone_steps: int = 0
    """Steps of it that a later attempt did again."""
    productive_seconds: float = 0.0
    """Time of the kept steps."""
    redone_seconds: float = 0.0
    kept_until: float = 0.0
    """When the last step of it that counts was done; its start where none does."""
    stretches: list[Stretch] = field(default_factory=list)
    """In which no step was done, by time."""
    facts: dict[str, str] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    """Its last heartbeat, whole."""


@dataclass
class History:
    """All attempts of a run, joined."""

    run_url: str
    attempts: list[AttemptInfo]
    logs: list[dict[str, Any]]
    """Reported metrics that count, by step: each has `step`, `time`, `attempt` and what was reported.

    Steps are those of the newest attempt: where one before had steps of another size, its numbers are converted.
    """
    superseded: list[dict[str, Any]]
    """Reported metrics of steps that were done again."""
    step_seconds: dict[int, float]
    """Time of each step that counts."""
    step_attempts: dict[int, int] = field(default_factory=dict)
    """Which attempt did each of them."""
    redone_step_seconds: list[tuple[int, int, float]] = field(default_factory=list)
    """(attempt, step as it counted, seconds) of each step that was done again."""
    commits: dict[CheckpointKey, CommitInfo] = field(default_factory=dict)
    """Checkpoints whose commit was recorded."""

    @property
    def wall_seconds(self) -> float:
        """From the start of the first attempt to the last heartbeat, whatever happened in between."""
        if not self.attempts:
            return 0.0
        return max(info.last_seen for info in self.attempts) - min(info.started for info in self.attempts)

    @property
    def goodput(self) -> float | None:
        """Productive step time over the wall time of the run, restarts and all; None before the first step."""
        wall = self.wall_seconds
        productive = sum(info.productive_seconds for info in self.attempts)
        return min(1.0, productive / wall) if wall > 0 and productive > 0 else None


def read_history(run_url: str | None, storage_options: dict[str, Any] | None = None) -> History:
    """Read the records of a run.

    Args:
        run_url: any fsspec URL; None takes `HF_CLOUDTRAIN_RUN_URL`.

    Raises:
        StorageError: the storage does not answer.

    Example:
        >>> history = read_history("s3://bucket/runs/mrpc")
        >>> [(log["step"], log["loss"]) for log in history.logs if "loss" in log]
    """
    storage = Storage(env.run_url(run_url), env.storage_options(storage_options))
    return history_of(Catalog(storage))


def history_of(catalog: Catalog) -> History:
    """The same, of an open catalog."""
    attempts = catalog.attempts.read_all()
    committed = catalog.checkpoints()
    limits, scales = kept_steps(attempts), step_scales(attempts)
    numbers = [attempt.number for attempt in attempts]
    (beats,) = in_threads(catalog.attempts.read_progress, (numbers, READS_AT_ONCE))
    heartbeats = dict(zip(numbers, beats, strict=True))
    steps = StepRecords(catalog.storage).read()
    history = History(catalog.storage.url, [], [], [], {})
    for attempt in attempts:
        progress = heartbeats[attempt.number] or {}
        info = AttemptInfo(
            number=attempt.number,
            started=(started := _float(attempt.started)),
            last_seen=max(started, _float(progress.get("time"))),
            state=str(progress.get("state", "started")),
            first_step=attempt.global_step,
            last_step=max(attempt.global_step, int(_float(progress.get("step")))),
            resumed_from=attempt.resumed_from,
            checkpoints=[key for key in committed if key.attempt == attempt.number],
            facts=attempt.facts,
            progress=progress,
        )
        lines = steps.get(attempt.number, [])
        limit = limits.get(attempt.number, -1.0)
        _add_records(history, info, limit, scales.get(attempt.number, 1.0), lines)
        # Records of the last seconds before a SIGKILL are lost; the heartbeat still knows how far it was.
        past = info.last_step - max(limit, info.first_step)
        info.redone_steps = max(info.redone_steps, int(max(0.0, past)))
        history.attempts.append(info)
    history.logs.sort(key=lambda log: (log["step"], log["time"]))
    return history


def kept_steps(attempts: list[Attempt]) -> dict[int, float]:
    """For each attempt in the line that led to the newest one, the last step of it that counts."""
    by_number = {attempt.number: attempt for attempt in attempts}
    current = max(by_number, default=None)
    limit = math.inf
    kept: dict[int, float] = {}
    while current is not None and current in by_number and current not in kept:
        kept[current] = limit
        parent = by_number[current].resumed_from
        if parent is None:
            break
        current, limit = parent.attempt, parent.step
    return kept


def step_scales(attempts: list[Attempt]) -> dict[int, float]:
    """For each attempt in that line, how many steps of the newest attempt one of its steps is (law 8)."""
    by_number = {attempt.number: attempt for attempt in attempts}
    scales: dict[int, float] = {}
    current, scale = max(by_number, default=None), 1.0
    while current is not None and current in by_number and current not in scales:
        scales[current] = scale
        parent = by_number[current].resumed_from
        if parent is None:
            break
        if parent.step and by_number[current].global_step:
            scale *= by_number[current].global_step / parent.step
        current = parent.attempt
    return scales


def _add_records(
    history: History, info: AttemptInfo, limit: float, scale: float, batches: list[bytes]
) -> None:
    clock = _Clock(info)
    for line in (line for batch in batches for line in batch.splitlines()):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a line cut off is worth less than the rest
        if not isinstance(record, dict):
            continue
        if record.get("kind") == "steps":
            _add_steps(history, info, limit, scale, record, clock)
        elif record.get("kind") == "pause":
            _add_pause(info, record)
        elif record.get("kind") == "commit":
            _add_commit(history, record)
        elif record.get("kind") == "log" and _is_step(record.get("step")):
            kept = {key: value for key, value in record.items() if key != "kind"}
            kept = {**kept, "time": _float(kept.get("time")), "attempt": info.number}
            clock.anchor(record["step"], kept["time"])
            if record["step"] <= limit:
                history.logs.append({**kept, "step": round(record["step"] * scale)})
            else:
                history.superseded.append(kept)
    for pause in info.stretches:
        clock.anchor(pause.step, pause.began, pause.began + pause.seconds)
    clock.set()
    info.kept_until = clock.time_of(limit) if limit >= info.first_step else info.started
    info.stretches = sorted(
        [*_longest(info.stretches), *_longest(clock.stalls())], key=lambda stretch: stretch.began
    )


def _add_pause(info: AttemptInfo, record: dict[str, Any]) -> None:
    why, step = record.get("why"), record.get("step")
    began, seconds = _float(record.get("time")), _float(record.get("seconds"))
    if _is_step(step) and began > 0 and seconds > 0:
        known = why if isinstance(why, str) and why in ("start", "evaluation", "save") else "pause"
        info.stretches.append(Stretch(known, step, began, seconds))


def _add_commit(history: History, record: dict[str, Any]) -> None:
    found = parse_checkpoint_key(str(record.get("checkpoint")))
    saved, committed, size = _float(record.get("saved")), _float(record.get("time")), record.get("size")
    if found and saved > 0 and committed > 0:
        key = CheckpointKey(*found)
        size = size if isinstance(size, int) and 0 <= size < 2**63 else None
        before = history.commits.get(key)
        if before is None or committed < before.committed:  # rank 0 may hear of one from two sides
            size = before.size if size is None and before is not None else size
            history.commits[key] = CommitInfo(key, saved, committed, size)


def _longest(stretches: list[Stretch]) -> list[Stretch]:
    return sorted(stretches, key=lambda stretch: -stretch.seconds)[:MOST_STRETCHES]


class _Clock:
    """When each step of an attempt was done: its records tell some of the times, and how long each step took."""

    def __init__(self, info: AttemptInfo) -> None:
        self._info = info
        self._anchors: list[tuple[int, float, float]] = [(info.first_step, info.started, info.started)]
        self._seconds: dict[int, float] = {}

    def anchor(self, step: int, time: float, until: float | None = None) -> None:
        """That step was done at `time`; the next one began at `until`."""
        if time > 0:
            self._anchors.append((step, time, time if until is None else until))

    def add(self, step: int, seconds: float) -> None:
        """How long a step took."""
        self._seconds[step] = seconds

    def set(self) -> None:
        """Nothing more is added."""
        self._anchors.sort()
        self._steps = sorted(self._seconds)
        self._sums = [0.0, *accumulate(self._seconds[step] for step in self._steps)]

    def time_of(self, step: float) -> float:
        """When it was done, within the attempt."""
        last = bisect_right(self._anchors, (step, math.inf, math.inf)) - 1
        anchor, done, next_began = self._anchors[max(0, last)]
        after = bisect_right(self._steps, anchor), bisect_right(self._steps, step)
        time = next_began + self._sums[after[1]] - self._sums[after[0]] if after[1] > after[0] else done
        return min(max(time, self._info.started), self._info.last_seen)

    def stalls(self) -> list[Stretch]:
        """The steps that took far longer than the others."""
        if len(self._steps) < 2:
            return []
        usual = sorted(self._seconds.values())[len(self._seconds) // 2]
        limit = max(SLOW_STEP_SECONDS, SLOW_STEP * usual)
        slow = [(step, seconds) for step, seconds in self._seconds.items() if seconds > limit]
        return [
            Stretch("stall", step, max(self._info.started, self.time_of(step) - seconds), seconds)
            for step, seconds in slow
        ]


def _add_steps(
    history: History, info: AttemptInfo, limit: float, scale: float, record: dict[str, Any], clock: _Clock
) -> None:
    first, seconds = record.get("first"), record.get("seconds")
    if not _is_step(first) or not isinstance(seconds, list):
        return
    for offset, duration in enumerate(map(_float, seconds)):
        step = first + offset
        info.last_step = max(info.last_step, step)
        clock.add(step, duration)
        if step <= limit:
            today = math.ceil(step * scale)  # several of them may make one step of today
            before = history.step_seconds.get(today, 0.0) if scale < 1 else 0.0
            history.step_seconds[today] = before + duration
            history.step_attempts[today] = info.number
            info.kept_steps += 1
            info.productive_seconds += duration
        else:
            info.redone_steps += 1
            info.redone_seconds += duration
            history.redone_step_seconds.append((info.number, step, duration))


def _is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**53


def _float(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, (int, float)) else 0.0
    except OverflowError:
        return 0.0
    return number if math.isfinite(number) else 0.0
