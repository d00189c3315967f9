"""The emergency save of a Trainer: save where all ranks agree, by Trainer's own save, and leave.

on_step_end     some rank has a notice: save here and stop; where an evaluation is due, after it
on_evaluate     the notice came during an evaluation: save right after it
on_epoch_end    prevent a second save: after every stop, Trainer ends the epoch, evaluates and saves once more
on_train_end    wait for the upload as long as there is time, and end all ranks together
"""

from __future__ import annotations

import os
import sys
import time
from types import CodeType
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_cloudtrain.integrations.trainer.position import epoch_ends
from hf_cloudtrain.integrations.trainer.session import LastSave, Session
from hf_cloudtrain.preemption.preemption import Preemption
from hf_cloudtrain.preemption.save_clock import SaveClock
from hf_cloudtrain.runtime.tracebacks import short_traceback


class EmergencySaveCallback(TrainerCallback):
    """Saves and leaves when the machine is preempted: on SIGTERM, SIGUSR1, SIGUSR2, SIGHUP, Ctrl-C or a notice of the cloud.

    `run_url`, `storage_options` and `fresh` are those of `CloudTrainCallback`.

    Args:
        grace_seconds: time that this machine has after a notice that names none; None takes `HF_CLOUDTRAIN_GRACE`, else
            30. Under torchrun a signal never gives more than its `--shutdown-timeout`.
        save_interval_seconds: save when this time has passed since the last save, beside what `TrainingArguments` ask for.
        save_overhead: save as often as saves take this share of the time, such as 0.02.

    Raises:
        PreemptedExit: from `trainer.train()`, after the save: nothing after the training runs. It is a SystemExit with
            the code 75; in a notebook it is a PreemptedError.

    Example:
        >>> Trainer(model=model, args=args, callbacks=[CheckpointUploadCallback(url), EmergencySaveCallback(url)])
    """

    @short_traceback
    def __init__(
        self,
        run_url: str | os.PathLike[str] | None = None,
        *,
        storage_options: dict[str, Any] | None = None,
        fresh: bool = False,
        grace_seconds: float | None = None,
        save_interval_seconds: float | None = None,
        save_overhead: float | None = None,
    ) -> None:
        self._session = Session.of(run_url, storage_options, fresh=fresh, listens=True)
        self._session.clock = SaveClock.of(save_interval_seconds, save_overhead)
        self._grace_seconds = grace_seconds
        self._first_step = 0
        self._saves_at_epoch_end = False
        self._saved_step: int | None = None
        self._saves_since: float | None = None
        """When the save began that has just ended."""
        self._busy_since = 0.0
        """When Trainer began to evaluate or save."""
        self._evaluation_seconds: float | None = None

    @short_traceback
    def on_train_begin(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Install the signal handlers, and watch for other notices."""
        lifecycle = self._session.begin(args, state)
        self._saves_at_epoch_end = False
        self._first_step, self._saved_step = state.global_step, None
        lifecycle.listen(grace=self._grace_seconds, within=_code_of_trainer(), clock=self._session.clock)

    def on_step_begin(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Note for how long the last save has held up training."""
        if self._saves_since is not None:
            self._session.lifecycle.saved(time.monotonic() - self._saves_since)
            self._saves_since = None

    @short_traceback
    def on_step_end(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Save and stop, if any rank has a notice."""
        preemption = self._session.preemption
        if preemption is None:
            return
        if self._session.lifecycle.must_stop() and not _is_over(state, control):
            preemption.announce(state.global_step)
            self._stop(args, state, control, preemption)
        if self._session.lifecycle.save_is_due or self._is_last_of_saves_by_time(args, state, control):
            control.should_save = True
        if control.should_save or control.should_evaluate:
            self._busy_since = time.monotonic()

    @short_traceback
    def on_evaluate(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Save right after an evaluation during which a notice came."""
        preemption = self._session.preemption
        if preemption is None or state.global_step == self._first_step or self._session.is_leaving:
            return
        now = time.monotonic()
        self._evaluation_seconds, self._busy_since = now - self._busy_since, now
        # With save_strategy='best' Trainer alone decides what is saved after an evaluation; then at the next step.
        may_save = not _is_over(state, control) and args.save_strategy != SaveStrategy.BEST
        if self._session.lifecycle.must_stop(now=True) and may_save:
            preemption.announce(state.global_step)
            self._save_and_stop(control)
        elif self._session.lifecycle.save_is_due and may_save:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Note that it is saved, and how long that took."""
        self._saved_step, self._saves_since = state.global_step, self._busy_since
        if self._session.preemption is not None:
            self._session.preemption.save_seconds = time.monotonic() - self._busy_since

    def on_epoch_end(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Nothing more after the emergency save: Trainer would evaluate, and save the same step into the same files."""
        if self._session.is_leaving and self._saved_step == state.global_step:
            control.should_save = control.should_evaluate = control.should_log = False
            state.best_model_checkpoint = None  # or it would be loaded now, in the time that the upload needs
        elif self._saves_at_epoch_end:
            control.should_save = True
        if control.should_save or control.should_evaluate:
            self._busy_since = time.monotonic()

    @short_traceback
    def on_train_end(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Leave, after an emergency save; else wait for the uploads."""
        if self._session.is_leaving:
            self._session.lifecycle.leave(state.global_step)
        self._session.end()

    def _is_last_of_saves_by_time(self, args: TrainingArguments, state: State, control: Control) -> bool:
        """Whether the end of training must be saved: with save_strategy='no', Trainer does not do it."""
        return (
            self._session.clock is not None
            and args.save_strategy == SaveStrategy.NO
            and _is_over(state, control)
        )

    def _stop(self, args: TrainingArguments, state: State, control: Control, preemption: Preemption) -> None:
        """Save at this step: after the evaluation that is due, if there is time for it, else without."""
        at_epoch_end = args.eval_strategy == IntervalStrategy.EPOCH and epoch_ends(state, control)
        if not control.should_evaluate and not at_epoch_end:
            self._save_and_stop(control)
        elif not self._has_time_to_evaluate(preemption):
            control.should_evaluate = False
            self._save_and_stop(control, "the evaluation at this step was skipped for lack of time")
        elif args.save_strategy == SaveStrategy.BEST:
            return  # after an evaluation Trainer saves only what is best; so the save comes at the next step
        elif control.should_evaluate:
            self._save_and_stop(control)  # Trainer evaluates first
        else:
            self._saves_at_epoch_end = control.should_training_stop = True
            self._session.leave(LastSave(is_here=False))

    def _save_and_stop(self, control: Control, inexact_reason: str | None = None) -> None:
        self._session.leave(LastSave(is_here=True, inexact_reason=inexact_reason))
        control.should_save = control.should_training_stop = True

    def _has_time_to_evaluate(self, preemption: Preemption) -> bool:
        def has_time() -> bool:
            if self._evaluation_seconds is None or preemption.save_seconds is None:
                return False
            return self._evaluation_seconds + preemption.save_seconds < preemption.seconds_left()

        return self._session.checkpointer.ranks.agree(has_time, "look at the time")


def _is_over(state: State, control: Control) -> bool:
    """Whether the training ends at this step anyway, so that the script does not continue with a half-trained model."""
    return bool(state.global_step >= state.max_steps or control.should_training_stop)


def _code_of_trainer() -> CodeType | None:
    """The code of the outermost function of transformers that is running: `Trainer.train`."""
    frame, found = sys._getframe(), None
    while frame.f_back is not None:
        frame = frame.f_back
        if str(frame.f_globals.get("__name__", "")).startswith("transformers."):
            found = frame.f_code
    return found
