"""The background uploads of one process: a thread that empties the outbox, one entry at a time, the newest first.

Trouble with the storage is warned about once and tried again for as long as the process lives. An entry leaves the outbox
only when it is committed, or when a newer one has replaced it before its upload began. After each commit, old checkpoints
are retired. Before the first byte and right before the commit the sender checks whether a newer attempt has begun (law 6);
then the queue stops, and the outbox keeps what is left.

Threads: `cloudtrain-upload` waits for work, sleeps between tries, and rests after the end of an attempt; `cloudtrain-io`
threads move the bytes of one entry; `cloudtrain-background` removes replaced entries. No thread runs a collective.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.frozen import OutboxEntry
from hf_cloudtrain.checkpoints.late_files import LateFiles
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.checkpoints.retention import Policy, Retention
from hf_cloudtrain.checkpoints.sender import EntrySender
from hf_cloudtrain.checkpoints.upload_status import Commit, UploadStatus
from hf_cloudtrain.errors import (
    CloudTrainError,
    CorruptCheckpointError,
    NotCommittedError,
    OvertakenError,
    StorageUnavailableError,
)
from hf_cloudtrain.runtime.progress import Bar, Progress
from hf_cloudtrain.runtime.threads import Background, SafeTurn, before_exit
from hf_cloudtrain.storage.retries import jittered

logger = logging.getLogger(__name__)

MAX_WAITING = 2
"""Uncommitted checkpoints that a host keeps: the one under way, and the newest."""
PAUSES = (5.0, 15.0, 30.0, 60.0)
"""Seconds between tries of an entry that failed, jittered; the last is repeated."""
SETTLE_SECONDS = 1.0
"""Longest wait for the removal of entries that were replaced, at the end."""
_BY_KEY = attrgetter("key")


class UploadQueue:
    """Uploads in the background what `submit` hands over.

    Args:
        uploads: where it notes what it has committed.
        retention: retires old checkpoints after each commit.
        keep_all: whether to drop no checkpoint, however slow the uploads are.

    Example:
        >>> queue = UploadQueue(catalog, outbox, uploads)
        >>> queue.start()
        >>> queue.submit(outbox.accept(folder, entry))
        >>> queue.wait(timeout=1800)
    """

    def __init__(
        self,
        catalog: Catalog,
        outbox: Outbox,
        uploads: UploadStatus,
        retention: Retention | None = None,
        *,
        keep_all: bool = False,
    ) -> None:
        self.progress = Progress()
        self.uploads = uploads
        self.last_error: CloudTrainError | None = None
        self.late: LateFiles | None = None
        """What writes the files of a save in the background, if anything does."""
        self._catalog = catalog
        self._outbox = outbox
        self._retention = retention or Retention(catalog, Policy(), None)
        self._keep_all = keep_all
        self._changed = threading.Condition()
        self._waiting: list[OutboxEntry] = []
        self._held: OutboxEntry | None = None
        self._current: OutboxEntry | None = None
        self._ownership: Ownership | None = None
        self._deadline: float | None = None
        self._hurry = False
        """Whether a thread waits for the end."""
        self._gave_up = False
        self._stopping = self._rests = False
        self._thread = threading.Thread(target=self._work, name="cloudtrain-upload", daemon=True)
        self._dropping = Background("The removal of checkpoints that were replaced")
        """No part of a save: on a busy machine it takes longer than the rest."""

    def start(self) -> None:
        """Begin with what the outbox holds for this run."""
        self._waiting = self._outbox.entries(self._catalog.storage.url)
        self._thread.start()
        before_exit(self.drain)

    def follow(self, ownership: Ownership | None) -> None:
        """Upload for this attempt until it is overtaken; None: for attempts that have ended, which nothing overtakes."""
        with self._changed:
            self._ownership = ownership
            self._gave_up = False
            self._wake()

    def submit(self, entry: OutboxEntry, *, hold: bool = False) -> None:
        """Hand over an accepted entry; returns at once.

        Args:
            hold: begin with it only when a thread waits for the end; the next entry replaces it until then.
        """
        with self._changed:
            self._gave_up = False
            self._waiting = [other for other in self._waiting if other.home != entry.home]
            self._drop_held()
            self._waiting.append(entry)
            if entry.best:
                self._retention.note_best(entry.key)
            self._held = entry if hold else None
            self._drop_superseded(entry)
            self._wake()

    def takes_late(
        self,
        folder: Path,
        entry: OutboxEntry,
        since_ns: int,
        *,
        hold: bool,
        lose: Callable[[Exception], None],
    ) -> bool:
        """Take over a save whose files are not all written; False if it is not one. Arguments as `LateFiles.take`."""
        submit = partial(self.submit, hold=hold)
        return self.late is not None and self.late.take(folder, entry, since_ns, submit, lose)

    def skip(self) -> None:
        """Note a newer save of which this host gives nothing."""
        with self._changed:
            self._drop_held()
        self.retire_old()  # without an upload of its own, nothing else starts a pass here

    def retire_old(self) -> None:
        """Retire old checkpoints, while nothing is waiting for its upload."""
        self._retention.request(lambda: not (self._stopping or self.is_busy()))

    def is_busy(self) -> bool:
        """Whether an entry is under way or next, other than a held one."""
        with self._changed:
            return self._current is not None or any(entry is not self._held for entry in self._waiting)

    def pending(self) -> list[OutboxEntry]:
        """What is not committed yet, newest first."""
        with self._changed:
            entries = (*self._waiting, *([self._current] if self._current else []))
        return sorted({entry.home: entry for entry in entries}.values(), key=_BY_KEY, reverse=True)

    def wait(self, timeout: float | None = None, *, bar: bool = True) -> None:
        """Return when nothing is pending; a wait of over a second shows a progress bar.

        Raises:
            NotCommittedError: after `timeout` seconds, with what to do.
            OvertakenError: a newer attempt has begun, and some entries were not committed before.
        """
        deadline = time.monotonic() + (timeout if timeout is not None else threading.TIMEOUT_MAX)
        if self.late is not None:
            self.late.settle(timeout)
        with self._changed:
            self._hurry, self._deadline = True, deadline
            self._changed.notify_all()
        with Bar(self.progress, hidden=not bar) as shown:
            while (
                self.pending()
                and self._thread.is_alive()
                and time.monotonic() < deadline
                and not self._is_overtaken()
            ):
                with self._changed:
                    self._changed.wait(0.1)  # short turns, so that Ctrl-C is noticed
                shown.update()
        self._hurry, self._deadline = False, None
        self._dropping.settle(min(SETTLE_SECONDS, max(0.0, deadline - time.monotonic())))
        if pending := self.pending():
            self._gave_up = True
            error = NotCommittedError(self._not_stored(pending))
            raise self.overtaken_error() if self._is_overtaken() else error

    def overtaken_error(self) -> OvertakenError:
        """What to raise once a newer attempt has begun: names what is kept here, which `drain` need not repeat."""
        assert self._ownership is not None
        self._gave_up = True
        names = ", ".join(entry.title for entry in self.pending())
        kept = (
            f"Kept on this machine, and not on storage: {names}. `cloudtrain checkpoint flush {self._outbox.output_dir}` "
            f"stores it as of attempt {self._ownership.attempt.number}, below the newer one. "
        )
        return self._ownership.error(kept if names else "")

    def drain(self) -> None:
        """Finish what is pending before the process ends; never raises, and logs what is left and what to do."""
        if self._gave_up or self._stopping or not self.pending():
            return
        if self._is_overtaken():
            logger.error("%s", self.overtaken_error())
            return
        logger.warning("Training ended early. Finishing the upload; Ctrl-C leaves it for later.")
        try:
            self.wait(env.drain_timeout())
        except (NotCommittedError, OvertakenError) as error:
            logger.error("%s", error)
        except KeyboardInterrupt:
            logger.error("%s", self._not_stored(self.pending()))

    def close(self) -> None:
        """Stop after the entry under way; what is pending stays in the outbox."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _is_overtaken(self) -> bool:
        ownership = self._ownership
        return ownership is not None and ownership.overtaken_by is not None

    def _not_stored(self, pending: list[OutboxEntry]) -> str:
        return not_stored(pending, self._outbox.output_dir, self.last_error)

    def _drop_superseded(self, newest: OutboxEntry) -> None:
        """Keep the outbox small: an entry that waited while newer ones came is no longer worth its upload."""
        limit = MAX_WAITING - (1 if self._current is not None else 0)
        if not self._keep_all and len(self._waiting) > limit:
            for entry in self._retention.policy.superseded(self._waiting, newest, limit):
                self._waiting.remove(entry)
                self._dropping.add(partial(_drop, self._outbox, entry))

    def _drop_held(self) -> None:
        if self._held is not None and self._held in self._waiting:
            self._waiting.remove(self._held)
            self._dropping.add(partial(_drop, self._outbox, self._held))
        self._held = None

    def _work(self) -> None:
        failures, turn = 0, SafeTurn("The upload queue")
        sender = EntrySender(self._catalog)
        while (entry := self._take()) is not None:
            try:
                self.progress.begin(f"Uploading {entry.title}", entry.size)
                with self._outbox.lock():
                    began = time.monotonic()
                    committed = sender.send(entry, self._moved, self._ownership)
                    self.uploads.pace = (entry.size, entry.size / max(1e-3, time.monotonic() - began))
                    self._done(entry, committed)
                failures = 0
            except OvertakenError:
                self._put_back(entry, 0.0)  # the ownership has logged it; `_take` hands out nothing more
            except BlockingIOError:
                self._put_back(entry, 1.0)  # another process on this disk is uploading
            except Exception as error:  # noqa: BLE001 - a thread that dies of a surprise loses checkpoints silently
                with turn:
                    self._failed(entry, error, failures)
                if self._current is entry:  # that failed, too
                    self._put_back(entry, PAUSES[-1])
                failures += 1

    def _take(self) -> OutboxEntry | None:
        with self._changed:
            self._rests = False  # Ctrl-C may have cut off the start
            while not (ready := self._ready()) or self._is_overtaken() or self._stopping:
                self._rests = self._stopping or (self._ownership is None and not self._waiting)
                if self._rests:
                    self._dropping.close()
                    return None
                self._changed.wait()
            self._current = self._choose(ready)
            self._waiting.remove(self._current)
            return self._current

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._rests:
            self._thread = threading.Thread(target=self._work, name=self._thread.name, daemon=True)
            self._thread.start()
            self._rests = False  # not before: where it cannot start, the next save tries again

    def _ready(self) -> list[OutboxEntry]:
        return [entry for entry in self._waiting if entry is not self._held or self._hurry]

    def _choose(self, ready: list[OutboxEntry]) -> OutboxEntry:
        """The newest; if time is short, the newest that can be done in it, or else the smallest."""
        newest_first = sorted(ready, key=_BY_KEY, reverse=True)
        if self._deadline is None or self.uploads.pace is None:
            return newest_first[0]
        bytes_left = self.uploads.pace[1] * (self._deadline - time.monotonic())
        fitting = [entry for entry in newest_first if entry.size <= bytes_left]
        if fitting or any(entry.hosts > 1 for entry in ready):  # several hosts must choose the same one
            return (fitting or newest_first)[0]
        smallest = min(newest_first, key=lambda entry: entry.size)
        return smallest if smallest.size < newest_first[0].size / 2 else newest_first[0]

    def _moved(self, count: int) -> None:
        self.progress.add(count)
        ownership = self._ownership
        if count > 0 and ownership is not None and ownership.overtaken_by is not None:
            raise ownership.error()  # in the middle of a file: the rest of a large one may take an hour

    def _done(self, entry: OutboxEntry, committed: bool) -> None:
        self._outbox.remove(entry)
        with self._changed:
            self._current = None
            self.last_error = None
            if committed:
                size = entry.size if entry.hosts == 1 else None
                self.uploads.committed(Commit(entry.key, entry.created, time.time(), size))
            self.retire_old()  # before `wait` sees that nothing is pending
            self._changed.notify_all()

    def _failed(self, entry: OutboxEntry, error: Exception, failures: int) -> None:
        ours: CloudTrainError = StorageUnavailableError(f"{type(error).__name__}: {error}")
        if isinstance(error, CloudTrainError):
            ours = error
        local = isinstance(error, FileNotFoundError) and not isinstance(error, CloudTrainError)
        if local or isinstance(error, CorruptCheckpointError):
            entry_now = self._outbox.current(entry)
            if entry_now is None or entry_now.files == entry.files:
                self._outbox.set_aside(entry, ours)
                with self._changed:
                    self._current = None
                    self.last_error = ours
                    self._changed.notify_all()
                return
            entry = entry_now  # saved again in the meantime
        say = logger.info if self.last_error else logger.warning
        self.last_error = ours
        say("The upload of %s failed and will be tried again; training continues. %s", entry.title, ours)
        logger.debug("The failed upload", exc_info=error)
        self._put_back(entry, jittered(PAUSES[min(failures, len(PAUSES) - 1)]))

    def _put_back(self, entry: OutboxEntry, pause: float) -> None:
        with self._changed:
            if not any(other.home == entry.home for other in self._waiting):
                self._waiting.append(entry)
            self._current = None
            self._changed.notify_all()
            # A thread that waits for the end must not sit out a minute; one second spares the storage.
            self._changed.wait_for(lambda: self._stopping or self._hurry, timeout=pause)
            if self._hurry:
                self._changed.wait_for(lambda: self._stopping, timeout=min(pause, 1.0))


def not_stored(pending: list[OutboxEntry], output_dir: Path, last_error: CloudTrainError | None) -> str:
    """The message about checkpoints that are not committed when a training ends."""
    names = ", ".join(f"{entry.title} (attempt {entry.key.attempt})" for entry in pending)
    reason = f" The last error was: {last_error}" if last_error else ""
    return (
        f"Not on storage yet: {names}. {'It is' if len(pending) == 1 else 'They are'} kept on this machine; finish "
        f"with `cloudtrain checkpoint flush {output_dir}` or by starting the run again here.{reason}"
    )


def _drop(outbox: Outbox, entry: OutboxEntry) -> None:
    logger.warning(
        "%s is not uploaded: uploads are slower than saves, and a newer checkpoint has replaced it.",
        entry.title,
    )
    outbox.remove(entry)
