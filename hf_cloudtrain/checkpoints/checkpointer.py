"""Save, newest, restore, wait, close: the page to read first.

    save      barrier -> the outbox freezes the folder (links, milliseconds) -> the uploader commits it in the background
    restore   what the outbox still holds is committed -> newest manifest -> verified folder -> its path
    begin     one attempt number for all ranks; a start at step 0 on a run that has checkpoints is refused (law 9)
    overtaken set when a newer attempt has begun elsewhere: this one uploads, moves and deletes nothing more (law 6)
    wait      all ranks together, until everything is committed, or an error on all of them (law 5)

Every rank calls everything. One rank a disk (a leader) moves bytes, and rank 0 decides.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints import rehearsal
from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.commit_watch import CommitWatch
from hf_cloudtrain.checkpoints.download import download, is_whole
from hf_cloudtrain.checkpoints.freeze import fresh_files
from hf_cloudtrain.checkpoints.host_shares import HostShares, Look, Share
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, Position, folder_name
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.checkpoints.outbox import Outbox, OutboxEntry
from hf_cloudtrain.checkpoints.ownership import Ownership
from hf_cloudtrain.checkpoints.retention import Policy, Retention
from hf_cloudtrain.checkpoints.sender import flush
from hf_cloudtrain.checkpoints.stale import move_stale
from hf_cloudtrain.checkpoints.upload_queue import UploadQueue
from hf_cloudtrain.checkpoints.upload_status import Commit, Uploads
from hf_cloudtrain.errors import (
    ConfigurationError,
    CorruptCheckpointError,
    ManifestError,
    NewerFormatError,
    NoCheckpointError,
    NotCommittedError,
    PeerError,
    RunHasCheckpointsError,
)
from hf_cloudtrain.runtime.progress import Bar, Progress
from hf_cloudtrain.runtime.provenance import facts, origin
from hf_cloudtrain.runtime.ranks import Ranks
from hf_cloudtrain.runtime.redaction import visible
from hf_cloudtrain.runtime.threads import answer_in_time
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.names import META

logger = logging.getLogger(__name__)

RETIRE_PATIENCE = 5.0
"""Seconds that the end of training gives the deletion of old checkpoints; what is left is finished another time."""
LATE = 0.5
"""Seconds that a wait for which there is little time may take longer: for what was answered in the last moment."""
LAST_LOOK = 60.0
"""Seconds that a process which ends early waits for the parts of other hosts: they may be gone."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was put on this machine."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Advice:
    """What to do next, in the words of the API that its reader uses."""

    resume: str = (
        "Continue it with `trainer.train(resume_from_checkpoint=cloud.restore(args))`, or begin anew with "
        "`CloudTrainCallback(url, fresh=True)` or another URL."
    )
    save: str = "Set save_strategy and save_steps so that it saves."


