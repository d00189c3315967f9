"""What the callbacks of one run share: one lifecycle, what was restored, and what the training does at this step."""

from __future__ import annotations

import logging
import os
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers.trainer_utils import SaveStrategy

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.integrations.messages import expect_use
from hf_cloudtrain.integrations.trainer import topology
from hf_cloudtrain.integrations.trainer.checks import (
    check_all_processes_train_together,
    check_no_jit_checkpoint,
    check_not_complete,
)
from hf_cloudtrain.integrations.trainer.complete import CompleteRun, record_completion
from hf_cloudtrain.integrations.trainer.forgotten import ForgottenCallback
from hf_cloudtrain.integrations.trainer.identity import Identity
from hf_cloudtrain.integrations.trainer.position import EpochLength, step_samples
from hf_cloudtrain.integrations.trainer.reports import find_reports
from hf_cloudtrain.integrations.trainer.state import Record, RestoredState
from hf_cloudtrain.preemption.preemption import Preemption
from hf_cloudtrain.preemption.save_clock import SaveClock
from hf_cloudtrain.resume.topology import Conversion
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.storage.urls import normal_url
from hf_cloudtrain.tracking.services.event_files import EventFiles

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LastSave:
    """The emergency save, which is the last thing that a training does."""

    is_here: bool
    """Whether it saves at this step, rather than after the evaluation at the end of the epoch."""
    inexact_reason: str | None = None
    """Why a resume from that save cannot equal an uninterrupted run, if so."""


