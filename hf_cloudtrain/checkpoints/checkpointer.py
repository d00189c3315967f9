"""The checkpoints of one run, seen from one process of it. Every rank calls everything.

    restore     uploads what the outbox still holds -> newest manifest -> verified folder -> its path
    begin       takes one attempt number for all ranks; refuses a start at step 0 on a run that has checkpoints (law 9)
    save        barrier -> the outbox freezes the folder (links, milliseconds) -> the upload queue commits it in the background
    overtaken   a newer attempt has begun: this one uploads, moves and deletes nothing more (law 6)
    wait        all ranks together, until everything is committed, or an error on all of them (law 5)

One rank of each disk (a leader) moves bytes, and rank 0 decides.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import rehearsal
from hf_cloudtrain.checkpoints.attempt_checks import TRAINER_ADVICE, Advice, AttemptChecks, bounded
from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.commit_watch import CommitWatch
from hf_cloudtrain.checkpoints.exactness import NOT_SAID, Exactness
from hf_cloudtrain.checkpoints.flush import finish_left_overs
from hf_cloudtrain.checkpoints.folder_upload import save_folder
from hf_cloudtrain.checkpoints.frozen import ALL_FILES, OutboxEntry, Wanted
from hf_cloudtrain.checkpoints.host_shares import HostShares, Share
from hf_cloudtrain.checkpoints.local_folders import LocalFolders
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Position
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.checkpoints.restore import ANY_MANIFEST, Accept, Restored, Restorer
from hf_cloudtrain.checkpoints.retention import Policy, Retention
from hf_cloudtrain.checkpoints.upload_queue import UploadQueue
from hf_cloudtrain.checkpoints.upload_status import UploadStatus
from hf_cloudtrain.errors import ConfigurationError, ManifestError, PeerError
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.names import LOCAL

logger = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of one run, seen from one process of it.

    Args:
        run_url: any fsspec URL; None takes `HF_CLOUDTRAIN_RUN_URL`.
        output_dir: local folder that holds the checkpoints.
        storage_options: for fsspec; None takes `HF_CLOUDTRAIN_STORAGE_OPTIONS`.
        fresh: start at step 0 although the run may have checkpoints.
        advice: what errors tell the user to do.
        layout: `LocalFolders`, one folder a checkpoint, or `InPlace`, where `output_dir` itself is the checkpoint.

    Example:
        >>> checkpointer = Checkpointer("s3://bucket/runs/mrpc", "out")
        >>> restored = checkpointer.restore()
        >>> checkpointer.begin(restored.manifest.step if restored else 0)
        >>> checkpointer.save(Path("out/checkpoint-500"), Position(global_step=500))
        >>> checkpointer.wait()
    """

    @short_traceback
    def __init__(
        self,
        run_url: str | None,
        output_dir: str | Path,
        *,
        storage_options: dict[str, Any] | None = None,
        fresh: bool = False,
        advice: Advice = TRAINER_ADVICE,
        layout: Callable[[Path], LocalFolders] = LocalFolders,
    ) -> None:
        self.storage = Storage(env.run_url(run_url), env.storage_options(storage_options))
        self.catalog = Catalog(self.storage)
        self.output_dir = Path(output_dir).absolute()
        self.local = layout(self.output_dir)
        self.outbox = Outbox(self.output_dir)
        self.uploads = UploadStatus()
        self.attempt: Attempt | None = None
        self.ownership: Ownership | None = None
        """Whether the attempt is still the newest; None before it begins and after it ends."""
        self.policy = Policy()
        """What stays on storage; takes effect at the next `begin`."""
        self.upload_queue: UploadQueue | None = None
        self._saved_hooks = rehearsal.saved_hooks(self.output_dir)
        self.ranks = self.local.find_ranks()
        self.ranks.meet_disks(self.output_dir / LOCAL)
        self.restorer = Restorer(self.catalog, self.local, self.ranks)
        self._checks = AttemptChecks(self.catalog, self.local, advice, fresh=fresh)
        self._retention = Retention(self.catalog, self.policy, None)
        self._watch: CommitWatch | None = None
        self._shares: HostShares | None = None
        if len(self.ranks.leaders) > 1:
            self._watch = CommitWatch(self.catalog, self.uploads) if self.ranks.is_main else None
            self._shares = HostShares(self.ranks, self._watch, step_in_names=self.local.step_in_names)
        self._save_error: Exception | None = None
        self._told: set[Exactness] = set()

    @property
    def last_saved(self) -> CheckpointKey | None:
        """What this attempt saved last."""
        return self.uploads.last_saved

    @property
    def overtaken_by(self) -> int | None:
        """The newer attempt that has begun (law 6), once this rank knows: rank 0 within a heartbeat. Costs nothing."""
        return self.ownership.overtaken_by if self.ownership is not None else None

    @short_traceback
    def restore(self, *, wanted: Wanted = ALL_FILES, accept: Accept = ANY_MANIFEST) -> Restored | None:
        """The newest whole checkpoint as a verified local folder; None if the run has none. See `Restorer.newest`."""
        self.ranks.each_leader(self.local.check_writable, f"write to {str(self.output_dir)!r}")
        self.ranks.agree(self.storage.check, f"reach {self.storage.url!r}")
        self.finish_uploads()
        if self._checks.fresh:
            return None
        restored = self.restorer.newest(wanted=wanted, accept=accept)
        if restored is not None:
            self._checks.restored = CheckpointKey(restored.manifest.attempt, restored.manifest.step)
        return restored

    def restored_before(self, key: CheckpointKey | None) -> None:
        """Note that a launcher restored this checkpoint before the process began; None: nothing is restored."""
        self._checks.restored = key

    @short_traceback
    def begin(self, global_step: int, *, started_over: bool = False) -> Attempt:
        """Start an attempt at `global_step`, once for all ranks, and the uploads of this process.

        Args:
            started_over: the framework starts over by itself, as with a smaller batch after running out of memory.

        Raises:
            RunHasCheckpointsError: training starts at step 0 on a run that has checkpoints.
        """
        self.ranks.each_leader(self.local.check_writable, f"write to {str(self.output_dir)!r}")
        if global_step == 0 and not self._checks.fresh and not started_over:
            # What was saved here and is not uploaded yet counts as a checkpoint of the run, too.
            self.finish_uploads()
        self._end_attempt()
        start = partial(self._checks.take_attempt, global_step, started_over=started_over)
        self.attempt = self.ranks.agree(start, "start an attempt")
        self.storage.exclusive = self.attempt.exclusive  # only rank 0 has asked the storage
        ownership = self._own(self.attempt)
        prepare = partial(self.local.begin, self.storage.url, global_step, ownership.check)
        self.ranks.each_leader(prepare, "move stale checkpoints")
        self.uploads.last_saved = self.uploads.last_saved_time = self._save_error = None
        self._told.clear()
        self._retention.policy = self.policy
        self._retention.attempt = self.attempt if self.ranks.is_main else None
        if self.ranks.is_leader and self.upload_queue is None:
            self.upload_queue = UploadQueue(
                self.catalog, self.outbox, self.uploads, self._retention, keep_all=bool(self._saved_hooks)
            )
            self.upload_queue.follow(ownership)
            self.upload_queue.start()
        return self.attempt

    @short_traceback
    def save(
        self,
        folder: Path,
        position: Position,
        *,
        since_ns: int = 0,
        exactness: Exactness = NOT_SAID,
        metrics: dict[str, float] | None = None,
        best: bool = False,
        all_written: bool = False,
    ) -> None:
        """Take over a folder that all ranks have just written. Returns in milliseconds; the upload is in the background.

        Args:
            since_ns: files last written before this time (ns) are left-overs of a different save.
            exactness: whether a resume from here equals an uninterrupted run; rank 0 logs what is not a yes.
            best: whether this is the best checkpoint so far.
            all_written: whether the ranks know already that every one of them has written its files.
        """
        if self.attempt is None:
            raise ConfigurationError("save() needs an attempt: call begin() before the first save().")
        if self.ownership is None:
            self._own(self.attempt)  # training continues after its end
        if not all_written:
            self.ranks.barrier()
        entry = OutboxEntry.new(self.storage.url, self.attempt, position, exactness, metrics or {}, best)
        self.uploads.last_saved, self.uploads.last_saved_time = entry.key, entry.created
        if self.ranks.is_main:
            entry.tell_exactness(self._told)
        try:
            look, queue = partial(self.local.written, folder, since_ns), self.upload_queue
            share = Share(entry) if self._shares is None else self._shares.agree(entry, look, queue)
        except PeerError as error:  # a disk cannot be read, so the checkpoint cannot become whole
            self._lose(entry, error)
            return
        submit = partial(self._submit, folder, share, since_ns)
        if self.local.links:
            submit()
        else:  # the next save writes into the same files, so all ranks wait for the copy
            self.ranks.each_leader(partial(self.local.copied_by, submit), "copy the checkpoint")
        for hook in self._saved_hooks:
            hook(position.global_step)

    @short_traceback
    def save_folder(self, folder: str | Path, name: str) -> str:
        """Commit any folder of rank 0's disk under a name, by the same manifest; returns its URL once it is committed.

        Raises:
            NotCommittedError: the storage did not take it in time; the outbox keeps it.
            OvertakenError: a newer attempt has begun.
        """
        self.ranks.barrier()
        saved = self.attempt, self.last_saved.step if self.last_saved else 0

        def save() -> str:
            if self.ownership is not None:
                self.ownership.check()
            return save_folder(self.catalog, self.outbox, self.upload_queue, Path(folder), name, *saved)

        return self.ranks.agree(save, f"commit {name!r}")

    @short_traceback
    def wait(self, timeout: float | None = None, *, in_time: bool = False) -> None:
        """Return, on all ranks together, when everything that was saved is committed.

        Args:
            timeout: seconds; None takes `HF_CLOUDTRAIN_DRAIN_TIMEOUT`.
            in_time: give up requests that are under way when the time is over, too.

        Raises:
            NotCommittedError: on all ranks, with what is missing and how to finish it.
            OvertakenError: on all ranks: a newer attempt has begun.
        """
        seconds = env.drain_timeout() if timeout is None else timeout
        work: list[Callable[[], None]] = [partial(self._wait_for_uploads, seconds), self._check_last_stored]
        if in_time:
            work = [bounded(part, seconds, self.storage.url, self.output_dir) for part in work]
        self.ranks.each_leader(work[0], "finish its uploads")
        self.ranks.agree(work[1], "find its last checkpoint on storage")

    def finish(self, timeout: float | None = None) -> None:
        """The end of training: `wait`; an attempt that begins later does not overtake this one.

        Raises:
            NotCommittedError, OvertakenError: as `wait`.
        """
        self.wait(timeout)
        if self.upload_queue is not None and self.ranks.is_main:
            # Another host may have committed the last checkpoint after this host's last pass.
            if self._shares is not None:
                self.upload_queue.retire_old()
            self._retention.settle()
        self._end_attempt()

    def check_not_overtaken(self) -> None:
        """Raise OvertakenError on all ranks, if one of them knows of a newer attempt. All ranks call it."""
        known = [*filter(None, self.ranks.each_leader(lambda: self.overtaken_by, "look"))]
        if known:
            self.ranks.each_leader(lambda: self._stop(known[0]), "continue: a newer attempt has begun")

    def finish_uploads(self) -> None:
        """Commit, on all ranks, what was saved here before, so that others find it. Raises NotCommittedError after a timeout."""

        def finish() -> None:
            if self.upload_queue is None:
                finish_left_overs(self.catalog, self.outbox, bar=self.ranks.is_main)
            else:  # this process has trained before
                self._end_attempt()
                self.upload_queue.wait(env.drain_timeout(), bar=self.ranks.is_main)

        self.ranks.each_leader(finish, "finish earlier uploads")

    def drain(self) -> None:
        """Before this process ends: finish what is pending; never raises, and logs what is left and what to do."""
        for part in (self.upload_queue, self._watch):
            if part is not None:
                part.drain()

    def close(self) -> None:
        """Stop the background threads after the upload under way; what is left stays in the outbox."""
        for part in (self.ownership, self.upload_queue, self._watch):
            if part is not None:
                part.close()

    def _own(self, attempt: Attempt) -> Ownership:
        self.ownership = Ownership(self.catalog, attempt)
        if self.upload_queue is not None:
            self.upload_queue.follow(self.ownership)
        if self.ranks.is_main:
            self.ownership.start()
        return self.ownership

    def _end_attempt(self) -> None:
        """From now on, what was saved so far is uploaded even if a newer attempt begins."""
        if self.ownership is not None:
            self.ownership.end()
            self.ownership = None
        if self.upload_queue is not None:
            self.upload_queue.follow(None)

    def _stop(self, newer: int) -> None:
        if self.ownership is not None and self.upload_queue is not None:
            self.ownership.note(newer)
            raise self.upload_queue.overtaken_error()

    def _submit(self, folder: Path, share: Share, since_ns: int) -> None:
        """Freeze the folder and queue its upload, on the rank that moves the bytes of this disk."""
        entry, queue = share.entry, self.upload_queue
        if queue is None or entry.key == self.uploads.last_committed:
            return
        if share.wanted is None:
            queue.skip()
        elif self.overtaken_by is not None:
            logger.warning("%s is not uploaded: attempt %d has begun.", entry.title, self.overtaken_by)
        else:
            hold = share.hold and not (entry.best or self.policy.is_milestone(entry.key.step))
            link, wanted = self.local.links, share.wanted
            try:
                if not queue.takes_late(folder, entry, since_ns, hold=hold, lose=partial(self._lose, entry)):
                    entry = self.outbox.accept(folder, entry, since_ns=since_ns, link=link, wanted=wanted)
                    queue.submit(entry, hold=hold)
            except (OSError, ConfigurationError, ManifestError) as error:
                self._lose(entry, error)

    def _lose(self, entry: OutboxEntry, error: Exception) -> None:
        # One lost checkpoint must not end the training; `wait` raises if it was the last.
        self._save_error = error
        logger.error("checkpoint-%d could not be kept for upload: %s", entry.key.step, error)

    def _wait_for_uploads(self, seconds: float) -> None:
        began = time.monotonic()
        if self.upload_queue is not None:
            if self.ownership is not None:
                self.ownership.start()  # ranks other than 0 do not check while they train
            self.upload_queue.wait(seconds, bar=self.ranks.is_main)
        if self._watch is not None:
            left = seconds - (time.monotonic() - began)
            self._watch.wait(max(0.0, left), lambda: self.overtaken_by is not None)

    def _check_last_stored(self) -> None:
        if self.ownership is not None and (newer := self.ownership.look()) is not None:
            self._stop(newer)
        self._checks.check_stored(self.last_saved, self._save_error)
