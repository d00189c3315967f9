"""What a run did in all its attempts, joined to one history: steps that were redone are counted once, so no curve doubles."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.runtime.values import number
from hf_cloudtrain.storage.client import READS_AT_ONCE, Storage
from hf_cloudtrain.tracking.evidence import gather, is_step
from hf_cloudtrain.tracking.records import StepRecords, decode_lines, metrics_of
from hf_cloudtrain.tracking.status import state_of
from hf_cloudtrain.tracking.stretches import StepClock, Stretch, longest


@dataclass(frozen=True)
class CommitInfo:
    """When a checkpoint was saved and when it was committed; it may have been deleted since."""

    key: CheckpointKey
    saved: float
    committed: float
    size: int | None = None

    @property
    def lag(self) -> float:
        """Seconds in which a loss of the machine would have lost it."""
        return max(0.0, self.committed - self.saved)


@dataclass
class AttemptInfo:
    """One attempt, as far as it was recorded."""

    number: int
    started: float
    """Seconds since 1970, as all times here."""
    last_seen: float
    """Its last sign of life: heartbeat, record, or save."""
    state: str
    """As recorded: `training`, `finished`, `failed`, `stopped`, `preempted`, `overtaken`. A killed attempt stays `training`."""
    first_step: int
    """The step after which it started."""
    last_step: int
    resumed_from: CheckpointKey | None
    checkpoints: list[CheckpointKey] = field(default_factory=list)
    kept_steps: int = 0
    redone_steps: int = 0
    """Its steps that a later attempt did again."""
    productive_seconds: float = 0.0
    """Time of the kept steps."""
    redone_seconds: float = 0.0
    kept_until: float = 0.0
    """When its last kept step was finished; its start if none is kept."""
    stretches: list[Stretch] = field(default_factory=list)
    """Without a finished step, by time."""
    facts: dict[str, str] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    """Its last heartbeat, complete."""
    was_killed: bool = False
    """It recorded no end and is not alive: `last_seen`, `last_step` and `redone_steps` are lower bounds."""
    samples_per_step: int | None = None
    untimed_steps: int = 0
    """Kept steps whose time was not recorded, so that `productive_seconds` is a lower bound."""

    @property
    def seconds(self) -> float:
        """From its start to its last sign of life."""
        return max(0.0, self.last_seen - self.started)

    @property
    def price(self) -> float | None:
        """Of an hour of all its machines, in the currency of the user; None if it was not recorded."""
        price = number(self.progress.get("price_per_hour"))
        return price if price is None or price >= 0 else None


INTERRUPTED = ("preempted", "failed")
"""States of attempts that did not end as planned, beside those that were killed."""


@dataclass
class History:
    """All attempts of a run, joined."""

    run_url: str
    attempts: list[AttemptInfo]
    logs: list[dict[str, Any]]
    """Metrics of kept steps, by step: each has `step`, `time`, `attempt` and what was reported. A metric with one of these
    names, or `kind` or `metrics`, has `user/` in front. Values that are not finite are the texts `nan`, `inf` and `-inf`.

    Steps are those of the newest attempt: if a step had a different size before, its number is converted.
    """
    superseded: list[dict[str, Any]]
    """Metrics of steps that were redone."""
    step_seconds: dict[int, float]
    """Time of each kept step."""
    step_attempts: dict[int, int] = field(default_factory=dict)
    """The attempt of each kept step."""
    redone_step_seconds: list[tuple[int, int, float]] = field(default_factory=list)
    """(attempt, step in its own numbers, seconds) of each step that was redone."""
    commits: dict[CheckpointKey, CommitInfo] = field(default_factory=dict)
    """Checkpoints whose commit was recorded."""
    read_at: float = 0.0
    """When it was read, by the clock of the training machine as far as its difference to ours is known."""

    @property
    def wall_seconds(self) -> float:
        """From the start of the first attempt to the last sign of life, including the time between attempts."""
        if not self.attempts:
            return 0.0
        return max(info.last_seen for info in self.attempts) - min(info.started for info in self.attempts)

    @property
    def is_redone_bound(self) -> bool:
        """Whether more steps may have been redone than are known: those that a killed attempt did after its last sign of life."""
        return any(info.was_killed for info in self.attempts[:-1])

    @property
    def is_goodput_bound(self) -> bool:
        """Whether the goodput may be higher: the time of some kept steps was not recorded."""
        return any(info.untimed_steps for info in self.attempts)

    @property
    def goodput(self) -> float | None:
        """Productive step time over the wall time of the run, including restarts; None before the first step."""
        wall = self.wall_seconds
        productive = sum(info.productive_seconds for info in self.attempts)
        return min(1.0, productive / wall) if wall > 0 and productive > 0 else None

    @property
    def goodput_text(self) -> str | None:
        """'97.1%', or 'at least 97.1%'."""
        text = None if self.goodput is None else f"{self.goodput:.1%}"
        return f"at least {text}" if text and self.is_goodput_bound else text

    @property
    def cost(self) -> float | None:
        """The time of all attempts at the prices that they recorded; None if none has recorded one."""
        found = [info.price * info.seconds / 3600 for info in self.attempts if info.price is not None]
        return sum(found) if found else None

    @property
    def is_cost_bound(self) -> bool:
        """Whether the cost is a lower bound: an attempt recorded no price, or was killed some time after its last heartbeat."""
        return any(info.was_killed or info.price is None for info in self.attempts)

    @property
    def save_seconds(self) -> float | None:
        """For how long a save of the newest attempt held up training, at last; None before the first one."""
        return number(self.attempts[-1].progress.get("save_seconds")) if self.attempts else None

    @property
    def interruption_seconds(self) -> float | None:
        """From one interruption of the run to the next, on average; None without one."""
        count = sum(info.was_killed or info.state in INTERRUPTED for info in self.attempts)
        ran = sum(info.seconds for info in self.attempts)
        return ran / count if count else None

    @property
    def best_save_interval_seconds(self) -> float | None:
        """From one save to the next, where saves and redone steps together cost least; None without an interruption.

        The square root of twice the length of a save times the time between interruptions: https://doi.org/10.1145/361147.361115
        """
        save, between = self.save_seconds, self.interruption_seconds
        return None if save is None or between is None else math.sqrt(2 * max(save, 0.0) * between)


@short_traceback
def read_history(
    run_url: str | os.PathLike[str] | None, storage_options: dict[str, Any] | None = None
) -> History:
    """Read the records of a run.

    Args:
        run_url: any fsspec URL; None takes `HF_CLOUDTRAIN_RUN_URL`.

    Raises:
        StorageError: the storage is unavailable.

    Example:
        >>> history = read_history("s3://bucket/runs/mrpc")
        >>> [(log["step"], log["loss"]) for log in history.logs if "loss" in log]
    """
    storage = Storage(env.run_url(run_url), env.storage_options(storage_options))
    return history_of(Catalog(storage))


def history_of(catalog: Catalog, now: float | None = None) -> History:
    """The same for an open catalog; `now` as for `status.run_state`."""
    attempts = catalog.attempts.read_all()
    committed = catalog.checkpoints()
    numbers = [attempt.number for attempt in attempts]
    (heartbeats,) = in_threads(catalog.attempts.read_progress, (numbers, READS_AT_ONCE))
    stored = StepRecords(catalog.storage).read()
    records = {number: list(decode_lines(stored.get(number, []))) for number in numbers}
    beats = {number: heartbeat or {} for number, heartbeat in zip(numbers, heartbeats, strict=True)}
    evidence = gather(catalog, attempts, beats, records, committed)
    line = lineage(attempts)
    history = History(catalog.storage.url, [], [], [], {}, read_at=time.time() if now is None else now)
    for attempt in attempts:
        progress, known = beats[attempt.number], evidence[attempt.number]
        info = AttemptInfo(
            number=attempt.number,
            started=_float(attempt.started),
            last_seen=known.time,
            state=str(progress.get("state", "started")),
            first_step=attempt.global_step,
            last_step=known.step,
            resumed_from=attempt.resumed_from,
            checkpoints=[key for key in committed if key.attempt == attempt.number],
            facts=attempt.facts,
            progress=progress,
        )
        is_newest = attempt is attempts[-1]
        state = state_of(info.state, info.last_seen, newest=is_newest, now=history.read_at)
        info.was_killed = state == "killed"
        history.attempts.append(info)
        _Joiner(history, info, *line.get(attempt.number, (-1.0, 1.0))).add(records[attempt.number])
    history.logs.sort(key=lambda log: (log["step"], log["time"]))
    return history


def lineage(attempts: list[Attempt]) -> dict[int, tuple[float, float]]:
    """The attempts that led to the newest one.

    Returns:
        By number: the last step of it that is kept, and how many steps of the newest attempt one of its steps is (law 8).
    """
    by_number = {attempt.number: attempt for attempt in attempts}
    current, limit, scale = max(by_number, default=0), math.inf, 1.0
    found: dict[int, tuple[float, float]] = {}
    while current in by_number and current not in found:
        found[current] = (limit, scale)
        parent, step = by_number[current].resumed_from, by_number[current].global_step
        if parent is None:
            break
        if parent.step and step:
            scale *= step / parent.step
        current, limit = parent.attempt, parent.step
    return found


class _Joiner:
    """Adds the records of one attempt to a history; `limit` and `scale` as in `lineage`."""

    def __init__(self, history: History, info: AttemptInfo, limit: float, scale: float) -> None:
        self._history, self._info = history, info
        self._limit, self._scale = limit, scale
        self._anchors = [(info.first_step, info.started, info.started)]
        self._seconds: dict[int, float] = {}

    def add(self, records: list[dict[str, Any]]) -> None:
        info = self._info
        kinds = {"steps": self._add_steps, "log": self._add_log, "pause": self._add_pause}
        kinds["commit"] = self._add_commit
        for record in records:
            add = kinds.get(str(record.get("kind")))
            if add is not None:
                add(record)
        clock = StepClock(info.started, info.last_seen, self._anchors, self._seconds)
        info.kept_until = clock.time_of(self._limit) if self._limit >= info.first_step else info.started
        stretches = [*longest(info.stretches), *longest(clock.stalls())]
        info.stretches = sorted(stretches, key=lambda stretch: stretch.began)
        self._add_untimed()

    def _add_untimed(self) -> None:
        """Add the steps whose records are lost: a SIGKILL loses those of the last seconds."""
        info = self._info
        timed, timed_redone = info.kept_steps, info.redone_steps
        end = max(self._limit, info.first_step)
        info.kept_steps = max(timed, int(min(end, info.last_step)) - info.first_step)
        info.redone_steps = max(timed_redone, int(max(0.0, info.last_step - end)))
        info.untimed_steps = info.kept_steps - timed
        # The heartbeat knows how long the steps up to its own took in all.
        step = int(_float(info.progress.get("step")))
        lost = step - info.first_step - sum(1 for known in self._seconds if known <= step)
        seconds = _float(info.progress.get("productive_seconds")) - sum(self._seconds.values())
        if lost > 0 and seconds > 0:
            kept = min(lost, info.untimed_steps, max(0, int(min(end, step)) - info.first_step - timed))
            info.untimed_steps -= kept
            info.productive_seconds += seconds * kept / lost
            info.redone_seconds += seconds * (lost - kept) / lost

    def _add_steps(self, record: dict[str, Any]) -> None:
        history, info = self._history, self._info
        first, seconds = record.get("first"), record.get("seconds")
        if not is_step(first) or not isinstance(seconds, list):
            return
        durations = [_float(duration) for duration in seconds]
        steps = range(first, first + len(durations))
        if is_step(record.get("samples")):
            info.samples_per_step = record["samples"]
        self._seconds.update(zip(steps, durations, strict=True))
        if self._scale == 1.0 and steps.stop - 1 <= self._limit:
            history.step_seconds.update(zip(steps, durations, strict=True))
            history.step_attempts.update(dict.fromkeys(steps, info.number))
            info.kept_steps += len(durations)
            info.productive_seconds += sum(durations)
            return
        for step, duration in zip(steps, durations, strict=True):
            if step <= self._limit:
                new = math.ceil(step * self._scale)  # several old steps may make one new step
                before = history.step_seconds.get(new, 0.0) if self._scale < 1 else 0.0
                history.step_seconds[new] = before + duration
                history.step_attempts[new] = info.number
                info.kept_steps += 1
                info.productive_seconds += duration
            else:
                info.redone_steps += 1
                info.redone_seconds += duration
                history.redone_step_seconds.append((info.number, step, duration))

    def _add_log(self, record: dict[str, Any]) -> None:
        step, time = record.get("step"), _float(record.get("time"))
        if not is_step(step):
            return
        self._anchor(step, time, time)
        log = {**metrics_of(record), "step": step, "time": time, "attempt": self._info.number}
        if step <= self._limit:
            self._history.logs.append({**log, "step": round(step * self._scale)})
        else:
            self._history.superseded.append(log)

    def _add_pause(self, record: dict[str, Any]) -> None:
        why, step = record.get("why"), record.get("step")
        began, seconds = _float(record.get("time")), _float(record.get("seconds"))
        if is_step(step) and began > 0 and seconds > 0:
            known = why if isinstance(why, str) and why in ("start", "evaluation", "save") else "pause"
            self._info.stretches.append(Stretch(known, step, began, seconds))
            self._anchor(step, began, began + seconds)

    def _add_commit(self, record: dict[str, Any]) -> None:
        key, commits = CheckpointKey.named(str(record.get("checkpoint"))), self._history.commits
        saved, committed, size = _float(record.get("saved")), _float(record.get("time")), record.get("size")
        if not (key and saved > 0 and committed > 0):
            return
        size = size if isinstance(size, int) and 0 <= size < 2**63 else None
        before = commits.get(key)
        if before is None or committed < before.committed:  # rank 0 may record one twice, from two hosts
            size = before.size if size is None and before is not None else size
            commits[key] = CommitInfo(key, saved, committed, size)

    def _anchor(self, step: int, time: float, until: float) -> None:
        """That step was finished at `time`; the next one started at `until`."""
        if time > 0:
            self._anchors.append((step, time, until))


def _float(value: Any) -> float:
    return number(value) or 0.0
