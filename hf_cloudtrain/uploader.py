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
from collections import deque
from collections.abc import Callable, Mapping

from hf_cloudtrain import env
from hf_cloudtrain.catalog import Catalog, CheckpointKey
from hf_cloudtrain.errors import (
    CloudTrainError,
    CorruptCheckpointError,
    NotCommittedError,
    OvertakenError,
    StorageError,
    StorageUnavailableError,
)
from hf_cloudtrain.fence import Fence
from hf_cloudtrain.freeze import AcceptedFile
from hf_cloudtrain.manifest import FileEntry, Manifest
from hf_cloudtrain.native import PART_SIZE
from hf_cloudtrain.outbox import REMEMBERED_COMMITS, Commit, Outbox, OutboxEntry
from hf_cloudtrain.parts import Parts
from hf_cloudtrain.process import before_exit, in_threads
from hf_cloudtrain.progress import Bar, Progress
from hf_cloudtrain.retention import Retention
from hf_cloudtrain.storage import jittered

logger = logging.getLogger(__name__)

LARGE_AT_ONCE = 2
"""Large files under way at once: with 4 parts of 16 MiB each, 128 MiB of memory."""
SMALL_AT_ONCE = 8
"""Files under way at once in all: small ones wait for answers, not for bandwidth."""
MAX_WAITING = 2
"""Uncommitted checkpoints a host keeps: one under way, and the newest."""
LOCK_PATIENCE = 30.0
"""Seconds to wait for another process's lock: the loader workers of a killed trainer hold it until they notice."""
PAUSES = (5.0, 15.0, 30.0, 60.0)
"""Seconds between tries of an entry that failed, jittered; the last is repeated."""


class Uploader:
    """Uploads in the background what `submit` hands over.

    Example:
        >>> uploader = Uploader(catalog, outbox)
        >>> uploader.start()
        >>> uploader.submit(outbox.accept(folder, entry))
        >>> uploader.wait(timeout=1800)
    """

    def __init__(
        self,
        catalog: Catalog,
        outbox: Outbox,
        *,
        retention: Retention | None = None,
    ) -> None:
        self.progress = Progress()
        self.last_committed: CheckpointKey | None = None
        self.commits: deque[Commit] = deque(maxlen=REMEMBERED_COMMITS)
        """For whoever takes them from here."""
        self.last_error: CloudTrainError | None = None
        self.pace: tuple[int, float] | None = None
        """Bytes of the last checkpoint that went through, and bytes per second."""
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
        self._fence: Fence | None = None
        self._stopping = False
        self._hurry = False
        self._gave_up = False
        self._thread = threading.Thread(target=self._work, name="cloudtrain-upload", daemon=True)

    def start(self) -> None:
        """Begin with whatever the outbox holds for this run."""
        self._waiting = self._outbox.entries(self._catalog.storage.url)
        self._thread.start()
        before_exit(self.drain)

    def follow(self, fence: Fence | None) -> None:
        """Upload for this attempt until it is overtaken; None: for attempts that are over, whoever has begun since."""
        with self._changed:
            self._fence = fence
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
        assert self._fence is not None
        names = ", ".join(entry.title for entry in self.pending())
        kept = (
            f"Kept on this machine, and not on storage: {names}. `cloudtrain checkpoint flush {self._outbox.output_dir}` "
            f"stores it as of attempt {self._fence.attempt.number}, below the newer one. "
        )
        return self._fence.error(kept if names else "")

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
        fence = self._fence
        return fence is not None and fence.overtaken_by is not None

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
                not env.verify_folder()  # whose starts are compared checkpoint by checkpoint
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
        sender = _Sender(self._catalog)
        while True:
            entry = self._take()
            if entry is None:
                return
            try:
                self.progress.begin(f"Uploading {entry.title}", entry.size)
                with self._outbox.lock():
                    began = time.monotonic()
                    committed = sender.send(entry, self._moved, self._fence)
                    self.pace = (entry.size, entry.size / max(1e-3, time.monotonic() - began))
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
        if self._deadline is None or self.pace is None:
            return newest_first[0]
        bytes_left = self.pace[1] * (self._deadline - time.monotonic())
        fitting = [entry for entry in newest_first if entry.size <= bytes_left]
        if fitting or any(entry.hosts > 1 for entry in ready):  # several hosts must choose the same one
            return (fitting or newest_first)[0]
        smallest = min(newest_first, key=lambda entry: entry.size)
        return smallest if smallest.size < newest_first[0].size / 2 else newest_first[0]

    def _moved(self, count: int) -> None:
        self.progress.add(count)
        fence = self._fence
        if count > 0 and fence is not None and fence.overtaken_by is not None:
            raise fence.error()  # in the middle of a file: the rest of a large one may take an hour

    def _done(self, entry: OutboxEntry, committed: bool) -> None:
        self._outbox.remove(entry)
        with self._changed:
            self._current = None
            self.last_error = None
            if committed and entry.name is None:
                self.last_committed = max(entry.key, self.last_committed or entry.key)
                size = entry.size if entry.hosts == 1 else None
                self.commits.append(Commit(entry.key, entry.created, time.time(), size))
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
        _set_aside(self._outbox, entry, error)
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


