"""TODO docstring."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.freeze import AcceptedFile
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.manifest import FileEntry, Manifest
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.outbox import Outbox, OutboxEntry
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.errors import (
    CloudTrainError,
    StorageError,
    StorageUnavailableError,
)
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.backend import PART_SIZE

logger = logging.getLogger(__name__)


LARGE_AT_ONCE = 2
"""Large files under way at once: with 4 parts of 16 MiB each, 128 MiB of memory."""


SMALL_AT_ONCE = 8
"""Files under way at once in all: small ones wait for answers, not for bandwidth."""


class EntrySender:
    """Sends one entry and commits it. Remembers what arrived, so that a second try sends only the rest.

    Args:
        there: see `send_folder`.
    """

    def __init__(self, catalog: Catalog, there: Mapping[str, tuple[str, str]] | None = None) -> None:
        self.manifest: Manifest | None = None
        """What was committed last."""
        self._catalog = catalog
        self._there = there or {}
        self._arrived: dict[tuple[str, str, int, int], str] = {}
        self._ownership: Ownership | None = None
        self._best: OutboxEntry | None = None
        """The best one that was committed here."""

    def send(
        self, entry: OutboxEntry, on_bytes: Callable[[int], None], ownership: Ownership | None = None
    ) -> bool:
        """Upload and commit; True where the folder exists afterwards, False where the commit is another host's.

        Args:
            fence: of the attempt that this is done for; None where it is for one that is over.

        Raises:
            OvertakenError: a newer attempt has begun.
        """
        self._ownership = ownership
        if ownership is not None:
            ownership.check()
        if entry.name is None and self._catalog.holds(entry.key):
            # Sending it again would write over a committed checkpoint.
            logger.info("%s of attempt %d was committed before.", entry.title, entry.key.attempt)
            self._move_pointers(entry)
            return True
        if entry.name is None:
            manifest_key = str(entry.key)
            folder = self._parts(entry).folder(exclusive=entry.exclusive)
        else:
            manifest_key, folder = NamedFolders(self._catalog).begin(
                entry.name, entry.nonce, entry.key.attempt
            )
            if NamedFolders(self._catalog).holds(manifest_key):
                self.manifest = NamedFolders(self._catalog).read(manifest_key)
                return True
        files = self._send_part(entry, folder, on_bytes)
        if files is None:
            return False
        manifest = Manifest(
            key=manifest_key,
            folder=folder,
            attempt=entry.key.attempt,
            step=entry.key.step,
            nonce=entry.nonce,
            files=tuple(files),
            position=entry.position,
            exact=entry.exact,
            inexact_reason=entry.inexact_reason,
            created=entry.created,
            metrics=entry.metrics,
            origin=entry.origin,
        )
        committed = self._commit(entry, manifest)
        self.manifest = manifest
        self._arrived.clear()
        return committed

    def _send_part(
        self, entry: OutboxEntry, folder: str, on_bytes: Callable[[int], None]
    ) -> list[FileEntry] | None:
        """Send this host's files; the files of all hosts, or None where another one commits them."""
        parts = self._parts(entry)
        # What a part names may be committed by another host at any moment, and is not written again.
        if entry.hosts == 1 or not parts.has(entry.host):
            entry.check_unchanged()
            files = self._send_files(entry, folder, on_bytes)
            self._check_arrival(folder, files)
            entry.check_unchanged()
            if entry.hosts == 1:
                return files
            parts.put(entry.host, files)
        return parts.files() if not parts.missing() and parts.elect(entry.host) else None

    def _parts(self, entry: OutboxEntry) -> HostParts:
        return HostParts(self._catalog, entry.key, entry.nonce, save=entry.save, hosts=entry.hosts)

    def _commit(self, entry: OutboxEntry, manifest: Manifest) -> bool:
        if self._ownership is not None:
            self._ownership.check()
        if entry.name is not None:
            return NamedFolders(self._catalog).commit(manifest)
        if not self._catalog.commit(manifest):
            logger.warning("%s of attempt %d was committed before.", entry.title, entry.key.attempt)
        self._move_pointers(entry)
        return True

    def _move_pointers(self, entry: OutboxEntry) -> None:
        # An overtaken attempt may commit what it had saved, under its own number, but moves no pointer (law 6).
        if self._catalog.attempts.overtaken_by(entry.key.attempt) is not None:
            return
        if entry.best:
            self._best = entry
        if self._best is not None and (entry.best or self._was_moved_back(self._best)):
            self._catalog.point("best", self._best.key, self._best.metrics.get("best_metric"))
        newest = self._catalog.pointer("last")
        if newest is None or newest < entry.key:
            self._catalog.point("last", entry.key)

    def _was_moved_back(self, best: OutboxEntry) -> bool:
        """By an older attempt that was overtaken after it had looked: the one thing it can do in that moment."""
        there = self._catalog.pointer("best")
        return there is not None and there.attempt < best.key.attempt

    def _send_files(
        self, entry: OutboxEntry, folder: str, on_bytes: Callable[[int], None]
    ) -> list[FileEntry]:
        def send(file: AcceptedFile) -> FileEntry:
            known = (folder, file.path, file.inode, file.mtime_ns)
            if known in self._arrived:
                on_bytes(file.size)
            else:
                self._arrived[known] = self._copy_there(file, folder) or self._catalog.storage.upload(
                    str(entry.local_path(file)), f"{folder}/{file.path}", on_bytes=on_bytes
                )
            return FileEntry(file.path, file.size, self._arrived[known])

        large = [file for file in entry.files if file.size > PART_SIZE]
        small = [file for file in entry.files if file.size <= PART_SIZE]
        sent = in_threads(send, (large, LARGE_AT_ONCE), (small, SMALL_AT_ONCE))
        return sorted((file for group in sent for file in group), key=lambda file: file.path)

    def _copy_there(self, file: AcceptedFile, folder: str) -> str | None:
        """The digest of a file whose bytes the storage has, and has copied; None where they are to be sent."""
        source, digest = self._there.get(file.path, (None, None))
        if source is None:
            return None
        if source == f"{folder}/{file.path}":
            return digest  # an upload that was cut off has sent it
        try:
            self._catalog.storage.copy(source, f"{folder}/{file.path}", file.size)
        except StorageUnavailableError:
            raise
        except StorageError as error:  # it does not copy, or somebody has deleted the source
            logger.debug("%s", error)
            return None
        return digest

    def _check_arrival(self, folder: str, files: list[FileEntry]) -> None:
        """Look at what is there, rather than trust that every answer was right.

        Twice, where something is missing: sending it again costs more than another look at a listing that lags.
        """
        wrong: list[FileEntry] = []
        arrived: dict[str, int] = {}
        for _ in range(2):
            arrived = {info.path: info.size for info in self._catalog.storage.list(folder)}
            wrong = [file for file in files if arrived.get(f"{folder}/{file.path}") != file.size]
            if not wrong:
                return
        paths = {file.path for file in wrong}
        self._arrived = {known: digest for known, digest in self._arrived.items() if known[1] not in paths}
        raise StorageUnavailableError(
            f"{wrong[0].path!r} was sent with {wrong[0].size} bytes, and the storage has "
            f"{arrived.get(f'{folder}/{wrong[0].path}')}. It is sent again."
        )


def set_aside_unusable(outbox: Outbox, entry: OutboxEntry, error: CloudTrainError) -> None:
    """Its bytes changed or are gone: nothing that waits could bring them back."""
    try:
        where = f"What is left of it is in {str(outbox.set_aside(entry))!r}."
    except OSError:
        where = "Nothing is left of it."
    logger.error("%s cannot be committed: %s %s", entry.title, error, where)
