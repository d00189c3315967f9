"""Emptying the outbox in the foreground: for `cloudtrain checkpoint flush`, and for the next start on a disk."""

from __future__ import annotations

import logging

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.outbox import Outbox, OutboxEntry
from hf_cloudtrain.checkpoints.sender import EntrySender, set_aside_unusable
from hf_cloudtrain.errors import CorruptCheckpointError, NotCommittedError
from hf_cloudtrain.runtime.progress import Bar, Progress

logger = logging.getLogger(__name__)

LOCK_PATIENCE = 30.0
"""Seconds to wait for another process's lock: the loader workers of a killed trainer hold it until they notice."""


def flush(catalog: Catalog, outbox: Outbox, progress: Progress) -> list[OutboxEntry]:
    """Upload and commit what an outbox holds for a run; returns the entries that it committed.

    Raises:
        StorageError: the storage does not answer; what is left stays in the outbox.
        NotCommittedError: another process on this machine holds the outbox.
    """
    done = []
    sender = EntrySender(catalog)
    try:
        with outbox.lock(patience=LOCK_PATIENCE):
            for entry in outbox.entries(catalog.storage.url):
                progress.begin(f"Uploading {entry.title}", entry.size)
                try:
                    sender.send(entry, progress.add)
                except CorruptCheckpointError as error:
                    set_aside_unusable(outbox, entry, error)
                else:
                    done.append(entry)
                    outbox.remove(entry)
    except BlockingIOError:
        raise NotCommittedError(
            f"Another process is uploading from {str(outbox.folder)!r}. Wait until it has finished, or end it and try "
            "again."
        ) from None
    return done


def finish_left_overs(catalog: Catalog, outbox: Outbox, *, bar: bool) -> None:
    """Upload what an earlier process has saved on this disk for the run; name what it has saved for other runs.

    Raises:
        StorageError, NotCommittedError: as `flush`.
    """
    for other in outbox.entries():
        if other.run_url != catalog.storage.url:
            logger.warning(
                "%s of the run %r was saved here and is not on storage. Finish it with `cloudtrain checkpoint flush %s`.",
                other.title,
                other.run_url,
                outbox.output_dir,
            )
    left = outbox.entries(catalog.storage.url)
    if not left:
        return
    names = ", ".join(entry.title for entry in left)
    logger.warning("Finishing the upload of %s, saved here before.", names)
    progress = Progress()
    with Bar(progress, hidden=not bar):
        flush(catalog, outbox, progress)
