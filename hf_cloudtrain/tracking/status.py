"""The status of a run now, from a few small requests: no step records are read, however long the run is."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.runtime.values import metric, number
from hf_cloudtrain.tracking.host import HOST_METRICS

ALIVE = ("started", "training")
"""States of an attempt that has not recorded its end."""
MOST_STATE = 40
"""Characters of a state that are shown: records are untrusted."""
MOST_TRACKERS, MOST_PAGE = 20, 500
"""Tracker runs of a run, and characters of the URL of one, that are shown."""
SLOW = 20.0
"""A run is stalled after so many usual steps without a step, and at least `quiet_seconds`."""


@dataclass(frozen=True)
class RunState:
    """One run at one moment. Times are seconds since 1970 by the clock of the training machine, durations are seconds."""

    run_url: str
    state: str
    """`waiting`: no attempt has begun; otherwise that of the newest attempt, as in `cloudtrain run status`."""
    attempt: int | None = None
    """Number of the newest attempt."""
    attempts: int = 0
    stalled: str | None = None
    """Why the run seems to make no progress, if so."""
    step: int | None = None
    """The last step of the newest attempt that its heartbeat or a checkpoint shows."""
    total_steps: int | None = None
    step_seconds: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    """Only while it is training."""
    loss: float | None = None
    """As it was reported last; NaN or infinite if it was."""
    loss_step: int | None = None
    """The step that reported it."""
    learning_rate: float | None = None
    checkpoints: int = 0
    last_committed: str | None = None
    """Key of the newest committed checkpoint."""
    commit_lag_seconds: float | None = None
    """From the newest committed save to its commit."""
    uploading: str | None = None
    """Key of the checkpoint that is saved and not committed yet, while it is training."""
    uploading_seconds: float | None = None
    """Since it was saved."""
    last_seen: float | None = None
    """Its last heartbeat; its start if it has none."""
    heartbeat_age_seconds: float | None = None
    host: dict[str, float] = dataclasses.field(default_factory=dict)
    """How busy its machine is, as `host.HostMetrics` tells."""
    trackers: dict[str, str] = dataclasses.field(default_factory=dict)
    """Where its curves are in a tracker, by service: a URL, or the id of the tracker run."""

    @property
    def is_over(self) -> bool:
        """Whether the newest attempt has recorded its end. A killed attempt cannot."""
        return self.state not in (*ALIVE, "killed", "waiting")

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def run_state(catalog: Catalog, now: float | None = None) -> RunState:
    """The status of a run, from two listings and one or two small records.

    Args:
        now: the time of the training machine, where it is known to differ from the time here.

    Raises:
        StorageError: the storage is unavailable.

    Example:
        >>> state = run_state(Catalog(Storage("s3://bucket/runs/mrpc")))
        >>> state.state, state.step, state.total_steps, state.stalled
        ('training', 420, 1000, None)
    """
    url = catalog.storage.url
    numbers = catalog.attempts.numbers()
    if not numbers:
        return RunState(url, "waiting")
    progress = last_heartbeat(catalog, numbers[-1])
    keys = catalog.checkpoints()
    last_seen = number(progress.get("time"))
    state = state_of(str(progress.get("state", "started"))[:MOST_STATE], last_seen or 0.0, now=now)
    is_training = state == "training"
    uploading = _uploading(progress, keys) if is_training else None
    names = ("step_seconds", "samples_per_second", "tokens_per_second")
    return RunState(
        run_url=url,
        state=state,
        attempt=numbers[-1],
        attempts=len(numbers),
        stalled=_stalled(state, progress, last_seen),
        step=_step(numbers[-1], progress, keys),
        total_steps=count(progress.get("total_steps")),
        **{name: number(progress.get(name)) for name in names},  # type: ignore[arg-type]
        **losses(progress),
        eta_seconds=number(progress.get("eta_seconds")) if is_training else None,
        checkpoints=len(keys),
        last_committed=str(keys[-1]) if keys else None,
        commit_lag_seconds=number(progress.get("commit_lag_seconds")),
        uploading=None if uploading is None else str(uploading),
        uploading_seconds=None if uploading is None else age(number(progress.get("last_saved_time")), now),
        last_seen=last_seen,
        heartbeat_age_seconds=age(last_seen, now),
        host=host(progress),
        trackers=trackers(progress),
    )


def last_heartbeat(catalog: Catalog, attempt: int) -> dict[str, Any]:
    """The last heartbeat of an attempt; one with its start as the time if it has none (yet)."""
    progress = catalog.attempts.read_progress(attempt) or {}
    if number(progress.get("time")) is None:
        started = [found.started for found in catalog.attempts.read_all(last=1) if found.number == attempt]
        progress = {**progress, "time": max(started, default=None)}
    return progress


def trackers(progress: dict[str, Any]) -> dict[str, str]:
    """Where the curves of a run are, by service, from an untrusted heartbeat."""
    found = progress.get("trackers")
    pairs = list(found.items())[:MOST_TRACKERS] if isinstance(found, dict) else []
    return {name[:MOST_STATE]: page[:MOST_PAGE] for name, page in pairs if isinstance(page, str)}


def host(progress: dict[str, Any]) -> dict[str, float]:
    """How busy the machine is, from an untrusted heartbeat."""
    found = progress.get("host")
    pairs = ((name, number(found.get(name))) for name in HOST_METRICS) if isinstance(found, dict) else ()
    return {name: value for name, value in pairs if value is not None}


def losses(progress: dict[str, Any]) -> dict[str, Any]:
    """What a heartbeat says about the loss and the learning rate; records of earlier versions name no step."""
    return {
        "loss": metric(progress.get("loss")),
        "loss_step": count(progress.get("loss_step")),
        "learning_rate": metric(progress.get("learning_rate")),
    }


def quiet_seconds() -> float:
    """Seconds without a heartbeat after which a run is assumed to be killed: four heartbeats, and at least a minute."""
    return max(60.0, 4 * env.heartbeat())


def state_of(recorded: str, last_seen: float, *, newest: bool = True, now: float | None = None) -> str:
    """The state of an attempt: a killed attempt cannot record its end, so it follows from its last heartbeat."""
    is_alive = newest and (time.time() if now is None else now) - last_seen <= quiet_seconds()
    return recorded if recorded not in ALIVE or is_alive else "killed"


def count(value: Any) -> int | None:
    """The same as a whole number."""
    found = number(value)
    return None if found is None else int(found)


def age(moment: float | None, now: float | None = None) -> float | None:
    """Seconds since a moment; 0 if the clock of that machine is ahead of ours."""
    return None if moment is None else max(0.0, (time.time() if now is None else now) - moment)


def _step(attempt: int, progress: dict[str, Any], keys: list[CheckpointKey]) -> int | None:
    found = count(progress.get("step"))
    saved = CheckpointKey.named(str(progress.get("last_saved")))
    steps = [key.step for key in (saved, *keys[-1:]) if key is not None and key.attempt == attempt]
    return max((step for step in (found, *steps) if step is not None), default=None)


def _uploading(progress: dict[str, Any], keys: list[CheckpointKey]) -> CheckpointKey | None:
    key = CheckpointKey.named(str(progress.get("last_saved")))
    return key if key is not None and key not in keys[-8:] else None


def _stalled(state: str, progress: dict[str, Any], last_seen: float | None) -> str | None:
    """A process that hangs in a step still sends heartbeats, so both are checked."""
    if state == "killed":
        return "no heartbeat: it was killed, its machine is gone, or it cannot write to the storage"
    stepped = number(progress.get("last_step_time"))
    if state != "training" or stepped is None or last_seen is None:
        return None
    limit = max(quiet_seconds(), SLOW * (number(progress.get("step_seconds")) or 0.0))
    if last_seen - stepped <= limit:  # by one clock
        return None
    return f"no step for {last_seen - stepped:.0f} s: it hangs or evaluates"
