"""The step and metric records of a run on storage, in batches, because object stores cannot append.

<run URL>/.cloudtrain/steps/000003-0001.jsonl         attempt 3, first batch; one JSON object a line
<run URL>/.cloudtrain/steps/000003-rank2-0001.jsonl   what rank 2 of attempt 3 logged by itself
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

from hf_cloudtrain.checkpoints.paths import STEPS
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.runtime.values import utf8
from hf_cloudtrain.storage.client import READS_AT_ONCE, Storage

logger = logging.getLogger(__name__)

OWN_FIELDS = frozenset({"kind", "step", "time", "attempt", "metrics"})
"""Names that a metric of the user must not replace in a log."""


class StepRecords:
    """The step and metric records of one run, on its storage.

    Example:
        >>> records = StepRecords(catalog.storage)
        >>> records.write(attempt=3, batch=1, lines=lines)
        >>> sorted(records.read())
        [1, 2, 3]
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def write(self, attempt: int, batch: int, lines: bytes, rank: int = 0) -> None:
        """Store one batch of records."""
        of_rank = f"rank{rank}-" if rank else ""
        self._storage.write(f"{STEPS}/{attempt:06d}-{of_rank}{batch:04d}.jsonl", lines)

    def read(self) -> dict[int, list[bytes]]:
        """All batches by attempt, in order; those of rank 0 come first."""
        found = []
        for info in self._storage.list(STEPS):
            match = re.fullmatch(rf"{re.escape(STEPS)}/(\d+)-(?:rank(\d+)-)?(\d+)\.jsonl", info.path)
            if match:
                found.append((int(match[1]), int(match[2] or 0), int(match[3]), info.path))
        found.sort()
        (batches,) = in_threads(self._storage.read, ([path for *_, path in found], READS_AT_ONCE))
        by_attempt: dict[int, list[bytes]] = {}
        for (attempt, *_), batch in zip(found, batches, strict=True):
            by_attempt.setdefault(attempt, []).append(batch)
        return by_attempt


def encode_lines(lines: list[dict[str, Any]]) -> bytes:
    """Records as JSON lines; one that cannot be encoded is dropped with a warning, and the others are kept."""
    return "".join(_encoded(lines)).encode()


def _encoded(lines: list[dict[str, Any]]) -> Iterator[str]:
    for line in lines:
        try:
            yield utf8(json.dumps(line, ensure_ascii=False, allow_nan=False)) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            logger.warning("A record of step %s cannot be stored: %s", line.get("step"), error)


def decode_lines(batches: list[bytes]) -> Iterator[dict[str, Any]]:
    """The records in batches; lines that are damaged are skipped."""
    for line in (line for batch in batches for line in batch.splitlines()):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def metrics_of(log: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a log record; one named like a field of ours has `user/` in front.

    Those of a rank other than 0 have `rank2/` in front. Earlier versions stored metrics beside our own fields.
    """
    nested, rank = log.get("metrics"), log.get("rank")
    if isinstance(nested, dict) and type(rank) is int and rank > 0:
        return {f"rank{rank}/{name}": value for name, value in nested.items()}
    if not isinstance(nested, dict):
        return {name: value for name, value in log.items() if name not in OWN_FIELDS}
    return {f"user/{name}" if name in OWN_FIELDS else name: value for name, value in nested.items()}
