"""What the callbacks of one run in one process share: one Checkpointer, one attempt, one end."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, RunCompleteError
from hf_cloudtrain.preemption.preemption import check_no_pending_notice
from hf_cloudtrain.storage.urls import shown_url
from hf_cloudtrain.tracking.exit_record import Outcome, forget_end, outcome_of, record_end

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

    from hf_cloudtrain.checkpoints.manifest import Manifest
    from hf_cloudtrain.integrations.trainer.state import EpochLength
    from hf_cloudtrain.resume.topology import Conversion

logger = logging.getLogger(__name__)


class Session:
    """The session of one run in this process; `of` finds it.

    Example:
        >>> Session.of("s3://bucket/runs/mrpc", None, fresh=False).open(args).restore()
    """

    _open: ClassVar[weakref.WeakValueDictionary[tuple[str, int], Session]] = weakref.WeakValueDictionary()

    def __init__(self, run_url: str, storage_options: dict[str, Any] | None, *, fresh: bool) -> None:
        self.uploads = False
        """Whether a callback of this session uploads checkpoints."""
        self.restored: tuple[Manifest, Conversion | None] | None = None
        """What `restore` put here for Trainer, and how its place is converted to steps of today."""
        self.policy = Policy()
        """What stays on storage."""
        self.listens = False
        """Whether a callback of this session listens for notices."""
        self.stops_here = False
        """Whether the save at this step is the last thing that the training does."""
        self.is_leaving = False
        """Whether the training was cut short, so that whoever cut it waits for the uploads within the time there is."""
        self.inexact_reason: str | None = None
        """Why a resume from that save cannot equal an uninterrupted run, if so."""
        self.close_tracker: Callable[[Outcome], None] = _no_tracker
        self._run_url = run_url
        self._storage_options = storage_options
        self._fresh = fresh
        self._checkpointer: Checkpointer | None = None
        self._begun: TrainerState | None = None
        self._attempt = 0
        self._ended = False

    @classmethod
    def of(cls, run_url: str | None, storage_options: dict[str, Any] | None, *, fresh: bool) -> Session:
        """The session of a run in this process: callbacks that name one URL are one attempt."""
        url = env.run_url(run_url)
        key = (shown_url(url), os.getpid())
        session = cls._open.get(key)
        if session is None or session._ended or session._fresh != fresh:
            session = cls(url, storage_options, fresh=fresh)
            cls._open[key] = session
        return session

    def open(self, args: TrainingArguments) -> Checkpointer:
        """The Checkpointer, made when the process group exists: TrainingArguments makes it."""
        _ = args.device  # makes the process group
        if self._checkpointer is None:
            forget_end()
        if args.world_size < int(os.environ.get("WORLD_SIZE", "1")):
            raise ConfigurationError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but each process would train alone, as rank 0. On a machine "
                "without an accelerator pass use_cpu=True."
            )
        output_dir = Path(str(args.output_dir)).absolute()
        made = self._checkpointer
        if made is None or made.output_dir != output_dir:
            if made is not None:
                made.finish_uploads()
            made = Checkpointer(
                self._run_url, output_dir, storage_options=self._storage_options, fresh=self._fresh
            )
            self._checkpointer = made
        made.policy = self.policy
        return made

    def check_not_complete(self, state: TrainerState, epoch: EpochLength, accumulation: int) -> None:
        """Trainer looks for the end of training only after a step, so a complete run would get one step more."""
        if state.global_step < state.max_steps:
            return
        if epoch.is_whole(state.global_step, accumulation):
            logger.warning(
                "The run is complete: step %d of %d. Nothing is trained.", state.global_step, state.max_steps
            )
            return
        raise RunCompleteError(
            f"The run {self.opened().storage.url!r} is complete: step {state.global_step} of {state.max_steps}. Trainer "
            "would train on from the middle of the epoch. Use the restored checkpoint as it is, or raise max_steps."
        )

    def opened(self) -> Checkpointer:
        """The Checkpointer that `open` made."""
        if self._checkpointer is None:
            raise ConfigurationError(
                "Nothing was trained or restored yet: call restore(args) or trainer.train() first."
            )
        return self._checkpointer

    def begin(self, args: TrainingArguments, state: TrainerState) -> int:
        """The attempt's number. Each TrainerState is one start: `auto_find_batch_size` makes a new one."""
        if self._begun is not state:
            checkpointer = self.open(args)
            if self.listens:
                check_no_jit_checkpoint(args)
                check_no_pending_notice(checkpointer)
            interrupted = self._begun is not None and not self._ended and not self.is_leaving
            started_over = interrupted and args.auto_find_batch_size
            self._attempt = checkpointer.begin(state.global_step, started_over=started_over).number
            self._begun = state
            self._ended = self.stops_here = self.is_leaving = False
            self.inexact_reason = None
        return self._attempt

    def end(self) -> None:
        """Wait for the uploads, once. Where steps alone are tracked there are none."""
        if self._ended or self.is_leaving:
            return
        self._ended = True
        checkpointer = self.opened()
        try:
            if self.uploads:
                checkpointer.finish()
        except CloudTrainError as error:
            record_end(checkpointer, outcome_of(error), str(error))
            raise
        record_end(checkpointer, "finished")


def check_no_jit_checkpoint(args: TrainingArguments) -> None:
    """Stop a training in which the framework would save on SIGTERM, too."""
    if getattr(args, "enable_jit_checkpoint", False):
        raise ConfigurationError(
            "enable_jit_checkpoint=True saves on SIGTERM by itself, on each rank at another step, and would write into the "
            "emergency save. Leave it out: CloudTrainCallback saves on SIGTERM."
        )


def _no_tracker(outcome: Outcome) -> None:
    """Nobody tracks steps here."""
