"""Requesting the newest attempt of a run to save and stop, and waiting until it has."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.runtime.provenance import person
from hf_cloudtrain.runtime.text import duration_text
from hf_cloudtrain.runtime.values import number
from hf_cloudtrain.tracking.status import ALIVE, count, last_heartbeat, quiet_seconds

LOOK_SECONDS = 1.0
"""Between two reads of the heartbeat of a run that is stopping."""
STATES = {
    "started": "has started",
    "training": "is training",
    "finished": "finished",
    "failed": "failed",
    "stopped": "stopped",
    "overtaken": "was overtaken",
    "preempted": "saved and stopped",
}
"""How a state reads in a sentence."""


@dataclass(frozen=True)
class Heartbeat:
    """What an attempt last recorded about itself."""

    run_url: str
    attempt: int
    state: str
    step: int | None
    last_committed: str | None
    last_seen: float | None
    """By the clock of its machine, which may be wrong: only a change of it counts."""

    @property
    def is_alive(self) -> bool:
        """Whether it has not recorded an end. A killed attempt cannot record one."""
        return self.state in ALIVE

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return dict(vars(self))

    def __str__(self) -> str:
        state = STATES.get(self.state, f"is {self.state!r}")
        step = "" if self.step is None else f" at step {self.step}"
        return f"attempt {self.attempt} {state}{step}, last committed checkpoint: {self.last_committed or 'none'}"


def request_stop(catalog: Catalog) -> Heartbeat:
    """Request the newest attempt to save and stop; returns its last heartbeat.

    Raises:
        NoCheckpointError: the run does not exist.
        ConfigurationError: its newest attempt has ended.
    """
    catalog.attempts.check_any()
    now = _heartbeat(catalog, catalog.attempts.numbers()[-1])
    if not now.is_alive:
        raise ConfigurationError(
            f"No training is active at {now.run_url!r}: {now}. No stop request was sent."
        )
    asked = catalog.attempts.request_stop(time.time(), person())
    return now if asked in (None, now.attempt) else _heartbeat(catalog, asked)  # a new one began just now


def wait_until_stopped(catalog: Catalog, now: Heartbeat) -> tuple[Heartbeat, str | None]:
    """Wait until the attempt has ended; returns its last heartbeat, and why it did not stop as requested, if so."""
    changed = time.monotonic()
    while now.is_alive:
        time.sleep(LOOK_SECONDS)
        before, now = now, _heartbeat(catalog, now.attempt)
        newer = catalog.attempts.overtaken_by(now.attempt) if now.is_alive else None
        if newer is not None:
            return now, f"Attempt {newer} has begun since then; it was not asked to stop."
        # Its clock may be hours off from ours, so only a change counts.
        if now != before:
            changed = time.monotonic()
        elif time.monotonic() - changed > quiet_seconds():
            return now, (
                f"No heartbeat for {duration_text(quiet_seconds())}, so it is assumed to have crashed: {now}. Checkpoints "
                "that it saved and did not upload are on its machine; `cloudtrain checkpoint flush` there uploads them."
            )
    return now, f"It failed instead of stopping: {now}." if now.state == "failed" else None


def _heartbeat(catalog: Catalog, attempt: int) -> Heartbeat:
    progress = last_heartbeat(catalog, attempt)
    last_committed = progress.get("last_committed")
    return Heartbeat(
        run_url=catalog.storage.url,
        attempt=attempt,
        state=str(progress.get("state", "started")),
        step=count(progress.get("step")),
        last_committed=None if last_committed is None else str(last_committed),
        last_seen=number(progress.get("time")),
    )
