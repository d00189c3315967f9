"""The uploader empties an outbox: one background thread in training, the same code in the foreground for `flush`.

One entry at a time, the newest first: claim its folder, send its files (two large ones and several small ones at
once, hashed as they are sent), look at what arrived, look again at what was sent, commit, move the pointers, remove
the entry. Trouble with the storage is warned about once and tried again for as long as the process lives; an entry
leaves the outbox only when it is committed, or when a newer one has overtaken it before it was started. After a commit,
and while nothing waits, old checkpoints are retired.

Before the first byte and right before the commit it looks whether a newer attempt has begun elsewhere (law 6). Then it
stops, and the outbox keeps what is left.

Threads: `cloudtrain-upload` waits for work and sleeps between tries; `cloudtrain-io` threads move bytes and live as
long as one entry; `cloudtrain-retire` lives as long as one pass of deletes. No collective ever runs here.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.outbox import Outbox, OutboxEntry
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.checkpoints.retention import Retention
from hf_cloudtrain.checkpoints.sender import (
    EntrySender,
    set_aside_unusable,
)
from hf_cloudtrain.checkpoints.upload_status import Commit, UploadStatus
from hf_cloudtrain.errors import (
    CloudTrainError,
    CorruptCheckpointError,
    NotCommittedError,
    OvertakenError,
    StorageUnavailableError,
)
from hf_cloudtrain.runtime.progress import Bar, Progress
from hf_cloudtrain.runtime.threads import before_exit
from hf_cloudtrain.storage.retries import jittered

logger = logging.getLogger(__name__)

MAX_WAITING = 2
"""Uncommitted checkpoints a host keeps: one under way, and the newest."""
PAUSES = (5.0, 15.0, 30.0, 60.0)
"""Seconds between tries of an entry that failed, jittered; the last is repeated."""


class UploadQueue:
    """Uploads in the background what `submit` hands over.

    Args:
        uploads: where it notes what it has committed.
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
        *,
        retention: Retention | None = None,
        keep_all: bool = False,
    ) -> None:
        self.progress = Progress()
        self.uploads = uploads
        self.last_error: CloudTrainError | None = None
        self._keep_all = keep_all
        self._deadline: float | None = None
        self._catalog = catalog
        self._outbox = outbox
        self._retention = retention
        self._due = False
        """Whether there was a commit since the last pass began."""
        self._retiring = False
        """Whether a pass is under way."""
        self._changed = threading.Condition()
        self._waiting: list[OutboxEntry] = []
        self._held: OutboxEntry | None = None
        self._current: OutboxEntry | None = None
        self._ownership: Ownership | None = None
        self._stopping = False
        self._hurry = False
        self._gave_up = False
        self._thread = threading.Thread(target=self._work, name="cloudtrain-upload", daemon=True)

    def start(self) -> None:
        """Begin with whatever the outbox holds for this run."""
        self._waiting = self._outbox.entries(self._catalog.storage.url)
        self._thread.start()
        before_exit(self.drain)

    def follow(self, ownership: Ownership | None) -> None:
        """Upload for this attempt until it is overtaken; None: for attempts that are over, whoever has begun since."""
        with self._changed:
            self._ownership = ownership
            self._gave_up = False
            self._changed.notify_all()

    def submit(self, entry: OutboxEntry, *, hold: bool = False) -> None:
        """Hand over an accepted entry; returns at once.

        Args:
            hold: begin with it only when somebody waits for the end; the next one takes its place until then.
        """
        with self._changed:
            self._gave_up = False
            self._waiting = [other for other in self._waiting if other.home != entry.home]
            self._drop_held()
            self._waiting.append(entry)
            if entry.best and self._retention is not None:
                self._retention.hear_of_best(entry.key)
            self._held = entry if hold else None
            self._drop_overtaken(entry)
            self._changed.notify_all()

    def skip(self) -> None:
        """A newer checkpoint was saved, of which this host holds nothing."""
        with self._changed:
            self._drop_held()
            self._retire()  # nothing of its own would ever be the occasion

    def is_busy(self) -> bool:
        """Whether something is under way or next, other than what is held."""
        with self._changed:
            return self._current is not None or any(entry is not self._held for entry in self._waiting)

    def pending(self) -> list[OutboxEntry]:
        """What is not committed yet, newest first."""
        with self._changed:
            found = {
                entry.home: entry for entry in (*self._waiting, *([self._current] if self._current else []))
            }
        return sorted(found.values(), key=lambda entry: entry.key, reverse=True)

    def wait(self, timeout: float | None = None, *, bar: bool = True) -> None:
        """Return when nothing is pending; a wait of over a second shows a progress bar.

        Raises:
            NotCommittedError: after `timeout` seconds, with what to do.
            OvertakenError: a newer attempt has begun, and something was not committed before.
        """
        deadline = time.monotonic() + (timeout if timeout is not None else threading.TIMEOUT_MAX)
        with self._changed:
            self._hurry = True
            self._deadline = deadline
            self._changed.notify_all()
        with Bar(self.progress, hidden=not bar) as shown:
            while (
                self.pending()
                and self._thread.is_alive()
                and time.monotonic() < deadline
                and not self._is_overtaken()
            ):
                with self._changed:
                    self._changed.wait(0.1)  # short turns, so that Ctrl-C is heard
                shown.update()
        self._hurry, self._deadline = False, None
        pending = self.pending()
        if pending:
            self._gave_up = True
            if self._is_overtaken():
                raise self.overtaken_error()
            raise NotCommittedError(self._not_committed(pending))

    def settle(self, timeout: float, *, again: bool = False) -> None:
        """Give the deletion of old checkpoints a little time; what is left is for the next one to finish.

        Args:
            timeout: seconds.
            again: look once more for what may go.
        """
        with self._changed:
            if again:
                self._retire()
            self._changed.wait_for(lambda: not self._retiring, timeout)

    def overtaken_error(self) -> OvertakenError:
        """What to raise where a newer attempt has begun: names what is kept here."""
        assert self._ownership is not None
        names = ", ".join(entry.title for entry in self.pending())
        kept = (
            f"Kept on this machine, and not on storage: {names}. `cloudtrain checkpoint flush {self._outbox.output_dir}` "
            f"stores it as of attempt {self._ownership.attempt.number}, below the newer one. "
        )
        return self._ownership.error(kept if names else "")

    def drain(self) -> None:
        """Finish what is pending before the process ends; never raises, and says what is left and what to do."""
        if self._gave_up or self._stopping or not self.pending():
            return
        if self._is_overtaken():
            self._gave_up = True
            logger.error("%s", self.overtaken_error())
            return
        logger.warning("Training ended early. Finishing the upload; Ctrl-C leaves it for later.")
        try:
            self.wait(env.drain_timeout())
        except (NotCommittedError, OvertakenError) as error:
            logger.error("%s", error)
        except KeyboardInterrupt:
            logger.error("%s", self._not_committed(self.pending()))

    def close(self) -> None:
        """Stop after the entry under way; what is pending stays in the outbox."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _is_overtaken(self) -> bool:
        ownership = self._ownership
        return ownership is not None and ownership.overtaken_by is not None

    def _not_committed(self, pending: list[OutboxEntry]) -> str:
        names = ", ".join(f"{entry.title} (attempt {entry.key.attempt})" for entry in pending)
        reason = f" The last error was: {self.last_error}" if self.last_error else ""
        return (
            f"Not on storage yet: {names}. {'It is' if len(pending) == 1 else 'They are'} kept on this machine; finish "
            f"with `cloudtrain checkpoint flush {self._outbox.output_dir}` or by starting the run again here.{reason}"
        )

    def _drop_overtaken(self, newest: OutboxEntry) -> None:
        """Keep the outbox small: an entry that waited while newer ones came is not worth its upload any more."""
        kept: list[OutboxEntry] = []
        count = 1 if self._current is not None else 0
        best = max((entry.key for entry in self._waiting if entry.best), default=None)
        for entry in sorted(self._waiting, key=lambda entry: entry.key, reverse=True):
            droppable = (
                not self._keep_all
                and entry.key.attempt == newest.key.attempt
                and entry.key < newest.key
                and entry.name is None
                and entry.hosts == 1  # other hosts may have begun with it
                and entry.key != best
                and not (self._retention and self._retention.policy.is_milestone(entry.key.step))
            )
            if droppable and count >= MAX_WAITING:
                self._drop(entry)
            else:
                kept.append(entry)
            count += 1
        self._waiting = kept

    def _drop_held(self) -> None:
        if self._held is not None and self._held in self._waiting:
            self._waiting.remove(self._held)
            self._drop(self._held)
        self._held = None

    def _drop(self, entry: OutboxEntry) -> None:
        logger.warning(
            "%s is not uploaded: the upload is slower than the saves, and a newer one overtook it.",
            entry.title,
        )
        self._outbox.remove(entry, in_background=True)

    def _work(self) -> None:
        failures = 0
        sender = EntrySender(self._catalog)
        while True:
            entry = self._take()
            if entry is None:
                return
            try:
                self.progress.begin(f"Uploading {entry.title}", entry.size)
                with self._outbox.lock():
                    began = time.monotonic()
                    committed = sender.send(entry, self._moved, self._ownership)
                    self.uploads.pace = (entry.size, entry.size / max(1e-3, time.monotonic() - began))
                    self._done(entry, committed)
                failures = 0
            except OvertakenError:
                self._put_back(entry, 0.0)  # the fence has said it; `_take` hands out nothing more
            except BlockingIOError:
                self._put_back(entry, 1.0)  # another process on this disk is at it
            except Exception as error:  # noqa: BLE001 - a thread that dies of surprise loses checkpoints silently
                self._failed(entry, error, failures)
                failures += 1

    def _take(self) -> OutboxEntry | None:
        with self._changed:
            while (not (ready := self._ready()) or self._is_overtaken()) and not self._stopping:
                self._changed.wait()
            if self._stopping:
                return None
            self._current = self._choose(ready)
            self._waiting.remove(self._current)
            return self._current

    def _ready(self) -> list[OutboxEntry]:
        return [entry for entry in self._waiting if entry is not self._held or self._hurry]

    def _choose(self, ready: list[OutboxEntry]) -> OutboxEntry:
        """The newest; where time is short, the newest that can be done in it, or else the smallest."""
        newest_first = sorted(ready, key=lambda entry: entry.key, reverse=True)
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
            if committed and entry.name is None:
                size = entry.size if entry.hosts == 1 else None
                self.uploads.committed(Commit(entry.key, entry.created, time.time(), size))
            self._retire()  # before anybody hears that nothing is pending any more
            self._changed.notify_all()

    def _retire(self) -> None:
        """Delete old checkpoints, beside the uploads: a delete that hangs or is slowed down holds none of them up."""
        self._due = self._retention is not None and self._retention.is_active
        if self._due and not self._retiring:
            with contextlib.suppress(RuntimeError):  # the interpreter is ending: another attempt does it
                threading.Thread(target=self._retire_old, name="cloudtrain-retire", daemon=True).start()
                self._retiring = True

    def _retire_old(self) -> None:
        assert self._retention is not None
        while True:
            with self._changed:
                if not self._due:
                    self._retiring = False
                    self._changed.notify_all()
                    return
                self._due = False
            self._retention.run(lambda: not (self._stopping or self.is_busy()))

    def _failed(self, entry: OutboxEntry, error: Exception, failures: int) -> None:
        ours = (
            error
            if isinstance(error, CloudTrainError)
            else StorageUnavailableError(f"{type(error).__name__}: {error}")
        )
        local = isinstance(error, FileNotFoundError) and not isinstance(error, CloudTrainError)
        if local or isinstance(error, CorruptCheckpointError):
            entry_now = self._outbox.current(entry)
            if entry_now is None or entry_now.files == entry.files:
                self._give_up(entry, ours)
                return
            entry = entry_now  # saved again meanwhile
        first = self.last_error is None
        self.last_error = ours
        (logger.warning if first else logger.info)(
            "The upload of %s failed and is tried again; training goes on. %s", entry.title, ours
        )
        logger.debug("The failed upload", exc_info=error)
        self._put_back(entry, jittered(PAUSES[min(failures, len(PAUSES) - 1)]))

    def _give_up(self, entry: OutboxEntry, error: CloudTrainError) -> None:
        set_aside_unusable(self._outbox, entry, error)
        with self._changed:
            self._current = None
            self.last_error = error
            self._changed.notify_all()

    def _put_back(self, entry: OutboxEntry, pause: float) -> None:
        with self._changed:
            if not any(other.home == entry.home for other in self._waiting):
                self._waiting.append(entry)
            self._current = None
            self._changed.notify_all()
            # Whoever waits for the end does not want to sit out a minute; a second spares the storage.
            self._changed.wait_for(lambda: self._stopping or self._hurry, timeout=pause)
            if self._hurry:
                self._changed.wait_for(lambda: self._stopping, timeout=min(pause, 1.0))
