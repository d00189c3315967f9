"""Who did what to a run from a page, and when: one record for each action."""

from __future__ import annotations

import secrets
import time

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import decode_record, encode_record
from hf_cloudtrain.checkpoints.paths import ACTIONS
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.runtime.provenance import person
from hf_cloudtrain.runtime.text import clean
from hf_cloudtrain.runtime.values import number
from hf_cloudtrain.storage.client import Storage


def note_action(catalog: Catalog, action: str) -> None:
    """Write the record of an action, such as 'pinned checkpoint-50'. Raises StorageError."""
    name = f"{time.time() * 1000:013.0f}-{secrets.token_hex(4)}"
    record = {"time": time.time(), "action": action, "how": "cloudtrain ui", **person()}
    catalog.storage.write(f"{ACTIONS}/{name}.json", encode_record(record))


def newest_actions(storage: Storage, most: int = 20) -> list[tuple[float, str] | None]:
    """Time and words of the newest actions, the newest first; None for a damaged record."""
    return [_read(storage, info.path) for info in storage.list(ACTIONS)[-most:]][::-1]


def _read(storage: Storage, path: str) -> tuple[float, str] | None:
    try:
        record = decode_record(storage.read(path), "record of an action")
    except CloudTrainError:
        return None
    return number(record.get("time")) or 0.0, f"{clean(record.get('action'))}, by {clean(record.get('user'))}"
