"""Watches until a checkpoint exists that several hosts complete.

A host that has sent its part does not know whether it was the last, and need not know: only rank 0, which speaks for the
run, checks, less and less often, with one small request each time. So one process of a job asks the storage, whatever the
number of hosts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.host_parts import HostParts
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.checkpoints.upload_status import Commit, UploadStatus
from hf_cloudtrain.errors import CloudTrainError, NotCommittedError
from hf_cloudtrain.runtime.threads import SafeTurn

logger = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds between two checks while training continues; the last is repeated until the next save."""
SHORT_PAUSE = 0.5
"""Seconds between two checks while a process waits for the commit."""
LAST_LOOK = 60.0
"""Seconds that a process which ends early waits for the parts of other hosts: they may be gone."""
NAMED_HOSTS = 5
"""Hosts that an error names."""


class CommitWatch:
    """Notes in `uploads` which checkpoints of this attempt exist, of those that other hosts have a part in.

    Example:
        >>> watch = CommitWatch(catalog, uploads)
        >>> watch.expect(entry, ["rank 0 on 'node-0'", "rank 8 on 'node-1'"])
        >>> watch.wait(timeout=1800)
    """

    def __init__(self, catalog: Catalog, uploads: UploadStatus) -> None:
        self._catalog = catalog
        self._uploads = uploads
        self._changed = threading.Condition()
        self._expected: dict[CheckpointKey, tuple[OutboxEntry, tuple[str, ...]]] = {}
        self._stopping = False
        self._thread: threading.Thread | None = None

    def expect(self, entry: OutboxEntry, givers: tuple[str, ...]) -> None:
        """Note a save that was handed over on all hosts; returns at once.

        Args:
            givers: the hosts that send a part, for messages.
        """
        with self._changed:
            if entry.key == self._uploads.last_committed:
                return
            self._expected[entry.key] = (entry, givers)
            self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="cloudtrain-watch", daemon=True)
                self._thread.start()

    def wait(self, timeout: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Return when the newest one exists, or when `is_over`: those before it came first, or were given up.

        Raises:
            NotCommittedError: after `timeout` seconds, with the hosts that are missing.
        """
        deadline = time.monotonic() + timeout
        pause = 0.01
        while (expected := self._newest_first()) and not is_over():
            self._look(expected)
            with self._changed:
                newest = self._expected.get(expected[0])
            if newest is not None and time.monotonic() >= deadline:
                raise NotCommittedError(self._not_committed(*newest))
            with self._changed:
                self._changed.wait(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(SHORT_PAUSE, pause * 2)

    def drain(self) -> None:
        """Wait for the other hosts' parts before this process ends; never raises."""
        try:
            self.wait(min(LAST_LOOK, env.drain_timeout()))
        except NotCommittedError as error:
            logger.error("%s", error)

    def close(self) -> None:
        """Stop watching."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _work(self) -> None:
        looks, turn = 0, SafeTurn("The check for a commit of several hosts")
        newest: CheckpointKey | None = None
        while True:
            with self._changed:
                if self._stopping or not self._expected:
                    self._thread = None
                    return
                if newest != (newest := max(self._expected)):
                    looks = 0
                self._changed.wait(PAUSES[min(looks, len(PAUSES) - 1)])
            looks += 1
            with turn:
                self._look(self._newest_first())

    def _newest_first(self) -> list[CheckpointKey]:
        with self._changed:
            return sorted(self._expected, reverse=True)

    def _look(self, expected: list[CheckpointKey]) -> None:
        try:
            found = next((key for key in expected if self._catalog.holds(key)), None)
        except CloudTrainError as error:
            logger.debug("Cannot check whether a checkpoint is committed: %s", error)
            return
        if found is None:
            return
        with self._changed:
            if found in self._expected:
                self._uploads.committed(Commit(found, self._expected[found][0].created, time.time()))
            for key in [key for key in self._expected if key <= found]:
                del self._expected[key]
            self._changed.notify_all()

    def _not_committed(self, entry: OutboxEntry, givers: tuple[str, ...]) -> str:
        title = f"{entry.title} (attempt {entry.key.attempt})"
        try:
            missing = HostParts.of(self._catalog, entry).missing() if len(givers) > 1 else [0]
        except CloudTrainError as error:
            return f"Not on storage yet, as far as can be seen: {title}. {error}"
        if not missing:
            return f"Not on storage yet: {title}. All parts are there; the host that commits has not done so."
        more = f" and {len(missing) - NAMED_HOSTS} more" if len(missing) > NAMED_HOSTS else ""
        names = ", ".join(givers[host] for host in missing[:NAMED_HOSTS])
        return (
            f"Not on storage yet: {title}. Missing is the part of {names}{more}. If it is kept there, `cloudtrain "
            "checkpoint flush <output_dir>` on that machine finishes it, as does starting the run again on the same "
            "machines."
        )
