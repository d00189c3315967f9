"""Looks whether a checkpoint exists that several hosts complete.

A host that has sent its part does not know whether it was the last, and need not: only rank 0, which speaks for the
run, looks, less and less often, with one small request each time. So the storage is asked by one process of a job,
however many hosts there are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.outbox import OutboxEntry
from hf_cloudtrain.checkpoints.upload_status import Commit, UploadStatus
from hf_cloudtrain.errors import CloudTrainError, NotCommittedError

logger = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between two looks while training goes on; the last is repeated until the next save."""
SHORT_PAUSE = 0.5
"""Seconds between two looks while somebody waits."""
NAMED_HOSTS = 5
"""Hosts that an error names."""


class CommitWatch:
    """Knows which checkpoints of this attempt exist, of those that other hosts have a part in.

    Example:
        >>> watch = CommitWatch(catalog, uploads)
        >>> watch.expect(entry, ["rank 0 on 'node-0'", "rank 8 on 'node-1'"])
        >>> watch.wait(timeout=1800)
    """

    def __init__(self, catalog: Catalog, uploads: UploadStatus) -> None:
        self._uploads = uploads
        self._catalog = catalog
        self._changed = threading.Condition()
        self._awaited: dict[CheckpointKey, tuple[OutboxEntry, tuple[str, ...]]] = {}
        self._stopping = False
        self._thread: threading.Thread | None = None

    def expect(self, entry: OutboxEntry, givers: tuple[str, ...]) -> None:
        """A checkpoint was handed over on all hosts; returns at once.

        Args:
            entry: as any host has it.
            givers: the hosts that send a part, in words.
        """
        with self._changed:
            self._awaited[entry.key] = (entry, givers)
            self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="cloudtrain-watch", daemon=True)
                self._thread.start()

    def wait(self, timeout: float, in_vain: Callable[[], bool] = lambda: False) -> None:
        """Return when the newest one exists: those before it came first, or were given up.

        Args:
            in_vain: whether it will not come any more; then this returns, too.

        Raises:
            NotCommittedError: after `timeout` seconds, with the hosts that are missing.
        """
        deadline = time.monotonic() + timeout
        pause = 0.01
        while (awaited := self._pending()) and not in_vain():
            self._look(awaited)
            with self._changed:
                newest = self._awaited.get(awaited[0])
            if newest is not None and time.monotonic() >= deadline:
                raise NotCommittedError(self._not_committed(*newest))
            with self._changed:
                self._changed.wait(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(SHORT_PAUSE, pause * 2)

    def close(self) -> None:
        """Look no more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _work(self) -> None:
        looks = 0
        newest: CheckpointKey | None = None
        while True:
            with self._changed:
                if self._stopping or not self._awaited:
                    self._thread = None
                    return
                if newest != (newest := max(self._awaited)):
                    looks = 0
                self._changed.wait(PAUSES[min(looks, len(PAUSES) - 1)])
            looks += 1
            self._look(self._pending())

    def _pending(self) -> list[CheckpointKey]:
        """What is awaited, the newest first."""
        with self._changed:
            return sorted(self._awaited, reverse=True)

    def _look(self, awaited: list[CheckpointKey]) -> None:
        try:
            found = next((key for key in awaited if self._catalog.holds(key)), None)
        except CloudTrainError as error:
            logger.debug("Cannot look whether a checkpoint is committed: %s", error)
            return
        if found is None:
            return
        with self._changed:
            if found in self._awaited:
                self._uploads.committed(Commit(found, self._awaited[found][0].created, time.time()))
            for key in [key for key in self._awaited if key <= found]:
                del self._awaited[key]
            self._changed.notify_all()

    def _not_committed(self, entry: OutboxEntry, givers: tuple[str, ...]) -> str:
        title = f"{entry.title} (attempt {entry.key.attempt})"
        if len(givers) == 1:
            names = list(givers)
        else:
            parts = HostParts(self._catalog, entry.key, entry.nonce, save=entry.save, hosts=len(givers))
            try:
                names = [givers[host] for host in parts.missing()]
            except CloudTrainError as error:
                return f"Not on storage yet, as far as can be seen: {title}. {error}"
        if not names:
            return (
                f"Not on storage yet: {title}. All its parts are; the host that commits them has not done so."
            )
        more = f" and {len(names) - NAMED_HOSTS} more" if len(names) > NAMED_HOSTS else ""
        return (
            f"Not on storage yet: {title}. What is missing is the part of {', '.join(names[:NAMED_HOSTS])}{more}. If it is "
            "kept there, `cloudtrain checkpoint flush <output_dir>` on that machine finishes it, as does starting the run "
            "again on the same machines."
        )
