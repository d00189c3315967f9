"""Deleting one checkpoint, in an order that can be interrupted anywhere (law 10).

    1. its manifest is copied to `retiring/`    nothing is lost yet
    2. the manifest is deleted                  from here on the checkpoint does not exist
    3. its files are deleted
    4. the copy is deleted                      until then, `finish_retiring` can complete the deletion

The claim stays: no other attempt ever gets the folder, so a process that wakes up late and continues to delete there
deletes nothing that counts. Which checkpoints may go is decided elsewhere: see `retention.protected`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from hf_cloudtrain.checkpoints.catalog import Catalog, parse_manifest
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest
from hf_cloudtrain.checkpoints.paths import CHECKPOINTS, PARTS, PINS, RETIRING
from hf_cloudtrain.errors import ManifestError, ObjectNotFoundError
from hf_cloudtrain.storage.client import DELETES_AT_ONCE

logger = logging.getLogger(__name__)


def retire(catalog: Catalog, key: CheckpointKey, *, proceed: Callable[[], bool] = lambda: True) -> bool:
    """Delete a checkpoint.

    Args:
        proceed: called between requests; once it returns False, the rest is left to `finish_retiring`.

    Returns:
        Whether everything is deleted.

    Raises:
        NoCheckpointError, ManifestError, StorageError
    """
    manifest = catalog.read(key)
    catalog.storage.write(f"{RETIRING}/{key}.json", manifest.encode())
    catalog.storage.delete([f"{CHECKPOINTS}/{key}.json"])
    return delete_files(catalog, key, manifest, proceed)


def retiring(catalog: Catalog) -> list[CheckpointKey]:
    """Checkpoints whose deletion has begun and is not complete, oldest first, by one LIST."""
    return catalog.keys_in(RETIRING)


def finish_retiring(
    catalog: Catalog, key: CheckpointKey, *, proceed: Callable[[], bool] = lambda: True
) -> bool:
    """Complete a deletion that was interrupted; whether everything is deleted.

    If it was interrupted before its manifest was deleted, the checkpoint exists and stays; `retire` starts over.
    """
    if catalog.holds(key):
        return False
    record = f"{RETIRING}/{key}.json"
    try:
        manifest = parse_manifest(key, catalog.storage.read(record))
    except ObjectNotFoundError:
        return True  # another process has completed it
    except ManifestError as error:
        # Left there, it would stop every later deletion, and it names no files: they are found by their folder.
        logger.warning("%s `cloudtrain run clean %s` finds what is left of it.", error, catalog.storage.url)
        catalog.storage.delete([record])
        return True
    return delete_files(catalog, key, manifest, proceed)


def delete_files(
    catalog: Catalog, key: CheckpointKey | str, manifest: Manifest, proceed: Callable[[], bool] = lambda: True
) -> bool:
    """Steps 3 and 4, for a checkpoint or a named folder; whether everything is deleted."""
    storage = catalog.storage
    files = [manifest.object_path(entry) for entry in manifest.files]
    # Also what the manifest does not name: of an upload that failed, or of a save that was replaced before its commit.
    there = [*storage.list(manifest.folder), *storage.list(f"{PARTS}/{key}")]
    paths = list(dict.fromkeys([*files, *(info.path for info in there)]))
    for start in range(0, len(paths), DELETES_AT_ONCE):
        if not proceed():
            return False
        storage.delete(paths[start : start + DELETES_AT_ONCE])
    storage.delete([f"{PINS}/{key}.json"])
    storage.delete([f"{RETIRING}/{key}.json"])
    return True
