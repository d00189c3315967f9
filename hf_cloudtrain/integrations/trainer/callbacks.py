"""Callbacks for the Hugging Face Trainer. Trainer is neither subclassed nor patched.

    on_train_begin   take an attempt, start the uploads and the heartbeat
    on_step_end      hold a save back that would come before the epoch's evaluation
    on_save          freeze the folder that was just written; the upload is in the background
    on_train_end     wait until it is committed, on all ranks, or fail on all ranks

None of them is an ExportableState: Trainer would make them anew on resume, and their threads with them.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations.trainer import topology
from hf_cloudtrain.integrations.trainer.emergency import EmergencySaveCallback
from hf_cloudtrain.integrations.trainer.session import Session
from hf_cloudtrain.integrations.trainer.state import (
    EpochLength,
    epoch_ends,
    localize_state,
    metrics,
    number_here,
    position,
)
from hf_cloudtrain.integrations.trainer.step_callback import StepTrackerCallback
from hf_cloudtrain.resume.topology import Conversion
from hf_cloudtrain.runtime.tracebacks import short_traceback

logger = logging.getLogger(__name__)


def _to_parts(event: str) -> Any:
    def forward(
        self: CloudTrainCallback,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # What begins first ends last: an emergency decides before others look at what Trainer is about to do.
        for part in self._parts if event == "on_train_begin" else reversed(self._parts):
            getattr(part, event)(args, state, control, **kwargs)

    return forward


class CloudTrainCallback(TrainerCallback):
    """Everything in one line: steps tracked, checkpoints uploaded, saves on SIGTERM, and `restore` for the next machine.

    Args:
        run_url: any fsspec URL or a folder that names the run; None takes `HF_CLOUDTRAIN_RUN_URL`.
        storage_options: for fsspec; None takes `HF_CLOUDTRAIN_STORAGE_OPTIONS`.
        fresh: start at step 0 although the run has checkpoints. They stay, and rank below those of this attempt.
        grace_seconds: see `EmergencySaveCallback`.
        save_total_limit: how many checkpoints stay on storage, the newest ones of the run; None keeps all. Beside them the
            best, the pinned, and the one that was resumed from stay. `TrainingArguments.save_total_limit` is about this disk.
        keep_every_n_steps: checkpoints of steps that are a multiple of this stay too.

    Raises:
        ConfigurationError: no run URL, or a configuration that would never save.

    Example:
        >>> cloud = CloudTrainCallback("s3://bucket/runs/mrpc")
        >>> trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=[cloud])
        >>> trainer.train(resume_from_checkpoint=cloud.restore(args))
    """

    @short_traceback
    def __init__(
        self,
        run_url: str | None = None,
        *,
        storage_options: dict[str, Any] | None = None,
        fresh: bool = False,
        grace_seconds: float | None = None,
        save_total_limit: int | None = None,
        keep_every_n_steps: int | None = None,
    ) -> None:
        self._uploads = CheckpointUploadCallback(
            run_url,
            storage_options=storage_options,
            fresh=fresh,
            save_total_limit=save_total_limit,
            keep_every_n_steps=keep_every_n_steps,
        )
        self._steps = StepTrackerCallback(run_url, storage_options=storage_options, fresh=fresh)
        self._emergency = EmergencySaveCallback(
            run_url, storage_options=storage_options, fresh=fresh, grace_seconds=grace_seconds
        )
        self._parts: tuple[TrainerCallback, ...] = (self._uploads, self._steps, self._emergency)

    @short_traceback
    def restore(self, args: TrainingArguments) -> str | None:
        """See `CheckpointUploadCallback.restore`."""
        return self._uploads.restore(args)

    @short_traceback
    def wait(self, timeout: float | None = None) -> None:
        """See `CheckpointUploadCallback.wait`."""
        self._uploads.wait(timeout)

    @short_traceback
    def save(self, folder: str | os.PathLike[str], name: str) -> str:
        """See `CheckpointUploadCallback.save`."""
        return self._uploads.save(folder, name)

    on_train_begin = _to_parts("on_train_begin")
    on_step_begin = _to_parts("on_step_begin")
    on_step_end = _to_parts("on_step_end")
    on_epoch_end = _to_parts("on_epoch_end")
    on_evaluate = _to_parts("on_evaluate")
    on_log = _to_parts("on_log")
    on_save = _to_parts("on_save")
    on_train_end = _to_parts("on_train_end")


class CheckpointUploadCallback(TrainerCallback):
    """Uploads every checkpoint in the background and restores the newest. Arguments as `CloudTrainCallback`."""

    @short_traceback
    def __init__(
        self,
        run_url: str | None = None,
        *,
        storage_options: dict[str, Any] | None = None,
        fresh: bool = False,
        save_total_limit: int | None = None,
        keep_every_n_steps: int | None = None,
    ) -> None:
        policy = Policy(save_total_limit, keep_every_n_steps)
        self._session = Session.of(run_url, storage_options, fresh=fresh)
        self._session.policy = policy
        self._held_back = False
        self._before_evaluation = False
        self._save_began_ns = 0
        self._epoch = EpochLength()

    @short_traceback
    def restore(self, args: TrainingArguments) -> str | None:
        """Bring the newest whole checkpoint of the run into `args.output_dir`. Call it on all ranks.

        Returns:
            The folder for `trainer.train(resume_from_checkpoint=…)`; None on the first start.

        Raises:
            PositionError: its place cannot be found with the processes, batches and accumulation of today.
            CorruptCheckpointError: not one checkpoint is whole.
            StorageError: the storage does not answer, or the disk is full.

        Example:
            >>> trainer.train(resume_from_checkpoint=cloud.restore(args))
        """
        check_saves(args)
        checkpointer = self._session.open(args)
        accepted: list[tuple[Manifest, Conversion | None]] = []

        def accept(manifest: Manifest) -> None:
            conversion = topology.plan(args, manifest)
            number_here(checkpointer, manifest, conversion)
            accepted.append((manifest, conversion))

        restored = checkpointer.restore(wanted=_wanted_here(checkpointer.ranks.neighbours), accept=accept)
        self._session.restored = None if restored is None else accepted[-1]
        if restored is None:
            return None
        conversion = accepted[-1][1]
        if conversion is None:
            localize_state(checkpointer, restored, needs_best=args.load_best_model_at_end)
        else:
            topology.repair(checkpointer, restored, conversion, args)
        return str(restored.path)

    @short_traceback
    def wait(self, timeout: float | None = None) -> None:
        """Return, on all ranks together, when all that was saved is committed; training's end does it by itself.

        Args:
            timeout: seconds; None takes `HF_CLOUDTRAIN_DRAIN_TIMEOUT`.

        Raises:
            NotCommittedError: what is not committed, and how to finish it.
            OvertakenError: a newer attempt of the run has begun, and it alone goes on.
        """
        self._session.opened().wait(timeout)

    @short_traceback
    def save(self, folder: str | os.PathLike[str], name: str) -> str:
        """Commit any folder of rank 0, such as a final model, under `name`; returns its URL. Call it on all ranks.

        Example:
            >>> trainer.save_model("final-model")
            >>> cloud.save("final-model", name="final")
            's3://bucket/runs/mrpc/final'
        """
        return self._session.opened().save_folder(os.fspath(folder), name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take an attempt; refuse what cannot work before the first step."""
        check_saves(args)
        _check_not_hyperparameter_search(state)
        self._session.uploads = True
        self._epoch = EpochLength(kwargs.get("train_dataloader"))
        self._session.open(args)
        self._go_on_from(args, state, kwargs)
        self._session.check_not_complete(state, self._epoch, args.gradient_accumulation_steps)
        self._session.begin(args, state)
        self._held_back = self._before_evaluation = False
        self._mark_save_begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hold a save back that would come before the epoch's evaluation, and note when a save begins."""
        self._before_evaluation = (
            args.eval_strategy == IntervalStrategy.EPOCH
            and epoch_ends(state, control)
            and not self._session.stops_here
        )
        if control.should_save:
            if self._before_evaluation:
                # Resume skips the evaluation and the random numbers it draws; saved after it, resume is exact.
                control.should_save = False
                self._held_back = True
            else:
                self._mark_save_begin()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the save that was held back happen: Trainer evaluates first, then saves."""
        self._before_evaluation = False
        if self._held_back:
            self._held_back = False
            control.should_save = True
        if control.should_save or control.should_evaluate:
            self._mark_save_begin()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note when a save begins that came up during the evaluation."""
        if control.should_save and self._session.uploads:
            self._mark_save_begin()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze the folder that was just written."""
        checkpointer = self._session.opened()
        if not self._session.listens:
            checkpointer.check_not_overtaken()  # else the ranks learn of it at the end of a step
        best = state.best_global_step == state.global_step and state.best_metric is not None
        checkpointer.save(
            checkpointer.output_dir / f"checkpoint-{state.global_step}",
            position(args, state, self._epoch, kwargs.get("lr_scheduler")),
            since_ns=self._save_began_ns,
            inexact_reason=self._inexact_reason(args, state),
            metrics=metrics(state, best=best),
            best=best,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the uploads: training ends when its last checkpoint is safe, or fails."""
        self._session.end()

    def _go_on_from(self, args: TrainingArguments, state: TrainerState, live: dict[str, Any]) -> None:
        """Compare the place that was restored with the live data, and set the live schedule to it."""
        manifest, conversion = self._session.restored or (None, None)
        if manifest is None or state.global_step != (conversion or manifest.position).global_step:
            # Resumed from a path of the user's own choice, if at all.
            found = self._session.opened().saved_at(state.global_step) if state.global_step else None
            if found is not None:
                topology.check_converted(found, args)
            return
        topology.check(manifest, args, state, self._epoch)
        if conversion is not None:
            topology.go_on(conversion, state, live)

    def _mark_save_begin(self) -> None:
        """The time of the file system, so that its clock and ours need not agree."""
        checkpointer = self._session.opened()
        if checkpointer.ranks.is_leader:
            self._save_began_ns = checkpointer.local.mark_save_begin()

    def _inexact_reason(self, args: TrainingArguments, state: TrainerState) -> str | None:
        if self._session.inexact_reason is not None:
            return self._session.inexact_reason
        if args.save_only_model:
            return "save_only_model=True leaves out the optimizer, the scheduler and the random states"
        if args.ignore_data_skip:
            return "ignore_data_skip=True starts the epoch's data again"
        stateful = sorted({str(name) for name in state.stateful_callbacks or ()} - {"TrainerControl"})
        if stateful and not args.restore_callback_states_from_checkpoint:
            return f"{', '.join(stateful)} starts anew unless restore_callback_states_from_checkpoint=True"
        if self._epoch.masks_at_random and not self._epoch.is_whole(
            state.global_step, args.gradient_accumulation_steps
        ):
            return "batches are masked at random as they are fetched, ahead of the step, so masks differ after a resume"
        steps = self._epoch.steps(args.gradient_accumulation_steps)
        if self._epoch.drawn_anew and steps and state.global_step > steps and state.global_step % steps:
            return (
                "the order of the data is drawn from the random states at the beginning of each epoch, which are gone, so "
                "some samples of this epoch come again and others do not"
            )
        if self._before_evaluation:
            return "it was saved before the evaluation at the end of the epoch, which a resume skips"
        return None


def check_saves(args: TrainingArguments) -> None:
    """Stop a training that would end green with nothing on storage."""
    if args.save_strategy == SaveStrategy.NO:
        raise ConfigurationError(
            "save_strategy='no' never saves a checkpoint, so nothing would be uploaded. Use save_strategy='steps' with "
            "save_steps, or 'epoch'; for a final model alone, leave the callback out."
        )
    if args.save_only_model:
        logger.warning(
            "save_only_model=True: checkpoints hold no optimizer, scheduler or random states, so a resumed run will "
            "not equal an uninterrupted one."
        )


def _check_not_hyperparameter_search(state: TrainerState) -> None:
    if state.is_hyper_param_search:
        raise ConfigurationError(
            "A hyperparameter search trains many runs, and a run URL names one. Give each trial its own Trainer and "
            "URL, for example f'{url}/{trial.number}', or search without the callback."
        )


def _wanted_here(ranks: list[int]) -> Any:
    """Everything but the random states of ranks on other disks."""

    def wanted(path: str) -> bool:
        match = re.fullmatch(r"rng_state_(\d+)\.pth", path)
        return match is None or int(match[1]) in ranks

    return wanted
