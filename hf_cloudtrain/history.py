"""What a run did over all its attempts, without what a resume has superseded: curves never double."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.catalog import READS_AT_ONCE, Attempt, Catalog, CheckpointKey
from hf_cloudtrain.process import in_threads
from hf_cloudtrain.storage import Storage


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

    @property
    def goodput(self) -> float | None:
        """Productive step time over the wall time of the run, restarts and all; None before the first step."""
        if not self.attempts:
            return None
        wall = max(info.last_seen for info in self.attempts) - min(info.started for info in self.attempts)
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
    attempts = catalog.attempts()
    committed = catalog.checkpoints()
    limits, scales = kept_steps(attempts), step_scales(attempts)
    numbers = [attempt.number for attempt in attempts]
    (beats,) = in_threads(catalog.read_progress, (numbers, READS_AT_ONCE))
    heartbeats = dict(zip(numbers, beats, strict=True))
    steps = catalog.read_steps()
    history = History(catalog.storage.url, [], [], [], {})
    for attempt in attempts:
        progress = heartbeats[attempt.number] or {}
        info = AttemptInfo(
            number=attempt.number,
            started=attempt.started,
            last_seen=max(attempt.started, _float(progress.get("time"))),
            state=str(progress.get("state", "started")),
            first_step=attempt.global_step,
            last_step=max(attempt.global_step, int(_float(progress.get("step")))),
            resumed_from=attempt.resumed_from,
            checkpoints=[key for key in committed if key.attempt == attempt.number],
            facts=attempt.facts,
            progress=progress,
        )
        lines = steps.get(attempt.number, [])
        _add_records(history, info, limits.get(attempt.number, -1.0), scales.get(attempt.number, 1.0), lines)
        # Records of the last seconds before a SIGKILL are lost; the heartbeat still knows how far it was.
        past = info.last_step - max(limits.get(attempt.number, -1.0), info.first_step)
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
    for line in (line for batch in batches for line in batch.splitlines()):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a line cut off is worth less than the rest
        if not isinstance(record, dict):
            continue
        if record.get("kind") == "steps":
            _add_steps(history, info, limit, scale, record)
        elif record.get("kind") == "log" and isinstance(record.get("step"), int):
            kept = {key: value for key, value in record.items() if key != "kind"}
            kept = {**kept, "time": _float(kept.get("time")), "attempt": info.number}
            if record["step"] <= limit:
                history.logs.append({**kept, "step": round(record["step"] * scale)})
            else:
                history.superseded.append(kept)


def _add_steps(
    history: History, info: AttemptInfo, limit: float, scale: float, record: dict[str, Any]
) -> None:
    first, seconds = record.get("first"), record.get("seconds")
    if not isinstance(first, int) or not isinstance(seconds, list):
        return
    for offset, duration in enumerate(map(_float, seconds)):
        step = first + offset
        info.last_step = max(info.last_step, step)
        if step <= limit:
            today = math.ceil(step * scale)  # several of them may make one step of today
            before = history.step_seconds.get(today, 0.0) if scale < 1 else 0.0
            history.step_seconds[today] = before + duration
            info.kept_steps += 1
            info.productive_seconds += duration
        else:
            info.redone_steps += 1
            info.redone_seconds += duration


def _float(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, (int, float)) else 0.0
    except OverflowError:
        return 0.0
    return number if math.isfinite(number) else 0.0
