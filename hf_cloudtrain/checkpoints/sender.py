"""One entry of the outbox, from this disk to its commit.

    claim the folder ─▶ send the files, hashed on the way ─▶ check what arrived ─▶ check that the local files have not
    changed ─▶ create the manifest: the commit ─▶ move the pointers

A second try sends only what has not arrived. `host_parts.py` continues the save of several hosts, `named_folders.py` that
of a folder with a name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.frozen import AcceptedFile, OutboxEntry
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.manifest import FileEntry, Manifest
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.errors import StorageError, StorageUnavailableError
from hf_cloudtrain.runtime.threads import in_threads
from hf_cloudtrain.storage.backend import PART_SIZE

logger = logging.getLogger(__name__)

LARGE_AT_ONCE = 2
"""Large files under way at once: with 4 parts of 16 MiB each, 128 MiB of memory."""
SMALL_AT_ONCE = 8
"""Small files under way at once: they wait for answers, not for bandwidth."""


class EntrySender:
    """Sends entries, one at a time, and commits them.

    Args:
        there: see `folder_upload.send_folder`.
    """

    def __init__(self, catalog: Catalog, there: Mapping[str, tuple[str, str]] | None = None) -> None:
        self.manifest: Manifest | None = None
        """Of the named folder that was committed last."""
        self._catalog = catalog
        self._there = there or {}
        self._arrived: dict[tuple[str, str, int, int], str] = {}
        self._best: OutboxEntry | None = None
        """The best checkpoint that was committed here."""

    def send(
        self, entry: OutboxEntry, on_bytes: Callable[[int], None], ownership: Ownership | None = None
    ) -> bool:
        """Upload and commit; whether the checkpoint exists afterwards. With several hosts, one of them commits.

        Args:
            ownership: of the attempt that saved it; None if that attempt has ended.

        Raises:
            OvertakenError: a newer attempt has begun.
        """
        if ownership is not None:
            ownership.check()
        send_files = partial(self._send_files, entry, on_bytes)
        if entry.name is not None:
            self.manifest = NamedFolders(self._catalog).upload(entry, send_files, ownership)
            self._arrived.clear()
            return False
        if self._catalog.holds(entry.key):
            # Sending it again would overwrite a committed checkpoint.
            logger.info("%s of attempt %d was committed before.", entry.title, entry.key.attempt)
            self._move_pointers(entry)
            return True
        if entry.hosts > 1 or entry.save > 1:
            folder, files = HostParts.of(self._catalog, entry).send(entry, send_files)
        else:
            folder = self._catalog.claim(entry.key, entry.nonce, exclusive=entry.exclusive)
            files = send_files(folder)
        if files is not None:
            self._commit(entry, entry.manifest(str(entry.key), folder, files), ownership)
        return files is not None

    def _commit(self, entry: OutboxEntry, manifest: Manifest, ownership: Ownership | None) -> None:
        if ownership is not None:
            ownership.check()
        if not self._catalog.commit(manifest):
            logger.warning("%s of attempt %d was committed before.", entry.title, entry.key.attempt)
        self._arrived.clear()
        self._move_pointers(entry)

    def _send_files(
        self, entry: OutboxEntry, on_bytes: Callable[[int], None], folder: str
    ) -> list[FileEntry]:
        """Send the files of an entry, and check that the storage and the local files are as they must be."""

        def send(file: AcceptedFile) -> FileEntry:
            known = (folder, file.path, file.inode, file.mtime_ns)
            if known in self._arrived:
                on_bytes(file.size)
            else:
                self._arrived[known] = self._copy_there(file, folder) or self._catalog.storage.upload(
                    str(entry.local_path(file)), f"{folder}/{file.path}", on_bytes=on_bytes
                )
            return FileEntry(file.path, file.size, self._arrived[known])

        entry.check_unchanged()
        large = [file for file in entry.files if file.size > PART_SIZE]
        small = [file for file in entry.files if file.size <= PART_SIZE]
        sent = in_threads(send, (large, LARGE_AT_ONCE), (small, SMALL_AT_ONCE))
        files = sorted((file for group in sent for file in group), key=lambda file: file.path)
        self._check_arrival(folder, files)
        entry.check_unchanged()
        return files

    def _copy_there(self, file: AcceptedFile, folder: str) -> str | None:
        """The digest of a file that the storage has copied from an object it has; None if the file must be sent."""
        source, digest = self._there.get(file.path, (None, None))
        if source is None:
            return None
        if source == f"{folder}/{file.path}":
            return digest  # sent by an upload that was interrupted
        try:
            self._catalog.storage.copy(source, f"{folder}/{file.path}", file.size)
        except StorageUnavailableError:
            raise
        except StorageError as error:  # it cannot copy, or the source was deleted
            logger.debug("%s", error)
            return None
        return digest

    def _check_arrival(self, folder: str, files: list[FileEntry]) -> None:
        """List what arrived, rather than trust that every answer was right.

        Twice, if something is missing: sending it again costs more than another listing, and the first may lag.
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
            f"{arrived.get(f'{folder}/{wrong[0].path}')}. Sending it again."
        )

    def _move_pointers(self, entry: OutboxEntry) -> None:
        # An overtaken attempt may commit what it had saved, under its own number, but moves no pointer (law 6).
        if self._catalog.attempts.overtaken_by(entry.key.attempt) is not None:
            return
        if entry.best:
            self._best = entry
        best = self._best
        if best is not None and (entry.best or self._was_moved_back(best)):
            self._catalog.point("best", best.key, best.metrics.get("best_metric"))
        newest = self._catalog.pointer("last")
        if newest is None or newest < entry.key:
            self._catalog.point("last", entry.key)

    def _was_moved_back(self, best: OutboxEntry) -> bool:
        """Whether an older attempt that was overtaken just after its last check has moved the pointer."""
        there = self._catalog.pointer("best")
        return there is not None and there.attempt < best.key.attempt
