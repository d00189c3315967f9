"""The step and metric records of a run on storage, in batches, because object stores cannot append.

<run URL>/.cloudtrain/steps/000003-0001.jsonl     attempt 3, first batch; one JSON object a line
"""

from __future__ import annotations

import re

from hf_cloudtrain.checkpoints.paths import STEPS
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.client import READS_AT_ONCE, Storage


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

    def write(self, attempt: int, batch: int, lines: bytes) -> None:
        """Store one batch of records."""
        self._storage.write(f"{STEPS}/{attempt:06d}-{batch:04d}.jsonl", lines)

    def read(self) -> dict[int, list[bytes]]:
        """All batches by attempt, in order."""
        found = []
        for info in self._storage.list(STEPS):
            match = re.fullmatch(rf"{re.escape(STEPS)}/(\d+)-(\d+)\.jsonl", info.path)
            if match:
                found.append((int(match[1]), int(match[2]), info.path))
        found.sort()
        (batches,) = in_threads(self._storage.read, ([path for _, _, path in found], READS_AT_ONCE))
        by_attempt: dict[int, list[bytes]] = {}
        for (attempt, _, _), batch in zip(found, batches, strict=True):
            by_attempt.setdefault(attempt, []).append(batch)
        return by_attempt
