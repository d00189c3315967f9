"""Callbacks for the Hugging Face Trainer, which is neither subclassed nor patched. The save path begins here, at `on_save`.

    on_train_begin   take an attempt, start the uploads and the heartbeat
    on_step_end      hold a save back that would come before the epoch's evaluation
    on_save          freeze the folder that was just written; the upload is in the background
    on_train_end     wait until it is committed, on all ranks, or fail on all ranks

None of them is an ExportableState: Trainer would create them again on resume, and the threads of the old ones would stay.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.integrations.trainer import checks
from hf_cloudtrain.integrations.trainer.evidence import EvidenceCallback
from hf_cloudtrain.integrations.trainer.position import (
    EpochLength,
    epoch_ends,
    metrics,
    position,
)
from hf_cloudtrain.integrations.trainer.session import Session
from hf_cloudtrain.integrations.trainer.staged_saves import TrainerSaves, is_over
from hf_cloudtrain.runtime.tracebacks import short_traceback

if TYPE_CHECKING:
    from transformers import TrainerControl as Control
    from transformers import TrainerState as State
    from transformers import TrainingArguments


class CheckpointUploadCallback(EvidenceCallback):
    """Uploads every checkpoint in the background and restores the newest. Arguments as `CloudTrainCallback`."""

    @short_traceback
    def __init__(
        self,
        run_url: str | os.PathLike[str] | None = None,
        *,
        storage_options: dict[str, Any] | None = None,
        fresh: bool = False,
        save_total_limit: int | None = None,
        keep_every_n_steps: int | None = None,
        async_save: bool | None = None,
    ) -> None:
        policy = Policy(save_total_limit, keep_every_n_steps)
        self._async_save = async_save
        self._staged: TrainerSaves | None = None
        self._session = Session.of(run_url, storage_options, fresh=fresh, policy=policy)
        self._held_back = False
        self._before_evaluation = False
        self._save_began_ns = 0
        self._epoch = EpochLength()

    @short_traceback
    def restore(self, args: TrainingArguments) -> str | None:
        """Restore the newest whole checkpoint of the run into `args.output_dir`. Call it on all ranks.

        Returns:
            The folder for `trainer.train(resume_from_checkpoint=…)`; None on the first start.

        Raises:
            PositionError: its position cannot be converted to the new number of processes, batch size or accumulation.
            CorruptCheckpointError: all checkpoints are damaged.
            StorageError: the storage does not answer, or the disk is full.

        Example:
            >>> trainer.train(resume_from_checkpoint=cloud.restore(args))
        """
        checks.check_saves(args, by_time=self._session.clock is not None)
        folder = self._session.restore(args)
        return None if folder is None else str(folder)

    @short_traceback
    def wait(self, timeout: float | None = None) -> None:
        """Return, on all ranks together, when everything that was saved is committed; the end of training does it by itself.

        Args:
            timeout: seconds; None takes `HF_CLOUDTRAIN_DRAIN_TIMEOUT`.

        Raises:
            NotCommittedError: what is not committed, and how to finish it.
            OvertakenError: a newer attempt of the run has begun, and only that one may write.
        """
        self._session.checkpointer.wait(timeout)

    @short_traceback
    def save(self, folder: str | os.PathLike[str], name: str) -> str:
        """Commit any folder of rank 0, such as a final model, under `name`; returns its URL. Call it on all ranks.

        Example:
            >>> trainer.save_model("final-model")
            >>> cloud.save("final-model", name="final")
            's3://bucket/runs/mrpc/final'
        """
        return self._session.checkpointer.save_folder(os.fspath(folder), name)

    @short_traceback
    def on_train_begin(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Take an attempt; refuse what cannot work before the first step."""
        checks.check_saves(args, by_time=self._session.clock is not None)
        checks.check_not_hyperparameter_search(state)
        self._epoch = EpochLength(kwargs.get("train_dataloader"))
        self._session.open(args)
        self._session.check_resumed(args, state, self._epoch, kwargs)
        self._session.begin(args, state, uploads=True)
        self._held_back = self._before_evaluation = False
        self.gather(args, state, kwargs)
        if self._staged is not None:
            self._staged.end()
        self._staged = TrainerSaves.of(self._session.checkpointer, args, self._async_save)
        self._mark_save_begin()

    def on_step_begin(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Nothing is saved now."""
        if self._staged is not None:
            self._staged.write_rest()
        super().on_step_begin(args, state, control, **kwargs)

    @short_traceback
    def on_step_end(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Hold a save back that would come before the epoch's evaluation, and note when a save begins."""
        super().on_step_end(args, state, control, **kwargs)
        at_epoch_end = args.eval_strategy == IntervalStrategy.EPOCH and epoch_ends(state, control)
        last = self._session.last_save
        self._before_evaluation = at_epoch_end and not (last and last.is_here)
        if control.should_save:
            if self._before_evaluation:
                # Resume skips the evaluation and the random numbers it draws; saved after it, resume is exact.
                control.should_save = False
                self._held_back = True
            else:
                self._save_may_begin(state, control)
        elif control.should_evaluate and args.save_strategy == SaveStrategy.BEST:
            self._save_may_begin(state, control)  # Trainer decides after the evaluation, without an event

    @short_traceback
    def on_epoch_end(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Let the save that was held back happen: Trainer evaluates first, then saves."""
        self._before_evaluation = False
        if self._held_back:
            self._held_back = False
            control.should_save = True
        if self._staged is not None and is_over(state, control):
            self._staged.settle()
        if control.should_save or control.should_evaluate:
            self._save_may_begin(state, control)

    @short_traceback
    def on_evaluate(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Note when a save begins that was asked for during the evaluation."""
        super().on_evaluate(args, state, control, **kwargs)
        if control.should_save and self._save_began_ns:  # not in an evaluation outside of training
            self._save_may_begin(state, control)

    @short_traceback
    def on_save(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Freeze the folder that was just written."""
        assert self._evidence is not None, "a save comes after the begin of a training"
        checkpointer = self._evidence.checkpointer
        if self._staged is not None:
            self._staged.close()
        if not self._session.listens:
            checkpointer.check_not_overtaken()  # else the ranks learn of it at the end of a step
        last = self._session.last_save
        reason = last.inexact_reason if last else None
        if self._before_evaluation:
            reason = (
                reason or "it was saved before the evaluation at the end of the epoch, which a resume skips"
            )
        if control.should_epoch_stop and not control.should_training_stop:
            is_whole = self._epoch.is_whole(state.global_step, args.gradient_accumulation_steps)
            reason = reason or (
                None if is_whole else "a callback ends this epoch early, and a resume continues it"
            )
        names = {} if self._staged is None else self._staged.tensor_names()
        best = state.best_global_step == state.global_step and state.best_metric is not None
        checkpointer.save(
            checkpointer.output_dir / f"checkpoint-{state.global_step}",
            position(args, state, self._epoch, kwargs.get("lr_scheduler")),
            since_ns=self._save_began_ns,
            exactness=self._evidence.at_save(state, reason, names),
            metrics=metrics(state, best=best),
            best=best,
            all_written=True,  # as the ranks know when they have agreed whether a resume is exact
        )
        if self._staged is not None and is_over(state, control):
            self._staged.settle()  # an evaluation has ended the training, and the best model is loaded next

    @short_traceback
    def on_train_end(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Wait for the uploads: training ends when its last checkpoint is safe, or fails."""
        super().on_train_end(args, state, control, **kwargs)
        self._session.end()
        if self._staged is not None:
            self._staged.end()

    def _save_may_begin(self, state: State, control: Control) -> None:
        self._mark_save_begin()
        if self._staged is not None:
            self._staged.save_begins(state, control)

    def _mark_save_begin(self) -> None:
        """The time of the file system, so that its clock and ours need not agree."""
        checkpointer = self._session.checkpointer
        if checkpointer.ranks.is_leader:
            self._save_began_ns = checkpointer.local.mark_save_begin()
