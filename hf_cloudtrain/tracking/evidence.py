"""How far an attempt came and how long it lived, by the newest evidence of any kind: heartbeat, record, save or commit.

A killed attempt writes no last heartbeat and no last records. Its checkpoints, and the attempts that resumed from them, may
show more; what it did after its last sign of life is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.runtime.values import number
from hf_cloudtrain.storage.client import READS_AT_ONCE
from hf_cloudtrain.tracking.status import ALIVE


@dataclass
class Evidence:
    """What is known of one attempt."""

    step: int
    """The last step that it did, in its own numbers."""
    time: float
    """Its last sign of life, in seconds since 1970."""

    def note(self, step: Any, time: Any = None) -> None:
        """Take the later of what is known and what a record says."""
        self.step = max(self.step, step if is_step(step) else 0)
        self.time = max(self.time, number(time) or 0.0)


def gather(
    catalog: Catalog,
    attempts: list[Attempt],
    heartbeats: Mapping[int, dict[str, Any]],
    records: Mapping[int, list[dict[str, Any]]],
    committed: list[CheckpointKey],
) -> dict[int, Evidence]:
    """The newest evidence of each attempt. Reads the newest manifest of those that recorded no end."""
    found = {
        attempt.number: Evidence(attempt.global_step, number(attempt.started) or 0.0) for attempt in attempts
    }
    nothing = Evidence(0, 0.0)
    for attempt in attempts:
        beat, parent = heartbeats[attempt.number], attempt.resumed_from
        found[attempt.number].note(_whole(beat.get("step")), beat.get("time"))
        for name, time in (("last_saved", beat.get("last_saved_time")), ("last_committed", None)):
            key = CheckpointKey.named(str(beat.get(name)))
            if key is not None:
                found.get(key.attempt, nothing).note(key.step, time)
        if parent is not None:
            found.get(parent.attempt, nothing).note(parent.step)
        for record in records.get(attempt.number, ()):
            _note_record(record, found, attempt.number)
    newest = {key.attempt: key for key in committed}  # ascending
    open_ended = [
        key for number, key in newest.items() if heartbeats.get(number, {}).get("state", "started") in ALIVE
    ]
    (saved,) = in_threads(lambda key: _created(catalog, key), (open_ended, READS_AT_ONCE))
    for key in newest.values():
        found.get(key.attempt, nothing).note(key.step)
    for key, time in zip(open_ended, saved, strict=True):
        found.get(key.attempt, nothing).note(key.step, time)
    return found


def is_step(value: Any) -> TypeGuard[int]:
    """Whether a value of an untrusted record may be the number of a step."""
    return type(value) is int and 0 <= value < 2**53


def _note_record(record: dict[str, Any], found: dict[int, Evidence], attempt: int) -> None:
    kind, time, own = record.get("kind"), number(record.get("time")) or 0.0, found[attempt]
    if kind == "steps" and is_step(record.get("first")) and isinstance(record.get("seconds"), list):
        own.note(record["first"] + len(record["seconds"]) - 1, time)
    elif kind == "log":
        own.note(record.get("step"), time)
    elif kind == "pause":
        own.note(record.get("step"), time + (number(record.get("seconds")) or 0.0))
    elif kind == "commit":
        own.note(None, time)
        key = CheckpointKey.named(str(record.get("checkpoint")))
        if key is not None and key.attempt in found:
            found[key.attempt].note(key.step, record.get("saved"))


def _created(catalog: Catalog, key: CheckpointKey) -> float | None:
    """When a checkpoint was saved, by the clock of its machine."""
    try:
        return catalog.read(key).created
    except CloudTrainError:  # deleted since the listing, or damaged
        return None


def _whole(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)
