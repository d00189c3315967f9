"""`run status`: how a run is doing, and its attempts. A new line or column of it is one entry in this file."""

from __future__ import annotations

import time
from typing import Any

from hf_cloudtrain.cli.output import Columns, format_or_none, loss_text, of_total, rate_text
from hf_cloudtrain.runtime.text import duration_text, time_text
from hf_cloudtrain.runtime.values import number
from hf_cloudtrain.tracking.history import AttemptInfo, History
from hf_cloudtrain.tracking.status import count, losses, state_of

ATTEMPTS: Columns = {
    ">attempt": lambda attempt: attempt["number"],
    "state": lambda attempt: attempt["state"],
    "started": lambda attempt: time_text(attempt["started"]),
    "ran": lambda attempt: duration_text(attempt["last_seen"] - attempt["started"]),
    "steps": lambda attempt: f"{attempt['first_step']} to {attempt['last_step']}",
    ">redone": lambda attempt: attempt["superseded_steps"],
    "resumed from": lambda attempt: attempt["resumed_from"],
    "host": lambda attempt: attempt["facts"].get("host"),
}
"""The table of attempts."""


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
        "goodput": format_or_none(record["goodput"], ".1%"),
        "last committed": record["last_committed"] or "none yet",
        "checkpoints": record["checkpoints"],
        "last heartbeat": f"{time_text(record['last_seen'])} ({age} ago)" if record["last_seen"] else None,
        "redone": f"{redone} steps, {spent}" if redone else "0 steps",
    }


def status_record(history: History, stalled: str | None) -> dict[str, Any]:
    """For `--json`: a run with at least one attempt."""
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
        "goodput": history.goodput,
        "last_committed": None if committed is None else str(committed),
        "checkpoints": sum(len(info.checkpoints) for info in history.attempts),
        "last_seen": newest.last_seen,
        "heartbeat_age_seconds": max(0.0, time.time() - newest.last_seen),
        "stalled": stalled,
        "kept_steps": sum(info.kept_steps for info in history.attempts),
        "superseded_steps": sum(info.redone_steps for info in history.attempts),
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
            "first_step": info.first_step,
            "last_step": info.last_step,
            "resumed_from": None if info.resumed_from is None else str(info.resumed_from),
            "checkpoints": [str(key) for key in info.checkpoints],
            "kept_steps": info.kept_steps,
            "superseded_steps": info.redone_steps,
            "facts": info.facts,
        }
        for info in attempts
    ]
