"""Uploading a folder under a name: `cloud.save(folder, name)`, and datasets."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.flush import flush
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, Position, folder_name
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.checkpoints.sender import EntrySender
from hf_cloudtrain.checkpoints.upload_queue import UploadQueue
from hf_cloudtrain.errors import NotCommittedError
from hf_cloudtrain.runtime.progress import Bar, Progress
from hf_cloudtrain.runtime.provenance import origin


def save_folder(
    catalog: Catalog,
    outbox: Outbox,
    queue: UploadQueue | None,
    folder: Path,
    name: str,
    attempt: Attempt | None,
    step: int,
) -> str:
    """Commit a folder under a name, by way of the outbox; returns its URL once it is committed.

    Args:
        queue: the background uploads, if they have begun.
        attempt: the attempt that saves it, and `step`, the last one that it has saved; None and 0 before the first.

    Raises:
        NotCommittedError: the storage did not take it in time; the outbox keeps it.
    """
    entry = OutboxEntry(
        run_url=catalog.storage.url,
        key=CheckpointKey(attempt.number if attempt else 0, step),
        nonce=os.urandom(16).hex(),
        position=Position(global_step=step),
        created=time.time(),
        name=folder_name(name),
        origin=origin(),
    )
    if queue is not None and queue.late is not None:
        queue.late.settle()  # it may be a checkpoint whose files are still being written
    entry = outbox.accept(folder, entry)
    if queue is None:
        with Bar(progress := Progress()):
            flush(catalog, outbox, progress)
    else:
        queue.submit(entry)
        queue.wait(env.drain_timeout())
    named = NamedFolders(catalog)
    for version in reversed(named.keys()):
        manifest = named.read(version)
        if manifest.nonce == entry.nonce:
            return f"{catalog.storage.url}/{manifest.folder}"
    raise NotCommittedError(f"{name!r} was not committed to {catalog.storage.url!r}.")


def send_folder(
    catalog: Catalog,
    entry: OutboxEntry,
    progress: Progress,
    there: Mapping[str, tuple[str, str]] | None = None,
) -> Manifest:
    """Upload and commit a named folder from where it is, in the foreground and without an outbox.

    Args:
        there: files whose bytes the storage has already, by their path: the object there, and the digest. They are
            copied on the storage, and not sent.

    Raises:
        CorruptCheckpointError: a file was written during the upload.
        StorageError: the storage does not answer. Nothing is committed then.
    """
    there = there or {}
    progress.begin(
        f"Uploading {entry.title}", sum(file.size for file in entry.files if file.path not in there)
    )
    sender = EntrySender(catalog, there)
    sender.send(entry, progress.add)
    if sender.manifest is None:
        raise NotCommittedError(
            f"{entry.title!r} was not committed: another process has written its folder on {catalog.storage.url!r} in the "
            "meantime. Try again."
        )
    return sender.manifest
