"""Training that is over before its last planned step, as by early stopping: recorded on storage, so that every machine knows.

The record is written when everything is committed. It counts for as long as no newer attempt has saved a checkpoint, and until
more steps or epochs are planned than when it was written. Runs without it continue as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from hf_cloudtrain.checkpoints.manifest import Manifest, count, decode_record, encode_record
from hf_cloudtrain.checkpoints.paths import COMPLETE
from hf_cloudtrain.errors import ManifestError, ObjectNotFoundError
from hf_cloudtrain.storage.client import Storage

HOW_TO_TRAIN_ON = (
    "To train on, plan more epochs or steps than before, or start over with fresh=True. A training that is meant to continue later "
    "is ended by `cloudtrain run stop`, SIGTERM or HF_CLOUDTRAIN_STOP_FILE."
)


@dataclass(frozen=True)
class Completion:
    """Where training ended, and what was planned then."""

    attempt: int
    global_step: int
    planned: Mapping[str, float]
    """Planned amounts by name, such as `num_train_epochs`; a larger one means that training goes on."""

    def write(self, storage: Storage) -> None:
        """Record it. Raises StorageError."""
        storage.write(COMPLETE, encode_record(asdict(self)))

    @classmethod
    def of(cls, storage: Storage, newest: Manifest) -> Completion | None:
        """The record of the run, if it is about the attempt that saved its newest checkpoint; a damaged one does not count."""
        what = f"record {COMPLETE!r}"
        try:
            record = decode_record(storage.read(COMPLETE), what)
            attempt, step = (count(record, name, what) for name in ("attempt", "global_step"))
        except (ObjectNotFoundError, ManifestError):
            return None
        planned = record.get("planned")
        if attempt < newest.attempt or not isinstance(planned, dict):
            return None
        return cls(attempt, step, {name: n for name, n in planned.items() if type(n) in (int, float)})

    def holds_for(self, planned: Mapping[str, float]) -> bool:
        """Whether no more is planned now than when training ended."""
        return all(value <= self.planned.get(name, value) for name, value in planned.items())
