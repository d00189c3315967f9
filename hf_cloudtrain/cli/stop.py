"""Asking a run to stop, and following it until it has."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.cli.output import fail, say
from hf_cloudtrain.runtime.provenance import person
from hf_cloudtrain.runtime.text import duration_text
from hf_cloudtrain.tracking.status import ALIVE, quiet_seconds

LOOK_SECONDS = 1.0
"""Between two looks at a run that is to stop."""


@dataclass(frozen=True)
class Standing:
    """What an attempt says of itself."""

    run_url: str
    attempt: int
    state: str
    step: int | None
    last_committed: str | None
    last_seen: float | None
    """By its own clock: whether it changes is all that can be told from it."""

    @property
    def is_alive(self) -> bool:
        """Whether it has not said that it ended; a killed one cannot say it."""
        return self.state in ALIVE

    def record(self) -> dict[str, Any]:
        """What `--json` says."""
        return dict(vars(self))

    def __str__(self) -> str:
        place = "" if self.step is None else f" at step {self.step}"
        return f"attempt {self.attempt} is {self.state!r}{place}, last committed: {self.last_committed or 'nothing'}"


def ask(catalog: Catalog) -> Standing:
    """Ask the newest attempt to stop, unless it has ended; ends the command where there is none to ask."""
    catalog.attempts.check_any()
    standing = _standing(catalog, catalog.attempts.numbers()[-1])
    if not standing.is_alive:
        fail(f"Nobody trains {standing.run_url!r}: {standing}. Nothing was asked.")
    number = catalog.attempts.request_stop(time.time(), person())
    if number != standing.attempt and number is not None:  # it began just now
        standing = _standing(catalog, number)
    say(
        f"Asked attempt {standing.attempt} of {standing.run_url!r} to stop. It sees that within a heartbeat "
        f"({duration_text(env.heartbeat())} unless {env.HEARTBEAT} says otherwise there), then saves, uploads and ends."
    )
    silent = time.time() - (standing.last_seen or 0.0)
    if silent > quiet_seconds():
        say(
            f"Warning: by this machine's clock its last heartbeat is {duration_text(silent)} old. It may be dead; then "
            "this keeps its launcher from starting it again."
        )
    return standing


def follow(catalog: Catalog, standing: Standing) -> tuple[Standing, str | None]:
    """Wait until the attempt has ended; how it stands then, and in words why it did not stop as asked, if so."""
    say(f"Now {standing}.")
    changed = time.monotonic()
    while standing.is_alive:
        time.sleep(LOOK_SECONDS)
        before, standing = standing, _standing(catalog, standing.attempt)
        if standing.is_alive:
            newer = catalog.attempts.overtaken_by(standing.attempt)
            if newer is not None:
                return standing, f"Attempt {newer} has begun meanwhile, and was not asked to stop."
        # Its clock may be hours off from ours: only its heart's beating is looked at.
        if standing != before:
            changed = time.monotonic()
        elif time.monotonic() - changed > quiet_seconds():
            return standing, (
                f"No heartbeat for {duration_text(quiet_seconds())}, so it seems dead: {standing}. What it had saved and "
                "not uploaded is on its machine; `cloudtrain checkpoint flush` there finishes it."
            )
    say(f"Now {standing}.")
    return standing, f"It did not stop well: {standing}." if standing.state == "failed" else None


def _standing(catalog: Catalog, attempt: int) -> Standing:
    progress = catalog.attempts.read_progress(attempt)
    if progress is None:  # it is about to begin, or ended before its first heartbeat
        started = [found.started for found in catalog.attempts.read_all(last=1) if found.number == attempt]
        progress = {"state": "started", "time": max(started, default=None)}
    step, last_committed, seen = (progress.get(name) for name in ("step", "last_committed", "time"))
    return Standing(
        run_url=catalog.storage.url,
        attempt=attempt,
        state=str(progress.get("state", "started")),
        step=step if type(step) is int else None,
        last_committed=None if last_committed is None else str(last_committed),
        last_seen=float(seen) if isinstance(seen, (int, float)) and abs(seen) < 1e15 else None,  # no NaN is
    )