class Session:
    """The session of one run in this process; `of` finds it. Callbacks that name the same URL are one attempt.

    Example:
        >>> Session.of("s3://bucket/runs/mrpc", None, fresh=False).restore(args)
    """

    _sessions: ClassVar[weakref.WeakValueDictionary[tuple[str, int], Session]] = weakref.WeakValueDictionary()

    def __init__(self, run_url: str, storage_options: dict[str, Any] | None, *, fresh: bool) -> None:
        self.run_url = run_url
        self._options: dict[str, Any] = {"storage_options": storage_options, "fresh": fresh}
        self._policy = Policy()
        self.identity = Identity()
        """The model, arguments and data of this process."""
        self.listens = False
        """Whether a callback of this session waits for notices."""
        self.tracks = False
        """Whether a callback of this session tracks the steps."""
        self.clock: SaveClock | None = None
        """When a save by time is due."""
        self.last_save: LastSave | None = None
        """The emergency save, once it is decided (`leave`)."""
        self.has_page = False
        """Whether a page lives with the run."""
        self.tracker_pages: dict[str, str] = {}
        """Where users find the tracker runs, by service."""
        self.tracker_files: dict[str, EventFiles] = {}
        """Files of tracker runs that are part of the run, by service."""
        self._uploads = False
        self._lifecycle: AttemptLifecycle | None = None
        self._restored: tuple[Manifest, Conversion | None] | None = None
        self._forgotten: ForgottenCallback | None = None
        self._complete: CompleteRun | None = None
        """What `restore` found, if nothing is left to train."""
        self._begun: TrainerState | None = None
        self._began: tuple[TrainingArguments, int] | None = None
        """The arguments of the attempt under way, and the step at which it began."""
        self._ended = False

    @classmethod
    def of(
        cls,
        run_url: str | os.PathLike[str] | None,
        storage_options: dict[str, Any] | None,
        *,
        fresh: bool,
        policy: Policy | None = None,
        listens: bool = False,
        page: bool = False,
    ) -> Session:
        """The session of a run in this process, with what one more callback adds to it.

        Args:
            policy: what stays on storage.
            listens: whether the callback waits for notices.
            page: whether a page lives with the run.
        """
        url = normal_url(env.run_url(run_url))
        key = (url, os.getpid())
        session = cls._sessions.get(key)
        if session is None or session._ended or session._options["fresh"] != fresh:
            session = cls._sessions[key] = cls(url, storage_options, fresh=fresh)
            expect_use(url, "Pass the callback to Trainer: Trainer(…, callbacks=[cloud]).")
        session._policy = policy or session._policy
        session.listens |= listens
        session.has_page |= page
        return session

    @property
    def lifecycle(self) -> AttemptLifecycle:
        """The lifecycle that `open` made."""
        if self._lifecycle is None:
            raise ConfigurationError(
                "Nothing was trained or restored yet: call restore(args) or trainer.train() first."
            )
        return self._lifecycle

    @property
    def checkpointer(self) -> Checkpointer:
        """Of the lifecycle."""
        return self.lifecycle.checkpointer

    @property
    def is_leaving(self) -> bool:
        """Whether the training was cut short: the emergency callback waits for the uploads within the time there is."""
        return self._lifecycle is not None and self._lifecycle.is_leaving

    @property
    def preemption(self) -> Preemption | None:
        """What waits for notices while it trains; None before and after, and where no callback of this session waits for them."""
        return None if self._lifecycle is None else self._lifecycle.preemption

    @property
    def tracker_storage(self) -> Storage:
        """The storage of the run, before it is opened on all ranks, too."""
        if self._lifecycle is not None:
            return self._lifecycle.checkpointer.storage
        return Storage(self.run_url, env.storage_options(self._options["storage_options"]))

    def why_apart(self) -> str | None:
        """Why this attempt does not go on in the tracker run of the one before, if so."""
        conversion = self._restored[1] if self._restored else None
        if conversion is not None and conversion.is_renumbered:
            return "a step has a different size now"
        return "the run starts over" if self._options["fresh"] else None

    def seconds_left(self) -> float:
        """Until the machine ends, if a notice says so; else as long as `HF_CLOUDTRAIN_GRACE`."""
        return env.grace(None) if self.preemption is None else self.preemption.seconds_left()

    def open(self, args: TrainingArguments) -> AttemptLifecycle:
        """The lifecycle for the output folder, once the process group exists: TrainingArguments creates it."""
        _ = args.device  # creates the process group
        check_all_processes_train_together(args)
        output_dir = Path(str(args.output_dir)).absolute()
        if self._lifecycle is None or self._lifecycle.checkpointer.output_dir != output_dir:
            self._lifecycle = AttemptLifecycle.of(self.run_url, output_dir, **self._options)
        self._lifecycle.checkpointer.policy = self._policy
        self._lifecycle.has_page = self.has_page
        self._lifecycle.tracker_pages = self.tracker_pages
        self._lifecycle.tracker_files = self.tracker_files
        return self._lifecycle

    def restore(self, args: TrainingArguments) -> Path | None:
        """Put the newest whole checkpoint into the output folder, as Trainer needs it; None on the first start."""
        lifecycle = self.open(args)
        ranks = lifecycle.checkpointer.ranks
        self._forget_nothing(args)
        find_reports(self, args)
        found = lifecycle.restore(_needed_by(ranks.neighbours), lambda manifest: self._plan(args, manifest))
        self._restored = self._complete = None
        if found is None:
            return None
        restored, conversion = found
        self._restored = restored.manifest, conversion
        self._complete = CompleteRun.find(lifecycle, args, restored, conversion)
        adjust: Callable[[Record], Record] = lambda record: record  # noqa: E731
        if conversion is not None:
            adjust = lambda record: topology.convert_state(record, conversion, args)  # noqa: E731
            topology.repair(restored, conversion, args, ranks)
        if self._complete is not None:
            adjust = self._complete.behind_all(adjust)
        RestoredState(lifecycle, restored, conversion).localize(
            load_best=args.load_best_model_at_end, adjust=adjust
        )
        return restored.path

    def _plan(self, args: TrainingArguments, manifest: Manifest) -> Conversion | None:
        conversion = topology.plan(args, manifest)
        self.identity.check(manifest, args, same_steps=conversion is None)
        return conversion

    def check_resumed(
        self, args: TrainingArguments, state: TrainerState, epoch: EpochLength, live: dict[str, Any]
    ) -> None:
        """Compare the position that was restored with the live data, and move the live schedule to it.

        Args:
            live: what Trainer passes to callbacks.

        Raises:
            RunCompleteError: nothing is left to train, and Trainer would train on.
        """
        self._settle(state)
        self._check_position(args, state, epoch, live)
        if self._complete is None:
            check_not_complete(self.checkpointer.storage.url, state, epoch, args.gradient_accumulation_steps)

    def _check_position(
        self, args: TrainingArguments, state: TrainerState, epoch: EpochLength, live: dict[str, Any]
    ) -> None:
        manifest, conversion = self._restored or (None, None)
        if manifest is None or state.global_step != (conversion or manifest.position).global_step:
            # Resumed from a path that the user chose, if at all.
            found = self.checkpointer.restorer.saved_at(state.global_step) if state.global_step else None
            if found is not None:
                topology.check_converted(found, args)
            return
        topology.check(manifest, args, state, epoch)
        if conversion is not None:
            topology.move_schedule(conversion, state, live)

    def begin(
        self, args: TrainingArguments, state: TrainerState, *, uploads: bool = False
    ) -> AttemptLifecycle:
        """Start an attempt, for the first callback that calls it. Each TrainerState is one start: `auto_find_batch_size` creates a new one.

        Args:
            uploads: whether the callback uploads checkpoints.
        """
        self._uploads |= uploads
        if uploads and self._forgotten is not None:
            self._forgotten.close()
            self._forgotten = None
        lifecycle = self.open(args)
        if self._begun is not state:
            self._settle(state)
            if self.listens:
                check_no_jit_checkpoint(args)
            interrupted = self._begun is not None and not self._ended and not lifecycle.is_leaving
            lifecycle.begin(
                state.global_step,
                total=state.max_steps,
                samples=step_samples(args, state),
                saves=_saves(args, state, self.clock),
                started_over=interrupted and args.auto_find_batch_size,
                check_notices=self.listens,
                tracks=self.tracks,
                interrupted="failed",
            )
            self._begun, self._ended = state, False
            self._began = args, state.global_step
            self.last_save = None
        return lifecycle

    def leave(self, last_save: LastSave) -> None:
        """Note that the training is cut short by an emergency save."""
        self.last_save, self.lifecycle.is_leaving = last_save, True

    def end(self) -> None:
        """Wait for the uploads, once, and record the end; not where the emergency callback does."""
        if not self._ended and not self.is_leaving:
            self._ended = True
            early = self._ended_early()
            if early is None:
                self.lifecycle.finish(uploads=self._uploads)
            elif self.checkpointer.last_saved is None and self._restored is None:
                self.lifecycle.finish(uploads=False, then=self.checkpointer.finish_uploads)
            else:
                self.lifecycle.finish(
                    uploads=self._uploads, then=lambda: record_completion(self.lifecycle, *early)
                )

    def _forget_nothing(self, args: TrainingArguments) -> None:
        if self._forgotten is not None:
            self._forgotten.close()
        self._forgotten = ForgottenCallback(self.run_url, args)

    def correct(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """Correct what Trainer logs at the end of a complete run."""
        if self._complete is not None:
            self._complete.correct(state, logs)

    def _settle(self, state: TrainerState) -> None:
        if self._complete is not None:
            self._complete.settle(self.lifecycle, state)

    def _ended_early(self) -> tuple[TrainingArguments, TrainerState] | None:
        """Arguments and state of a training that a callback ended before its last step; None for any other end. Warns of steps in no checkpoint."""
        lifecycle, state = self.lifecycle, self._begun
        if state is None or self._began is None or not self._uploads:
            return None
        args, first = self._began
        if not first < state.global_step < state.max_steps or lifecycle.has_notice():
            return None
        checkpointer = lifecycle.checkpointer
        saved = checkpointer.last_saved
        if checkpointer.ranks.is_main and (saved is None or saved.step < state.global_step):
            logger.warning(
                "A callback ended training at step %d of %d, and the steps after %s are in no checkpoint. To keep its model, call "
                "trainer.save_model(folder) and cloud.save(folder, name='final').",
                state.global_step,
                state.max_steps,
                "its start" if saved is None else f"step {saved.step}",
            )
        return args, state


def _saves(args: TrainingArguments, state: TrainerState, clock: SaveClock | None) -> str:
    at: dict[str, str] = {
        SaveStrategy.STEPS: f"every {state.save_steps} steps",
        SaveStrategy.EPOCH: "at the end of each epoch",
        SaveStrategy.BEST: "at the best evaluations",
    }
    parts = [at.get(args.save_strategy, ""), str(clock or "")]
    return f"saves {' and '.join(part for part in parts if part)}"


def _needed_by(ranks: list[int]) -> Any:
    """Everything but the random states of ranks on other disks."""

    def wanted(path: str) -> bool:
        match = re.fullmatch(r"rng_state_(\d+)\.pth", path)
        return match is None or int(match[1]) in ranks

    return wanted