class Checkpointer:
    """The checkpoints of one run, seen from one process of it.

    Args:
        run_url: any fsspec URL; None takes `HF_CLOUDTRAIN_RUN_URL`.
        output_dir: local folder that holds `checkpoint-<step>` folders.
        storage_options: for fsspec; None takes `HF_CLOUDTRAIN_STORAGE_OPTIONS`.
        fresh: start at step 0 although the run may have checkpoints.
        advice: what errors tell to do.

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
        advice: Advice = Advice(),
    ) -> None:
        self.storage = Storage(env.run_url(run_url), env.storage_options(storage_options))
        self.catalog = Catalog(self.storage)
        self.output_dir = Path(output_dir).absolute()
        rehearsal.check_inside(self.output_dir)
        self.outbox = Outbox(self.output_dir)
        self.ranks = self._find_ranks()
        self.attempt: Attempt | None = None
        self.last_saved: CheckpointKey | None = None
        self.last_saved_time: float | None = None
        """Seconds since 1970."""
        self.policy = Policy()
        """What stays on storage; heeded from the next `begin` on."""
        self._fresh = fresh
        self._restored: CheckpointKey | None = None
        self._numbers_here: dict[str, int] = {}
        self._upload_queue: UploadQueue | None = None
        self._retention = Retention(self.catalog, self.policy, None)
        self._ownership: Ownership | None = None
        self._watch: CommitWatch | None = None
        self._saves = 0
        self._save_error: Exception | None = None
        self._advice = advice
        self.ranks.meet_disks(self.output_dir / META)
        self._shares = HostShares(self.ranks)

    @property
    def upload_pace(self) -> tuple[int, float] | None:
        """Bytes of the checkpoint that was uploaded last, and bytes per second; None before the first."""
        return self._upload_queue.pace if self._upload_queue else None

    @property
    def last_committed(self) -> CheckpointKey | None:
        """The newest checkpoint that this process committed, or on rank 0 saw committed."""
        found = [who.last_committed for who in (self._upload_queue, self._watch) if who is not None]
        return max((key for key in found if key is not None), default=None)

    @property
    def overtaken_by(self) -> int | None:
        """The newer attempt that has begun (law 6), as soon as this rank knows: rank 0 within a heartbeat. Costs nothing."""
        return self._ownership.overtaken_by if self._ownership is not None else None

    @short_traceback
    def restore(
        self,
        *,
        wanted: Callable[[str], bool] = lambda path: True,
        accept: Callable[[Manifest], None] = lambda manifest: None,
    ) -> Restored | None:
        """The newest whole checkpoint as a verified local folder; None where the run has none.

        Args:
            wanted: which files this process's disk needs, by path (other ranks' rng files it does not).
            accept: looks at the manifest before anything is downloaded, and raises where it does not fit.

        Raises:
            CorruptCheckpointError: there are checkpoints, and not one of them is whole.
            StorageError: the storage does not answer.
        """
        self.ranks.each_leader(self._check_writable, f"write to {str(self.output_dir)!r}")
        self.ranks.agree(self.storage.check, f"reach {self.storage.url!r}")
        self.finish_uploads()
        if self._fresh:
            return None
        tried: set[CheckpointKey] = set()
        while True:
            # Listed anew after one that is damaged: it may be gone because a newer one was committed meanwhile.
            keys = self.ranks.agree(self.catalog.known_checkpoints, "list the checkpoints")
            key = max((key for key in keys if key not in tried), default=None)
            if key is None:
                break
            tried.add(key)
            restored, problem = self._restore_one(key, wanted, accept)
            if restored is not None:
                return restored
            if self.ranks.is_main:
                logger.warning("%s is damaged, so the one before is taken. %s", key, problem)
        if tried:
            raise CorruptCheckpointError(
                f"All {len(tried)} checkpoints of {self.storage.url!r} are damaged. `cloudtrain checkpoint verify` shows "
                "how; fresh=True starts at step 0."
            )
        return None

    def _restore_one(
        self, key: CheckpointKey, wanted: Callable[[str], bool], accept: Callable[[Manifest], None]
    ) -> tuple[Restored | None, str]:
        """The checkpoint on this machine, or what is damaged."""
        before: Manifest | None = None
        problem = ""
        while True:
            manifest = self.ranks.agree(partial(self._read_or_reason, key), f"read the manifest of {key}")
            if isinstance(manifest, str) or manifest == before:
                return None, problem or str(manifest)
            accept(manifest)
            bring = self.fetcher(manifest, wanted)
            problems = [found for found in self.ranks.each_leader(bring, f"download {key}") if found]
            if not problems:
                self._restored = key
                self._say_restored(manifest)
                return Restored(self.local_folder(manifest), manifest), ""
            # The manifest itself may have changed on its way here, in a digest: read it once more.
            before, problem = manifest, problems[0]

    def fetcher(
        self, manifest: Manifest, wanted: Callable[[str], bool] = lambda path: True
    ) -> Callable[[], str | None]:
        """Work for one leader: bring a checkpoint here, unless it is here; answers what is damaged, if anything."""

        def bring() -> str | None:
            target = self.local_folder(manifest)
            originals = self.originals(manifest)
            self._reuse_plain(manifest, target, wanted)
            if target.is_dir() and is_whole(target, manifest, wanted=wanted, originals=originals):
                return None
            progress = Progress()
            try:
                with Bar(progress, hidden=not self.ranks.is_main):
                    progress.begin(f"Downloading {manifest.folder}", manifest.size)
                    self._fetch(manifest, wanted, progress.add)
            except CorruptCheckpointError as error:
                return str(error)
            return None

        return bring

    def local_folder(self, manifest: Manifest) -> Path:
        """Where a checkpoint is on this machine: under its plain name, or the one that `renumber` gave it."""
        number = self._numbers_here.get(manifest.key)
        if number is None:
            return self.output_dir / f"checkpoint-{manifest.step}"
        return self.output_dir / f"checkpoint-{number}.a{manifest.attempt}-{manifest.step}"

    def renumber(self, key: str, number: int | None) -> None:
        """Number a checkpoint as steps are counted today, where they are of another size; None takes its own number.

        Its local folder is `checkpoint-<number>.a<attempt>-<step>` then: what this attempt saves cannot collide with it, and
        Trainer's rotation, which reads the number in front, finds it in its place.
        """
        self._numbers_here.pop(key, None)
        if number is not None:
            self._numbers_here[key] = number

    def originals(self, manifest: Manifest) -> Path:
        """Where files are kept as they were, when a restored one had to be made true on this machine."""
        return self.output_dir / META / "originals" / f"{manifest.key}-{manifest.nonce[:8]}"

    def restored_before(self, key: CheckpointKey) -> None:
        """A launcher put this checkpoint here before the process began."""
        self._restored = key

    @short_traceback
    def begin(self, global_step: int, *, started_over: bool = False) -> Attempt:
        """Start an attempt at `global_step`, once for all ranks, and the uploads of this process.

        Args:
            started_over: the framework begins anew by itself, as with a smaller batch after running out of memory.

        Raises:
            RunHasCheckpointsError: training starts at step 0 on a run that has checkpoints.
        """
        self.ranks.each_leader(self._check_writable, f"write to {str(self.output_dir)!r}")
        if global_step == 0 and not self._fresh and not started_over:
            # What was saved here and is still on its way counts as a checkpoint of the run, too.
            self.finish_uploads()
        self._end_attempt()
        self.attempt = self.ranks.agree(lambda: self._begin(global_step, started_over), "start an attempt")
        self.storage.exclusive = self.attempt.exclusive  # rank 0 alone has asked the storage
        self._guard(self.attempt)
        self.ranks.each_leader(lambda: self._move_stale(global_step), "move stale checkpoints")
        self.last_saved = self.last_saved_time = None
        self._save_error = None
        self._retention.policy = self.policy
        self._retention.attempt = self.attempt if self.ranks.is_main else None
        if self.ranks.is_leader and self._upload_queue is None:
            self._upload_queue = UploadQueue(self.catalog, self.outbox, retention=self._retention)
            self._upload_queue.follow(self._ownership)
            self._upload_queue.start()
        if self.ranks.is_main and len(self.ranks.leaders) > 1 and self._watch is None:
            self._watch = CommitWatch(self.catalog)
        return self.attempt

    @short_traceback
    def save(
        self,
        folder: Path,
        position: Position,
        *,
        since_ns: int = 0,
        inexact_reason: str | None = None,
        metrics: dict[str, float] | None = None,
        best: bool = False,
        all_written: bool = False,
    ) -> None:
        """Take over a folder that all ranks have just written. Returns in milliseconds; the upload is in the background.

        Args:
            since_ns: files last written before this time (ns) are left-overs of another save.
            inexact_reason: why a resume from here cannot equal an uninterrupted run, if so.
            best: whether this is the best checkpoint so far.
            all_written: whether the ranks know already that every one of them has written its files.
        """
        assert self.attempt is not None, "begin() first"
        if self._ownership is None:
            self._guard(self.attempt)  # it goes on after its end
        if not all_written:
            self.ranks.barrier()
        key = CheckpointKey(self.attempt.number, position.global_step)
        self._saves = self._saves + 1 if key == self.last_saved else 1
        self.last_saved = key
        # On one disk, a second save of a step takes the place of the first.
        save = self._saves if len(self.ranks.leaders) > 1 else 1
        entry = OutboxEntry(
            run_url=self.storage.url,
            key=key,
            nonce=f"{self.attempt.nonce}-{position.global_step}" + (f"-{save}" if save > 1 else ""),
            position=position,
            exclusive=self.attempt.exclusive,
            exact=inexact_reason is None,
            inexact_reason=inexact_reason,
            created=(now := time.time()),
            metrics={name: value for name, value in (metrics or {}).items() if math.isfinite(value)},
            best=best,
            save=save,
            origin=origin(),
        )
        self.last_saved_time = now
        self._hand_over(folder, entry, since_ns)
        rehearsal.hold(position.global_step)

    def mark_save_begin(self) -> int:
        """Now, in ns, as the file system of `output_dir` has it: its clock and ours need not agree."""
        marker = self.output_dir / META / "save-began"
        marker.touch()
        return marker.stat().st_mtime_ns

    def save_folder(self, folder: str | Path, name: str) -> str:
        """Commit any folder of rank 0's disk under a name, by the same manifest; returns its URL once it is committed.

        Raises:
            NotCommittedError: the storage did not take it in time; the outbox keeps it.
            OvertakenError: a newer attempt has begun.
        """
        folder_name(name)
        self.ranks.barrier()
        return self.ranks.agree(lambda: self._save_folder(Path(folder), name), f"commit {name!r}")

    def saved_at(self, step: int) -> Manifest | None:
        """The newest committed checkpoint of that step, on all ranks; None where there is none, or it is damaged."""

        def find() -> Manifest | None:
            keys = [key for key in self.catalog.checkpoints() if key.step == step]
            manifest = self._read_or_reason(keys[-1]) if keys else None
            return manifest if isinstance(manifest, Manifest) else None

        return self.ranks.agree(find, f"find the checkpoint of step {step}")

    def newest(self) -> CheckpointKey | None:
        """The newest committed checkpoint of the run, on all ranks."""
        return self.ranks.agree(self.catalog.newest, "find the newest checkpoint")

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
        deadline = time.monotonic() + seconds + (LATE if in_time else threading.TIMEOUT_MAX)

        def bounded(work: Callable[[], None]) -> Callable[[], None]:
            def call() -> None:
                try:
                    answer_in_time(work, lambda: time.monotonic() > deadline)
                except TimeoutError:
                    raise NotCommittedError(
                        f"The storage {self.storage.url!r} does not answer whether the last checkpoint is there. What is not "
                        f"is kept on this machine; finish with `cloudtrain checkpoint flush {self.output_dir}`."
                    ) from None

            return call if in_time else work

        self.ranks.each_leader(bounded(lambda: self._wait_for_uploads(seconds)), "finish its uploads")
        self.ranks.agree(bounded(self._check_last_checkpoint_stored), "find its last checkpoint on storage")

    def finish(self, timeout: float | None = None) -> None:
        """The end of training: `wait`; after that, whoever begins a newer attempt does not overtake this one.

        Raises:
            NotCommittedError, OvertakenError: as `wait`.
        """
        self.wait(timeout)
        if self._upload_queue is not None and self.ranks.is_main:
            # Another host may have committed the last one after this host's last look.
            self._upload_queue.settle(RETIRE_PATIENCE, again=len(self.ranks.leaders) > 1)
        self._end_attempt()

    def check_not_overtaken(self) -> None:
        """Raise OvertakenError on all ranks, if one of them knows of a newer attempt. All ranks call it."""
        known = [number for number in self.ranks.each_leader(lambda: self.overtaken_by, "look") if number]
        if known:
            self.ranks.each_leader(lambda: self._stop(known[0]), "go on: a newer attempt has begun")

    def finish_uploads(self) -> None:
        """Wait, on all ranks, for what was saved here before: whoever goes on in another folder must find it.

        Raises:
            NotCommittedError: the storage did not take it in time.
        """
        self.ranks.each_leader(self._finish_left_overs, "finish earlier uploads")

    def drain(self) -> None:
        """Before this process ends: finish what is pending; never raises, and says what is left and what to do."""
        if self._upload_queue is not None:
            self._upload_queue.drain()
        if self._watch is not None:
            try:
                self._watch.wait(min(LAST_LOOK, env.drain_timeout()))
            except NotCommittedError as error:
                logger.error("%s", error)

    def close(self) -> None:
        """Stop the background threads after the upload under way; what is left stays in the outbox."""
        if self._ownership is not None:
            self._ownership.close()
        if self._upload_queue is not None:
            self._upload_queue.close()
        if self._watch is not None:
            self._watch.close()

    def _guard(self, attempt: Attempt) -> None:
        self._ownership = Ownership(self.catalog, attempt)
        if self._upload_queue is not None:
            self._upload_queue.follow(self._ownership)
        if self.ranks.is_main:
            self._ownership.start()

    def _end_attempt(self) -> None:
        """What was saved so far is now of an attempt that is over, and is uploaded whoever has begun since."""
        if self._ownership is not None:
            self._ownership.end()
            self._ownership = None
        if self._upload_queue is not None:
            self._upload_queue.follow(None)

    def _stop(self, newer: int) -> None:
        if self._ownership is not None and self._upload_queue is not None:
            self._ownership.note(newer)
            raise self._upload_queue.overtaken_error()

    def _finish_left_overs(self) -> None:
        if self._upload_queue is not None:  # trained in this process before
            self._end_attempt()
            self._upload_queue.wait(env.drain_timeout(), bar=self.ranks.is_main)
            return
        left = self.outbox.entries(self.storage.url)
        for other in self.outbox.entries():
            if other.run_url != self.storage.url:
                logger.warning(
                    "%s of the run %r was saved here and is not on storage. Finish it with `cloudtrain checkpoint flush %s`.",
                    other.title,
                    other.run_url,
                    self.output_dir,
                )
        if not left:
            return
        logger.warning(
            "Finishing the upload of %s, saved here before.", ", ".join(entry.title for entry in left)
        )
        progress = Progress()
        with Bar(progress, hidden=not self.ranks.is_main):
            flush(self.catalog, self.outbox, progress)

    def _number_here(self, key: CheckpointKey) -> int:
        return self._numbers_here.get(str(key), key.step)

    def _reuse_plain(self, manifest: Manifest, target: Path, wanted: Callable[[str], bool]) -> None:
        """Take what lies here under the plain name, rather than download it for the sake of another number."""
        plain = self.output_dir / f"checkpoint-{manifest.step}"
        if target == plain or target.exists() or not plain.is_dir():
            return
        if is_whole(plain, manifest, wanted=wanted, originals=self.originals(manifest)):
            os.rename(plain, target)

    def _read_or_reason(self, key: CheckpointKey) -> Manifest | str:
        reason = ""
        for _ in range(2):  # a step back costs hours, so one wrong answer is not enough for it
            try:
                return self.catalog.read(key)
            except NoCheckpointError as error:
                reason = str(error)  # retired since the listing
            except NewerFormatError:
                raise  # the one before would silently lose work
            except ManifestError as error:
                reason = str(error)
        return reason

    def _find_ranks(self) -> Ranks:
        return Ranks.current()

    def _fetch(
        self, manifest: Manifest, wanted: Callable[[str], bool], on_bytes: Callable[[int], None]
    ) -> None:
        download(self.catalog, manifest, self.local_folder(manifest), wanted=wanted, on_bytes=on_bytes)

    def _hand_over(self, folder: Path, entry: OutboxEntry, since_ns: int) -> None:
        def look() -> tuple[list[str], list[str]]:
            names = list(fresh_files(folder, since_ns))
            return names, names

        share = self._share(entry, look, entry.key.step)
        if share is not None:
            self._keep(entry, share, partial(self.outbox.accept, folder, since_ns=since_ns))

    def _share(self, entry: OutboxEntry, look: Look, step: int | None = None) -> Share | None:
        """What this disk gives; None where the save is lost."""
        try:
            return self._shares.agree(
                look, lambda: self._upload_queue is not None and self._upload_queue.is_busy(), step
            )
        except PeerError as error:
            self._lose(entry, error)
            return None

    def _keep(self, entry: OutboxEntry, share: Share, accept: Callable[..., OutboxEntry]) -> None:
        """Hand over what `accept` freezes, on the rank that moves bytes."""
        if entry.key == self.last_committed:
            return
        entry = replace(entry, host=share.host, hosts=len(share.givers))
        if self._watch is not None:
            self._watch.expect(entry, share.givers)
        if self._upload_queue is None:
            return
        if share.wanted is None:
            self._upload_queue.skip()
            return
        if self.overtaken_by is not None:
            logger.warning(
                "checkpoint-%d is not uploaded: attempt %d has begun.", entry.key.step, self.overtaken_by
            )
            return
        try:
            wanted = entry.best or self.policy.is_milestone(entry.key.step)
            hold = share.hold and entry.hosts > 1 and not wanted
            self._upload_queue.submit(accept(entry, wanted=share.wanted), hold=hold)
        except (OSError, ConfigurationError, ManifestError) as error:
            self._lose(entry, error)

    def _lose(self, entry: OutboxEntry, error: Exception) -> None:
        # One lost checkpoint must not end the training; `wait` tells if it was the last.
        self._save_error = error
        logger.error("checkpoint-%d could not be kept for upload: %s", entry.key.step, error)

    def _say_restored(self, manifest: Manifest) -> None:
        if not self.ranks.is_main:
            return
        logger.warning(
            "Resuming from %s (attempt %d) of %r.", manifest.folder, manifest.attempt, self.storage.url
        )
        if not manifest.exact:
            reason = visible(manifest.inexact_reason or "no reason is recorded")
            logger.warning("The resumed run will not equal an uninterrupted one: %s", reason)

    def _begin(self, global_step: int, started_over: bool) -> Attempt:
        if self.storage.exclusive is None:
            self.storage.check()
        if self.storage.exclusive is False and not started_over:
            logger.warning(
                "%r does not honour exclusive create, so two processes that train this run at once are told apart only "
                "by best effort. Checkpoints stay safe: each attempt writes its own folders.",
                self.storage.url,
            )
        resumed_from = self._restored
        if resumed_from is None or self._number_here(resumed_from) != global_step:
            resumed_from = self._checked_start(global_step, started_over)
        return self.catalog.attempts.begin(time.time(), global_step, resumed_from, facts())

    def _checked_start(self, global_step: int, started_over: bool) -> CheckpointKey | None:
        keys = self.catalog.known_checkpoints()
        if global_step == 0 and keys and not self._fresh and not started_over:
            raise RunHasCheckpointsError(
                f"The run {self.storage.url!r} has {len(keys)} checkpoints, the newest at step {keys[-1].step}, but "
                f"training starts at step 0. {self._advice.resume}"
            )
        at_step = [key for key in keys if key.step == global_step]
        if global_step and keys and (not at_step or at_step[-1] != keys[-1]):
            logger.warning(
                "Training resumes at step %d, but the newest checkpoint of %r is %s. Use restore() to resume from that.",
                global_step,
                self.storage.url,
                keys[-1],
            )
        return at_step[-1] if at_step else None

    def _check_writable(self) -> None:
        try:
            (self.output_dir / META).mkdir(parents=True, exist_ok=True)
            self.mark_save_begin()
        except OSError as error:
            raise ConfigurationError(
                f"output_dir {str(self.output_dir)!r} cannot be written to ({error.strerror}). Choose another one."
            ) from error

    def _move_stale(self, global_step: int) -> None:
        refuse = self._ownership.check if self._ownership is not None else lambda: None
        move_stale(self.output_dir, self.storage.url, global_step, refuse)

    def _save_folder(self, folder: Path, name: str) -> str:
        if self._ownership is not None:
            self._ownership.check()
        number = self.attempt.number if self.attempt else 0
        step = self.last_saved.step if self.last_saved else 0
        entry = OutboxEntry(
            run_url=self.storage.url,
            key=CheckpointKey(number, step),
            nonce=os.urandom(16).hex(),
            position=Position(global_step=step),
            created=time.time(),
            name=name,
            origin=origin(),
        )
        entry = self.outbox.accept(folder, entry)
        upload_queue = self._upload_queue
        if upload_queue is None:
            with Bar(progress := Progress()):
                flush(self.catalog, self.outbox, progress)
        else:
            upload_queue.submit(entry)
            upload_queue.wait(env.drain_timeout())
        for key in reversed(NamedFolders(self.catalog).keys()):
            manifest = NamedFolders(self.catalog).read(key)
            if manifest.nonce == entry.nonce:
                return f"{self.storage.url}/{manifest.folder}"
        raise NotCommittedError(f"{name!r} was not committed to {self.storage.url!r}.")

    def _wait_for_uploads(self, seconds: float) -> None:
        began = time.monotonic()
        if self._upload_queue is not None:
            if self._ownership is not None:
                self._ownership.start()  # whoever is not rank 0 does not look while it trains
            self._upload_queue.wait(seconds, bar=self.ranks.is_main)
        if self._watch is not None:
            left = max(0.0, began + seconds - time.monotonic())
            self._watch.wait(left, lambda: self.overtaken_by is not None)

    def _check_last_checkpoint_stored(self) -> None:
        """A green run with nothing on storage cannot happen."""
        if self._ownership is not None and (newer := self._ownership.look()) is not None:
            self._stop(newer)
        wanted = self.last_saved or self._restored
        if wanted is None:
            raise NotCommittedError(
                f"Training ended without saving any checkpoint, so {self.storage.url!r} holds nothing of it. "
                f"{self._advice.save}"
            )
        if wanted not in self.catalog.checkpoints() and not self.catalog.holds(wanted):
            reason = f" {self._save_error}" if self._save_error else ""
            raise NotCommittedError(f"The last checkpoint, {wanted}, is not on {self.storage.url!r}.{reason}")


def parse_renumbered(name: str) -> tuple[int, CheckpointKey] | None:
    """Number of today and checkpoint of a folder that `renumber` named; None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d{1,15})\.a(\d{1,12})-(\d{1,15})", name)
    return (int(match[1]), CheckpointKey(int(match[2]), int(match[3]))) if match else None


def last_committed_of(checkpointer: Checkpointer) -> Callable[[], CheckpointKey | None]:
    """Asks for the newest checkpoint that this process committed, without keeping the Checkpointer alive."""
    reference = weakref.ref(checkpointer)

    def ask() -> CheckpointKey | None:
        found = reference()
        return found.last_committed if found is not None else None

    return ask


def uploads_of(checkpointer: Checkpointer) -> Callable[[], Uploads]:
    """Asks how the uploads of this process stand, without keeping the Checkpointer alive."""
    reference = weakref.ref(checkpointer)

    def ask() -> Uploads:
        found = reference()
        if found is None:
            return Uploads()
        commits: list[Commit] = []
        for who in (found._upload_queue, found._watch):
            while who is not None and who.commits:
                commits.append(who.commits.popleft())
        return Uploads(found.last_saved, found.last_saved_time, tuple(commits))

    return ask


def overtaken_by_of(checkpointer: Checkpointer) -> Callable[[], int | None]:
    """Asks for the newer attempt that has overtaken the present one, without keeping the Checkpointer alive."""
    ownership = checkpointer._ownership
    return lambda: ownership.overtaken_by if ownership is not None else None
