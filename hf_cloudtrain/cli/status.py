"""`run status`: how a run is doing, and its attempts. A new line or column of it is one entry in this file."""

from __future__ import annotations

import time
from typing import Any

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.titles import Titles
from hf_cloudtrain.cli.output import at_least, format_or_none, loss_text, of_total, rate_text
from hf_cloudtrain.cli.tables import Columns
from hf_cloudtrain.errors import ManifestError, ObjectNotFoundError
from hf_cloudtrain.runtime.text import count_text, duration_text, time_text
from hf_cloudtrain.runtime.values import number
from hf_cloudtrain.tracking.history import AttemptInfo, History
from hf_cloudtrain.tracking.status import count, losses, state_of, trackers

ATTEMPTS: Columns = {
    ">attempt": lambda attempt: attempt["number"],
    "state": lambda attempt: attempt["state"],
    "started": lambda attempt: time_text(attempt["started"]),
    "ran": lambda attempt: f"{duration_text(attempt['last_seen'] - attempt['started'])}{_plus(attempt)}",
    "steps": lambda attempt: f"{attempt['first_step']} to {attempt['last_step']}{_plus(attempt)}",
    ">redone": lambda attempt: f"{attempt['superseded_steps']}{_plus(attempt, newest=False)}",
    "resumed from": lambda attempt: attempt["resumed_from"],
    "host": lambda attempt: attempt["facts"].get("host"),
}
"""The table of attempts."""
SPARE = ("started", "ran", "redone", "host", "resumed from")
"""Columns of it that a narrow terminal does without, the first one first."""


def with_titles(record: dict[str, Any], titles: Titles) -> dict[str, Any]:
    """A record to show: with the folders of checkpoints, where `--json` has their keys."""
    attempts = record["attempts"]
    titles.read(
        CheckpointKey.named(key)
        for key in (record["last_committed"], *(attempt["resumed_from"] for attempt in attempts))
        if key
    )
    return {
        **record,
        "last_committed": record["last_committed"] and titles.of(record["last_committed"]),
        "attempts": [
            {**attempt, "resumed_from": attempt["resumed_from"] and titles.of(attempt["resumed_from"])}
            for attempt in attempts
        ],
    }


def facts(record: dict[str, Any]) -> dict[str, object]:
    """The lines above the table, from a record; those without a value are not shown."""
    age = duration_text(record["heartbeat_age_seconds"])
    redone, spent = record["superseded_steps"], duration_text(record["superseded_seconds"])
    return {
        "run": record["run_url"],
        "state": record["state"],
        "stalled": record["stalled"],
        "step": of_total(record["step"], record["total_steps"], percent=True),
        "rate": rate_text(record),
        "eta": duration_text(record["eta_seconds"]),
        "loss": loss_text(record["loss"], record["loss_step"], record["step"]),
        "saves": save_text(record),
        "goodput": at_least(format_or_none(record["goodput"], ".1%"), record["goodput_is_bound"]),
        "last committed": record["last_committed"] or "none yet",
        "exact": record["exactness"],
        "checkpoints": record["checkpoints"],
        "trackers": ", ".join(f"{service} {page}" for service, page in record["trackers"].items()) or None,
        "last seen": f"{time_text(record['last_seen'])} ({age} ago)" if record["last_seen"] else None,
        "redone": at_least(
            count_text(redone, "step") + (f", {spent}" if redone else ""), record["superseded_is_bound"]
        ),
        "+": killed_text(record["attempts"]),
    }


def save_text(record: dict[str, Any]) -> str | None:
    """For how long a save holds up training, and how often one is worth it."""
    if record["save_seconds"] is None:
        return None
    text = f"{duration_text(record['save_seconds'])} each"
    between, best = record["interruption_seconds"], record["best_save_interval_seconds"]
    if best is None:
        return text
    return f"{text}; best every {duration_text(best)}, if interrupted every {duration_text(between)}"


def killed_text(attempts: list[dict[str, Any]]) -> str | None:
    """What a `+` in the table means."""
    killed = [str(attempt["number"]) for attempt in attempts if attempt["was_killed"]]
    if not killed:
        return None
    names = f"attempts {', '.join(killed[-5:])} were" if len(killed) > 1 else f"attempt {killed[0]} was"
    return f"at least: {names} killed, and may have done more"


def _plus(attempt: dict[str, Any], *, newest: bool = True) -> str:
    """A mark of a lower bound; steps of the newest attempt are not redone yet."""
    return "+" if attempt["was_killed"] and (newest or not attempt["newest"]) else ""


def _exactness(catalog: Catalog, key: CheckpointKey) -> str | None:
    """Whether a resume from a checkpoint equals an uninterrupted run, in words; None if its manifest cannot be read."""
    try:
        return str(catalog.read(key).exactness)
    except (ManifestError, ObjectNotFoundError):  # damaged, or deleted since the listing
        return None


def status_record(history: History, stalled: str | None, catalog: Catalog) -> dict[str, Any]:
    """For `--json`: a run with at least one attempt. Reads the manifest of the last committed checkpoint."""
    attempts = attempt_records(history.attempts)
    newest, progress = history.attempts[-1], history.attempts[-1].progress
    committed = max((key for info in history.attempts for key in info.checkpoints), default=None)
    state = attempts[-1]["state"]
    rates = ("step_seconds", "samples_per_second", "tokens_per_second")
    return {
        "run_url": history.run_url,
        "state": state,
        "attempt": newest.number,
        "step": newest.last_step,
        "total_steps": count(progress.get("total_steps")),
        **{name: number(progress.get(name)) for name in rates},
        **losses(progress),
        "eta_seconds": number(progress.get("eta_seconds")) if state == "training" else None,
        "save_seconds": history.save_seconds,
        "interruption_seconds": history.interruption_seconds,
        "best_save_interval_seconds": history.best_save_interval_seconds,
        "goodput": history.goodput,
        "goodput_is_bound": history.is_goodput_bound,
        "last_committed": None if committed is None else str(committed),
        "exactness": None if committed is None else _exactness(catalog, committed),
        "trackers": trackers(progress),
        "checkpoints": sum(len(info.checkpoints) for info in history.attempts),
        "last_seen": newest.last_seen,
        "heartbeat_age_seconds": max(0.0, time.time() - newest.last_seen),
        "stalled": stalled,
        "kept_steps": sum(info.kept_steps for info in history.attempts),
        "superseded_steps": sum(info.redone_steps for info in history.attempts),
        "superseded_is_bound": history.is_redone_bound,
        "superseded_seconds": sum(info.redone_seconds for info in history.attempts),
        "attempts": attempts,
    }


def attempt_records(attempts: list[AttemptInfo]) -> list[dict[str, Any]]:
    """For `--json`, and for the table: all attempts, the newest last."""
    return [
        {
            "number": info.number,
            "state": state_of(info.state, info.last_seen, newest=info is attempts[-1]),
            "started": info.started,
            "last_seen": info.last_seen,
            "was_killed": info.was_killed,
            "first_step": info.first_step,
            "last_step": info.last_step,
            "resumed_from": None if info.resumed_from is None else str(info.resumed_from),
            "checkpoints": [str(key) for key in info.checkpoints],
            "kept_steps": info.kept_steps,
            "superseded_steps": info.redone_steps,
            "newest": info is attempts[-1],
            "facts": info.facts,
        }
        for info in attempts
    ]
