"""One attempt at a run, from begin to end: what Trainer, loop and functions do in the same way.

    of          the lifecycle of a run and a folder: the only registry of Checkpointers in this process
    restore     the newest checkpoint, converted where a step has a different size now
    begin       checks that no notice is pending, takes an attempt number for all ranks, and starts heartbeat and step records
    listen      installs signal handlers, and watches for other notices
    must_stop   after each step: whether all ranks save here and leave
    finish      waits until everything is committed, then records the end
    leave       after an emergency save: waits as long as there is time, records the end, and raises PreemptedExit

Saves go to the Checkpointer directly. Every rank calls everything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.checkpoints.restore import Restored
from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.integrations.messages import first_line, last_line, used
from hf_cloudtrain.preemption.agreement import StopDecision
from hf_cloudtrain.preemption.preemption import Preemption, check_no_pending_notice
from hf_cloudtrain.preemption.save_clock import SaveClock
from hf_cloudtrain.report.live import LivePage
from hf_cloudtrain.report.notebook import LiveCard
from hf_cloudtrain.resume.topology import Conversion
from hf_cloudtrain.storage.urls import shown_url
from hf_cloudtrain.tracking.exit_record import Outcome, forget_end, outcome_of, record_end
from hf_cloudtrain.tracking.services.event_files import EventFiles
from hf_cloudtrain.tracking.tracker import StepTracker

_lifecycles: dict[tuple[Any, ...], AttemptLifecycle] = {}


class AttemptLifecycle:
    """The attempts of this process at one run, in one folder, one after another.

    Example:
        >>> lifecycle = AttemptLifecycle.of("s3://bucket/runs/mrpc", Path("out"))
        >>> lifecycle.begin(0, total=1_000)
        >>> lifecycle.listen()
        >>> while not lifecycle.must_stop(): ...     # train a step
        >>> lifecycle.finish()
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self.tracker: StepTracker | None = None
        """Of the attempt under way, on rank 0."""
        self._own_log: StepTracker | None = None
        """What a different rank logs by itself."""
        self.preemption: Preemption | None = None
        self.restored: Manifest | None = None
        """What this training restored."""
        self.is_fresh = False
        """Whether the run starts over, although it may have checkpoints."""
        self.tracker_pages: dict[str, str] = {}
        """Where users find the tracker runs (W&B, MLflow …), by service; in the heartbeat."""
        self.tracker_files: dict[str, EventFiles] = {}
        """Files of tracker runs that are part of the run, by service."""
        self.flushes: list[Callable[[float], None]] = []
        """What sends, before an emergency save leaves, what trackers have not sent, given the seconds that are left."""
        self.is_leaving = False
        """Whether the training was cut short: its last save is, or will be, an emergency save."""
        self.is_over = False
        """Whether the end of the attempt is recorded."""
        self.save_is_due = False
        """Whether all ranks save at this step because it is time (`must_stop`)."""
        self.has_page = False
        """Whether a page lives with the run."""
        self._page: LivePage | None = None
        self._card: LiveCard | None = None

    @classmethod
    def of(cls, run_url: str, output_dir: Path, **options: Any) -> AttemptLifecycle:
        """The lifecycle of this run and folder. One that saved elsewhere finishes its uploads first, so that restore finds them.

        Args:
            options: of the Checkpointer.
        """
        run = (shown_url(run_url), os.getpid())
        key = (*run, output_dir, repr(options))
        for other, lifecycle in _lifecycles.items():
            if other[:2] == run and other != key:
                lifecycle.checkpointer.finish_uploads()
        forget_end()
        if key not in _lifecycles:
            _lifecycles[key] = cls(Checkpointer(run_url, output_dir, **options))
        _lifecycles[key].restored, _lifecycles[key].is_fresh = None, bool(options.get("fresh"))
        _lifecycles[key].checkpointer.restored_before(None)  # what an earlier training restored
        return _lifecycles[key]

    def restore(
        self,
        wanted: Callable[[str], bool] = lambda path: True,
        plan: Callable[[Manifest], Conversion | None] = lambda manifest: None,
    ) -> tuple[Restored, Conversion | None] | None:
        """Restore the newest whole checkpoint, numbered by new steps; None if the run has no checkpoint.

        Args:
            wanted: which files this process's disk needs, by path.
            plan: looks at the manifest before the download: how its position is converted, if it must be. Raises PositionError
                where that is impossible.
        """
        used(self.checkpointer.storage.url)
        conversions: dict[str, Conversion | None] = {}

        def accept(manifest: Manifest) -> None:
            conversion = conversions[manifest.key] = plan(manifest)
            self.number(manifest, conversion)

        restored = self.checkpointer.restore(wanted=wanted, accept=accept)
        self.restored = None if restored is None else restored.manifest
        return None if restored is None else (restored, conversions[restored.manifest.key])

    def number(self, manifest: Manifest, conversion: Conversion | None, number: int | None = None) -> None:
        """Number the local folder of a checkpoint by new steps.

        Args:
            number: its number in the steps that the restored checkpoint counts, if that is not its own.
        """
        if conversion is not None and conversion.is_renumbered:
            number = conversion.step_of(manifest.step if number is None else number)
        self.checkpointer.local.renumber(manifest.key, number)

    def begin(
        self,
        step: int,
        *,
        started_over: bool = False,
        check_notices: bool = True,
        interrupted: Outcome = "stopped",
        total: int | None = None,
        samples: int | None = None,
        saves: str = "saves when the script asks",
        tracks: bool = True,
    ) -> Attempt:
        """Start an attempt at `step`, and its heartbeat.

        Args:
            started_over: the framework starts over by itself, as with a smaller batch after running out of memory.
            check_notices: whether a pending notice stops it.
            total: steps in all; None if unknown.
            samples: in one step; None if unknown.
            saves: how often it saves, for the first line.
            tracks: whether it has a heartbeat.
            interrupted: how an earlier attempt ended that is still under way: in a notebook, the process survives an exception.
        """
        for lifecycle in self._of_same_run():
            lifecycle.interrupt(lifecycle.checkpointer.attempt, interrupted)
        forget_end()
        if check_notices:
            check_no_pending_notice(self.checkpointer)
        used(self.checkpointer.storage.url)
        earlier = self.checkpointer.attempt
        with _interrupted_by_error(self):
            try:
                attempt = self.checkpointer.begin(step, started_over=started_over)
            finally:  # what fails now is recorded as the end of the attempt
                if tracks and self.checkpointer.attempt is not earlier:
                    self._track(first_step=step, total_steps=total, samples_per_step=samples)
            self.is_leaving = self.is_over = False
            first_line(self.checkpointer, step=step, total=total, restored=self.restored, saves=saves)
        return attempt

    def interrupt(self, attempt: Attempt | None, outcome: Outcome = "stopped") -> None:
        """Stop what an attempt does in the background, where `break` or an exception has ended it: a notebook lives on.

        Args:
            attempt: nothing happens if it is no longer the one under way: a generator may be closed late.
        """
        if attempt is self.checkpointer.attempt:
            self.stop_listening()
            self._close_tracker(outcome)
            self.tracker = None

    def _track(self, **expected: Any) -> None:
        """Start the heartbeat of the attempt, on rank 0."""
        checkpointer, attempt = self.checkpointer, self.checkpointer.attempt
        if attempt is not None and checkpointer.ranks.is_main:
            self.tracker = StepTracker(
                checkpointer.catalog,
                attempt.number,
                **expected,
                uploads=checkpointer.uploads,
                ownership=checkpointer.ownership,
                pages=self.tracker_pages,
                files=self.tracker_files,
            )
            self.tracker.start()
            if self.has_page:
                self._page = LivePage(checkpointer.storage, checkpointer.uploads)
                self._page.start()
            self._card = LiveCard.of(checkpointer.catalog, attempt.number, self.tracker)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Record metrics of this rank, once the attempt has begun: those of ranks other than 0 by themselves."""
        checkpointer = self.checkpointer
        ranks, attempt = checkpointer.ranks, checkpointer.attempt
        if not ranks.is_main and self._own_log is None and attempt is not None and not self.is_over:
            self._own_log = StepTracker(
                checkpointer.catalog, attempt.number, first_step=step, total_steps=None, rank=ranks.rank
            )
            self._own_log.start()
        if (log := self.tracker if ranks.is_main else self._own_log) is not None:
            log.log(step, metrics)

    def flush_soon(self) -> None:
        """Store the records of this rank soon: what leads to a checkpoint should not be lost."""
        for log in filter(None, (self.tracker, self._own_log)):
            log.flush_soon()

    def listen(
        self, *, grace: float | None = None, within: CodeType | None = None, clock: SaveClock | None = None
    ) -> None:
        """Wait for notices in the background. Arguments as `Preemption`.

        Args:
            clock: when a save by time is due.
        """
        self.stop_listening()
        self.preemption = Preemption(self.checkpointer, grace=grace, within=within)
        if clock is not None:
            self.preemption.clock = clock
            clock.begin()
        self.preemption.start()

    def stop_listening(self) -> None:
        """Restore the signal handlers that were installed before."""
        if self.preemption is not None:
            self.preemption.close()
            self.preemption = None

    def must_stop(self, *, now: bool = False) -> bool:
        """Whether all ranks save at this step and leave; every rank calls it after every step. Sets `save_is_due`.

        Args:
            now: wait for all ranks (0.5 ms), as after an evaluation.

        Raises:
            OvertakenError: a newer attempt of the run has begun.
        """
        preemption = self.preemption
        self.save_is_due = False
        if preemption is None or self.is_leaving:
            return False
        decision = preemption.decide_now() if now else preemption.step_ended()
        self.save_is_due = decision is StopDecision.SAVE_DUE
        if decision is StopDecision.QUIT:
            self.is_leaving = True
            preemption.quit(self._close_tracker)
        return decision is StopDecision.SAVE

    def saved(self, seconds: float) -> None:
        """Note for how long a save has held up training."""
        if self.preemption is not None:
            self.preemption.save_seconds = seconds
            if self.preemption.clock is not None:
                self.preemption.clock.saved(seconds)

    def has_notice(self) -> bool:
        """Whether any rank has a notice, even if training ended before all of them saved for it. On all ranks."""
        preemption, ranks = self.preemption, self.checkpointer.ranks
        return any(ranks.each(lambda: preemption is not None and preemption.has_notice, "look for notices"))

    def announce(self, step: int) -> None:
        """Log the emergency save of this step, and leave after it."""
        assert self.preemption is not None, "an emergency save follows a notice"
        self.preemption.announce(step)
        self.is_leaving = True

    def leave(self, step: int) -> NoReturn:
        """Wait for the upload of an emergency save as long as there is time, and end all ranks together."""
        assert self.preemption is not None, "an emergency save follows a notice"
        self.is_over = True
        for flush in self.flushes:
            flush(self.preemption.seconds_left())
        self.preemption.leave(step, self._close_tracker)

    def finish(
        self,
        outcome: Outcome = "finished",
        *,
        uploads: bool = True,
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Wait until everything is committed, and record how the attempt ended.

        Args:
            uploads: False where nothing is saved: steps alone are tracked.
            then: what else belongs to a good end.

        Raises:
            NotCommittedError, OvertakenError: on all ranks.
        """
        try:
            if uploads:
                self.checkpointer.finish()
            then()
        except CloudTrainError as error:
            self.end(outcome_of(error), str(error))
            raise
        finally:
            self.stop_listening()  # not before: a signal must not cut off the last upload
        self.end(outcome)
        last_line(self.checkpointer)

    def end(self, outcome: Outcome, reason: str | None = None) -> None:
        """Record the end: in the exit file, and in the last heartbeat."""
        self.is_over = True
        record_end(self.checkpointer, outcome, reason)
        self._close_tracker(outcome)

    def close(self) -> None:
        """Stop the background threads of the Checkpointer; what is not on storage stays in the outbox."""
        self.checkpointer.close()
        for key in [key for key, lifecycle in _lifecycles.items() if lifecycle is self]:
            del _lifecycles[key]

    def _of_same_run(self) -> list[AttemptLifecycle]:
        """This lifecycle, and those of this process that train the same run in different folders."""
        runs = {key[:2] for key, lifecycle in _lifecycles.items() if lifecycle is self}
        return [self, *(other for key, other in _lifecycles.items() if key[:2] in runs and other is not self)]

    def _close_tracker(self, outcome: Outcome) -> None:
        for log in filter(None, (self.tracker, self._own_log)):
            log.close(outcome)
        self._own_log = None
        page, self._page, card, self._card = self._page, None, self._card, None
        if card is not None:
            card.close()
        if page is not None:
            page.close(last=outcome != "overtaken")  # a newer attempt keeps the page by then


@contextlib.contextmanager
def _interrupted_by_error(lifecycle: AttemptLifecycle) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        lifecycle.interrupt(lifecycle.checkpointer.attempt, outcome_of(error))
        raise


def is_used() -> bool:
    """Whether this process trains a run, or has trained one."""
    return any(key[1] == os.getpid() for key in _lifecycles)
