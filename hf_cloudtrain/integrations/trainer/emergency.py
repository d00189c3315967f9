"""The emergency save of a Trainer: save where all ranks agree, by Trainer's own save, and leave.

on_step_end     a notice has come, to any rank: save here and stop; where an evaluation is due, after it
on_evaluate     the notice came during an evaluation: save right after it
on_epoch_end    Trainer comes here after every stop, and would evaluate and save once more
on_train_end    wait for the upload as long as there is time, and end all ranks together
"""

from __future__ import annotations

import sys
import time
from types import CodeType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_cloudtrain.integrations.trainer.session import Session
from hf_cloudtrain.integrations.trainer.state import epoch_ends
from hf_cloudtrain.preemption.agreement import StopDecision
from hf_cloudtrain.preemption.preemption import Preemption


class EmergencySaveCallback(TrainerCallback):
    """Saves and leaves when the machine is about to go: on SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C or a notice of the cloud.

    Args:
        run_url: any fsspec URL or a folder that names the run; None takes `HF_CLOUDTRAIN_RUN_URL`.
        storage_options: for fsspec; None takes `HF_CLOUDTRAIN_STORAGE_OPTIONS`.
        fresh: as for `CloudTrainCallback`.
        grace_seconds: time that this machine has after a notice that names none; None takes `HF_CLOUDTRAIN_GRACE`, else
            30. Under torchrun a signal never gives more than its `--shutdown-timeout`.

    Raises:
        PreemptedExit: from `trainer.train()`, after the save: nothing after the training runs. It is a SystemExit with
            the code 75; in a notebook it is a PreemptedError.

    Example:
        >>> Trainer(model=model, args=args, callbacks=[CheckpointUploadCallback(url), EmergencySaveCallback(url)])
    """

    def __init__(
        self,
        run_url: str | None = None,
        *,
        storage_options: dict[str, Any] | None = None,
        fresh: bool = False,
        grace_seconds: float | None = None,
    ) -> None:
        self._session = Session.of(run_url, storage_options, fresh=fresh)
        self._session.listens = True
        self._grace_seconds = grace_seconds
        self._preemption: Preemption | None = None
        self._first_step = 0
        self._stopping = False
        """Whether the save, wherever it comes, is the last thing that happens."""
        self._saves_at_epoch_end = False
        self._saved_step: int | None = None
        self._busy_since = 0.0
        """When Trainer began to evaluate or save."""
        self._evaluation_seconds: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to listen."""
        self._session.begin(args, state)
        checkpointer = self._session.opened()
        if self._preemption is not None:
            self._preemption.close()  # a training before this one has failed
        self._stopping = self._saves_at_epoch_end = False
        self._first_step, self._saved_step = state.global_step, None
        self._preemption = Preemption(
            checkpointer,
            grace=self._grace_seconds,
            within=_code_of_trainer(),
        )
        self._preemption.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop, if any rank was told to."""
        if self._preemption is None:
            return
        order = self._preemption.step_ended()
        if order is StopDecision.QUIT:
            self._quit()
        if order is StopDecision.SAVE and not _is_over(state, control):
            self._stop(args, state, control)
        if control.should_save or control.should_evaluate:
            self._busy_since = time.monotonic()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save right after an evaluation during which the notice came."""
        if self._preemption is None or state.global_step == self._first_step or self._stopping:
            return
        now = time.monotonic()
        self._evaluation_seconds, self._busy_since = now - self._busy_since, now
        order = self._preemption.decide_now()
        if order is StopDecision.QUIT:
            self._quit()
        # With save_strategy='best' Trainer alone decides what is saved after an evaluation; then at the next step.
        if (
            order is StopDecision.SAVE
            and not _is_over(state, control)
            and args.save_strategy != SaveStrategy.BEST
        ):
            self._preemption.announce(state.global_step)
            self._save_and_stop(control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that it is saved, and how long that took."""
        self._saved_step = state.global_step
        if self._preemption is not None:
            self._preemption.save_seconds = time.monotonic() - self._busy_since

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing more after the emergency save: Trainer would evaluate, and save the same step into the same files."""
        if self._stopping and self._saved_step == state.global_step:
            control.should_save = control.should_evaluate = control.should_log = False
            state.best_model_checkpoint = None  # or it would be loaded now, at the cost of the upload's time
        elif self._saves_at_epoch_end:
            control.should_save = True
        if control.should_save or control.should_evaluate:
            self._busy_since = time.monotonic()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave, after an emergency save; a training that is over ends as ever."""
        preemption, self._preemption = self._preemption, None
        if preemption is None:
            return
        if self._stopping:
            preemption.leave(state.global_step, self._session.close_tracker)
        try:
            self._session.end()  # still listening: a signal must not cut off the last upload
        finally:
            preemption.close()

    def _stop(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Save at this step: after the evaluation that is due, if there is time for it, else without."""
        assert self._preemption is not None
        self._preemption.announce(state.global_step)
        at_epoch_end = args.eval_strategy == IntervalStrategy.EPOCH and epoch_ends(state, control)
        if not control.should_evaluate and not at_epoch_end:
            self._save_and_stop(control)
        elif not self._has_time_to_evaluate():
            control.should_evaluate = False
            self._session.inexact_reason = "the evaluation at this step was left out, for lack of time"
            self._save_and_stop(control)
        elif args.save_strategy == SaveStrategy.BEST:
            return  # Trainer saves after an evaluation what is best, and nothing else: at the next step then
        elif control.should_evaluate:
            self._save_and_stop(control)  # Trainer evaluates first
        else:
            self._saves_at_epoch_end = self._stopping = self._session.is_leaving = True
            control.should_training_stop = True

    def _save_and_stop(self, control: TrainerControl) -> None:
        self._stopping = self._session.stops_here = self._session.is_leaving = True
        control.should_save = control.should_training_stop = True

    def _has_time_to_evaluate(self) -> bool:
        preemption = self._preemption
        assert preemption is not None

        def has_time() -> bool:
            if self._evaluation_seconds is None or preemption.save_seconds is None:
                return False
            return self._evaluation_seconds + preemption.save_seconds < preemption.seconds_left()

        return self._session.opened().ranks.agree(has_time, "look at the time")

    def _quit(self) -> None:
        preemption, self._preemption = self._preemption, None
        assert preemption is not None
        self._session.is_leaving = True
        preemption.quit(self._session.close_tracker)


def _is_over(state: TrainerState, control: TrainerControl) -> bool:
    """Whether the training ends here by itself, so that what follows is not half-trained."""
    return bool(state.global_step >= state.max_steps or control.should_training_stop)


def _code_of_trainer() -> CodeType | None:
    """The code of the outermost function of transformers that is running: `Trainer.train`."""
    frame, found = sys._getframe(), None
    while frame.f_back is not None:
        frame = frame.f_back
        if str(frame.f_globals.get("__name__", "")).startswith("transformers."):
            found = frame.f_code
    return found