class _Sender:
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
        self._fence: Fence | None = None
        self._best: OutboxEntry | None = None
        """The best one that was committed here."""

    def send(self, entry: OutboxEntry, on_bytes: Callable[[int], None], fence: Fence | None = None) -> bool:
        """Upload and commit; True where the folder exists afterwards, False where the commit is another host's.

        Args:
            fence: of the attempt that this is done for; None where it is for one that is over.

        Raises:
            OvertakenError: a newer attempt has begun.
        """
        self._fence = fence
        if fence is not None:
            fence.refuse()
        if entry.name is None and self._catalog.holds(entry.key):
            # Sending it again would write over a committed checkpoint.
            logger.info("%s of attempt %d was committed before.", entry.title, entry.key.attempt)
            self._move_pointers(entry)
            return True
        if entry.name is None:
            manifest_key = str(entry.key)
            folder = self._parts(entry).folder(exclusive=entry.exclusive)
        else:
            manifest_key, folder = self._catalog.begin_folder(entry.name, entry.nonce, entry.key.attempt)
            if self._catalog.holds_folder(manifest_key):
                self.manifest = self._catalog.read_folder(manifest_key)
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

    def _parts(self, entry: OutboxEntry) -> Parts:
        return Parts(self._catalog, entry.key, entry.nonce, save=entry.save, hosts=entry.hosts)

    def _commit(self, entry: OutboxEntry, manifest: Manifest) -> bool:
        if self._fence is not None:
            self._fence.refuse()
        if entry.name is not None:
            return self._catalog.commit_folder(manifest)
        if not self._catalog.commit(manifest):
            logger.warning("%s of attempt %d was committed before.", entry.title, entry.key.attempt)
        self._move_pointers(entry)
        return True

    def _move_pointers(self, entry: OutboxEntry) -> None:
        # An overtaken attempt may commit what it had saved, under its own number, but moves no pointer (law 6).
        if self._catalog.overtaken_by(entry.key.attempt) is not None:
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


def flush(catalog: Catalog, outbox: Outbox, progress: Progress) -> list[OutboxEntry]:
    """Upload and commit what an outbox holds for a run, in the foreground; returns the entries that it committed.

    Raises:
        StorageError: the storage does not answer; what is left stays in the outbox.
        NotCommittedError: another process on this machine holds the outbox.
    """
    done = []
    sender = _Sender(catalog)
    try:
        with outbox.lock(patience=LOCK_PATIENCE):
            for entry in outbox.entries(catalog.storage.url):
                progress.begin(f"Uploading {entry.title}", entry.size)
                try:
                    sender.send(entry, progress.add)
                except CorruptCheckpointError as error:
                    _set_aside(outbox, entry, error)
                else:
                    done.append(entry)
                    outbox.remove(entry)
    except BlockingIOError:
        raise NotCommittedError(
            f"Another process is uploading from {str(outbox.folder)!r}. Let it finish, or end it and try again."
        ) from None
    return done


def send_folder(
    catalog: Catalog,
    entry: OutboxEntry,
    progress: Progress,
    there: Mapping[str, tuple[str, str]] | None = None,
) -> Manifest:
    """Upload and commit a named folder from where it lies, in the foreground and without an outbox.

    Args:
        there: of files whose bytes the storage has already, by their path: the object there, and the digest. They are
            copied there, and not sent.

    Raises:
        CorruptCheckpointError: a file was written meanwhile.
        StorageError: the storage does not answer. Nothing is committed then.
    """
    there = there or {}
    progress.begin(
        f"Uploading {entry.title}", sum(file.size for file in entry.files if file.path not in there)
    )
    sender = _Sender(catalog, there)
    if not sender.send(entry, progress.add) or sender.manifest is None:
        raise NotCommittedError(
            f"{entry.title!r} was not committed: somebody else has written to its place on "
            f"{catalog.storage.url!r} meanwhile. Try again."
        )
    return sender.manifest


def _set_aside(outbox: Outbox, entry: OutboxEntry, error: CloudTrainError) -> None:
    """Its bytes changed or are gone: nothing that waits could bring them back."""
    try:
        where = f"What is left of it is in {str(outbox.set_aside(entry))!r}."
    except OSError:
        where = "Nothing is left of it."
    logger.error("%s cannot be committed: %s %s", entry.title, error, where)
