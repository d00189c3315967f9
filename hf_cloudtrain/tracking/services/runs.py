"""Which tracker run belongs to a run: a record for each on storage, created exclusively, so that racing starts agree.

<run URL>/.cloudtrain/trackers/mlflow-0001.json     {"service": "mlflow", "id": "4bc…", "created": 1790000000.0, …}
<run URL>/.cloudtrain/trackers/mlflow-0002.json     the one that followed it, with the reason; the highest number counts
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from dataclasses import dataclass, field

from hf_cloudtrain.checkpoints.manifest import decode_record, encode_record
from hf_cloudtrain.checkpoints.paths import TRACKERS
from hf_cloudtrain.errors import ManifestError, ObjectNotFoundError
from hf_cloudtrain.storage.client import Storage

logger = logging.getLogger(__name__)

MOST_ID = 500
"""Characters of an id: records are untrusted."""


@dataclass(frozen=True)
class TrackerRun:
    """One tracker run of a run."""

    service: str
    id: str
    number: int
    previous: str | None = None
    """The id of the one before, if it did not go on."""
    reason: str | None = None
    """Why it did not."""
    is_shared: bool = False
    """Whether a different training reports to it, too."""
    is_new: bool = field(default=False, compare=False)
    """Whether this attempt is the first of the run that reports to it; not recorded."""


class TrackerRuns:
    """The tracker runs of one run, on its storage.

    Example:
        >>> runs = TrackerRuns(catalog.storage)
        >>> runs.newest("mlflow")                       # one LIST, one read
        >>> runs.add(TrackerRun("mlflow", "4bc1", 1))   # the run that a racing start added, if it was faster
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def newest(self, service: str) -> TrackerRun | None:
        """The tracker run to go on with; None if there is none, or its record is damaged."""
        pattern = rf"{re.escape(TRACKERS)}/{re.escape(service)}-(\d{{4,9}})\.json"
        found = (re.fullmatch(pattern, info.path) for info in self._storage.list(TRACKERS))
        numbers = [int(match[1]) for match in found if match]
        return self._read(service, max(numbers)) if numbers else None

    def add(self, run: TrackerRun) -> TrackerRun:
        """Record one more tracker run; returns the one that a different process recorded under this number, if it was first."""
        facts = {"previous": run.previous, "reason": run.reason, "nonce": secrets.token_hex(16)}
        record = {
            "service": run.service,
            "id": run.id,
            "created": time.time(),
            **facts,
            "shared": run.is_shared,
        }
        if self._storage.create(_path(run.service, run.number), encode_record(record)):
            return run
        return self._read(run.service, run.number) or run

    def _read(self, service: str, number: int) -> TrackerRun | None:
        what = f"record of tracker run {service}-{number:04d}"
        try:
            record = decode_record(self._storage.read(_path(service, number)), what)
        except (ObjectNotFoundError, ManifestError) as error:
            logger.warning("%s A new tracker run begins.", error)
            return None
        tracker_id = record.get("id")
        if (
            not isinstance(tracker_id, str)
            or not 0 < len(tracker_id) <= MOST_ID
            or not tracker_id.isprintable()
        ):
            logger.warning("The %s is damaged. A new tracker run begins.", what)
            return None
        return TrackerRun(service, tracker_id, number, is_shared=record.get("shared") is True)


def _path(service: str, number: int) -> str:
    return f"{TRACKERS}/{service}-{number:04d}.json"
