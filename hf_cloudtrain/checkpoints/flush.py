"""Emptying the outbox in the foreground: for `cloudtrain checkpoint flush`, and for the next start on a disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.local_home import wait_for_writer
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.checkpoints.sender import EntrySender
from hf_cloudtrain.errors import CloudTrainError, CorruptCheckpointError, NotCommittedError
from hf_cloudtrain.runtime.progress import Bar, Progress
from hf_cloudtrain.storage.client import Storage

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
                    outbox.set_aside(entry, error)
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
    wait_for_writer(outbox.output_dir)
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


@dataclass(frozen=True)
class Outcome:
    """What became of one entry."""

    entry: OutboxEntry
    state: str
    """`committed`; `waiting` for the files of other hosts; `kept` in the outbox, to try again; `lost`."""
    reason: str | None = None


def flush_all_runs(outbox: Outbox, transfer: Callable[[], AbstractContextManager[Progress]]) -> list[Outcome]:
    """Empty an outbox, whatever runs its entries belong to. An error becomes a reason, and the next run is flushed too.

    Args:
        transfer: the context in which the bytes of one run are sent, with what counts them.
    """
    entries = outbox.entries()
    return [
        outcome
        for url in dict.fromkeys(entry.run_url for entry in entries)
        for outcome in _flush_run(outbox, url, [entry for entry in entries if entry.run_url == url], transfer)
    ]


def _flush_run(
    outbox: Outbox,
    url: str,
    entries: list[OutboxEntry],
    transfer: Callable[[], AbstractContextManager[Progress]],
) -> list[Outcome]:
    damaged = {entry.home: reason for entry in entries if (reason := _changed(entry))}
    committed: set[Path] = set()
    incomplete: set[Path] = set()
    trouble = None
    try:
        catalog = Catalog(Storage(url, env.storage_options(None)))
        catalog.storage.check()
        with transfer() as progress:
            committed = {entry.home for entry in flush(catalog, outbox, progress)}
        keys = catalog.checkpoints()
        incomplete = {entry.home for entry in entries if entry.hosts > 1 and entry.key not in keys}
    except CloudTrainError as error:
        trouble = str(error)

    def outcome(entry: OutboxEntry) -> Outcome:
        if entry.home.exists():
            return Outcome(entry, "kept", trouble)
        if entry.home in damaged and entry.home not in committed:
            return Outcome(entry, "lost", damaged[entry.home])
        if entry.home in incomplete:
            return Outcome(entry, "waiting", "other hosts have not uploaded their files")
        return Outcome(entry, "committed")

    return [outcome(entry) for entry in entries]


def _changed(entry: OutboxEntry) -> str | None:
    try:
        entry.check_unchanged()
    except CloudTrainError as error:
        return str(error)
    return None
