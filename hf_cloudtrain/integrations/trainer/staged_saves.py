"""When a save of Trainer is staged (`staging/`), and when Trainer waits until its checkpoints are whole.

A save is staged from the event before it to `on_save`. It is an ordinary one where something reads the folder at once: a push to
the Hub, a tracker that uploads checkpoints, a callback that we do not know; and the last save of a training, after which the
script reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.integrations.trainer import known_trainers
from hf_cloudtrain.integrations.trainer.exactness import calling_trainer
from hf_cloudtrain.runtime.text import size_text
from hf_cloudtrain.staging.saves import WORTH_IT, AsyncSaves, why_not

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

READERS: dict[str, Callable[[Any], object]] = {
    "WandbCallback": lambda tracker: str(getattr(tracker._log_model, "value", "")) == "checkpoint",
    "MLflowCallback": lambda tracker: tracker._log_artifacts,
    "DagsHubCallback": lambda tracker: tracker._log_artifacts,
    "NeptuneCallback": lambda tracker: tracker._should_upload_checkpoint,
    "ClearMLCallback": lambda tracker: tracker._log_model,
    "FlyteCallback": lambda tracker: tracker.sync_checkpoints,
    "DVCLiveCallback": lambda tracker: tracker._log_model == "all",
    "TrackioCallback": lambda tracker: False,
    "SwanLabCallback": lambda tracker: False,
}
"""Callbacks of transformers with an `on_save`, and whether theirs reads the folder of the checkpoint."""


class StagedSaves:
    """The staged saves of one training. Every rank has one; the leader of the disk stages."""

    def __init__(self, checkpointer: Checkpointer, args: TrainingArguments, wish: bool | None) -> None:
        self._checkpointer = checkpointer
        self._trainer = calling_trainer()
        self._saves: AsyncSaves | None = None
        self._told = False
        if checkpointer.ranks.is_leader:
            self._saves = AsyncSaves(
                checkpointer.output_dir,
                expected=checkpoint_size(self._trainer.model, save_only_model=args.save_only_model),
                connection=checkpointer.storage.connection,
            )
            self._announce(self._saves)

    @classmethod
    def of(cls, checkpointer: Checkpointer, args: TrainingArguments, wish: bool | None) -> StagedSaves | None:
        """The staged saves of a training whose attempt has begun; None if they are ordinary ones. On all ranks."""
        trainer, wish = calling_trainer(), env.async_save(wish)
        reason = checkpointer.ranks.agree(
            lambda: why_ordinary(checkpointer, args, wish, trainer), "prepare asynchronous saves"
        )
        if reason is None:
            return cls(checkpointer, args, trainer)
        if wish and checkpointer.ranks.is_main:
            logger.warning("Saves are not asynchronous: %s.", reason)
        return None

    def save_begins(self, state: TrainerState, control: TrainerControl) -> None:
        """Stage what Trainer may save next."""
        if self._saves is None:
            return
        if is_over(state, control) or self._has_reader():
            self._saves.close()
            self._saves.settle()
        else:
            self._saves.open(self._checkpointer.output_dir / f"checkpoint-{state.global_step}")

    def save_ended(self) -> None:
        """Trainer has saved, or does not save."""
        if self._saves is not None:
            self._saves.close()

    def training_ends(self) -> None:
        """Before Trainer loads the best model, and the script reads its folders: all ranks wait until they are whole."""
        self._checkpointer.ranks.each_leader(self._settle, "write its last checkpoint")

    def end(self) -> None:
        """Stop the writer."""
        if self._saves is not None:
            self._saves.end()
            self._announce(None)
            self._saves = None

    def _announce(self, saves: AsyncSaves | None) -> None:
        queue = self._checkpointer.upload_queue
        assert queue is not None, "an attempt has begun, and this rank uploads"
        queue.late = saves

    def _settle(self) -> None:
        if self._saves is not None:
            self._saves.settle()

    def _has_reader(self) -> bool:
        """Whether a callback reads the folder of a checkpoint in its `on_save`."""
        for callback in self._trainer.callback_handler.callbacks:
            if self._reads(callback):
                name = type(callback).__name__
                if not self._told:
                    self._told = True
                    logger.warning(
                        "Saves are not asynchronous, because %s may read a checkpoint in its on_save. If it does not, set "
                        "%s.reads_checkpoints = False.",
                        name,
                        name,
                    )
                return True
        return False

    def _reads(self, callback: Any) -> bool:
        from transformers import TrainerCallback

        kind = type(callback)
        declared = getattr(callback, "reads_checkpoints", None)
        if declared is not None:
            return bool(declared)
        if getattr(kind, "on_save", None) is TrainerCallback.on_save:
            return False
        name = known_trainers.class_name(callback)
        if name.startswith("hf_cloudtrain."):
            return False
        if name.startswith("transformers.") and kind.__name__ in READERS:
            try:
                return bool(READERS[kind.__name__](callback))
            except AttributeError:  # a different release: then as an unknown callback
                return True
        return True


def is_over(state: TrainerState, control: TrainerControl) -> bool:
    """Whether this is the last step of the training."""
    return bool(state.global_step >= state.max_steps or control.should_training_stop)


def checkpoint_size(model: Any, *, save_only_model: bool) -> int:
    """Bytes of a checkpoint, expected: the weights, and two numbers of the optimizer for each one that is trained."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    return int(weights) + (0 if save_only_model else 8 * int(trained))


def why_ordinary(
    checkpointer: Checkpointer, args: TrainingArguments, wish: bool | None, trainer: Any
) -> str | None:
    """Why the saves of this training are ordinary ones; None if they are staged.

    Args:
        wish: what the user wants; None: where a checkpoint is large enough.
        trainer: that calls the callbacks.
    """
    if wish is False:
        return "async_save=False"
    if trainer is None:
        return "the trainer is not one of transformers"
    if len(checkpointer.ranks.leaders) > 1:
        return "the machines have disks of their own"
    if args.push_to_hub:
        return "push_to_hub=True reads each checkpoint as soon as it is saved"
    if env.verify_folder() is not None:
        return "verify-resume looks at each checkpoint as soon as it is saved"
    size = checkpoint_size(trainer.model, save_only_model=args.save_only_model)
    if wish is None and size < WORTH_IT:
        return f"a checkpoint has {size_text(size)} only"
    return why_not(size)
