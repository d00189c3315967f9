"""When a save of Trainer is staged. What the loop does in the same way is in `integrations/staged_saves.py`.

A save is staged from the event before it to `on_save`. It is an ordinary one where something reads the folder at once: a push to
the Hub, a tracker that uploads checkpoints, a callback that we do not know; and the last save of a training, after which the
script reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.integrations.staged_saves import StagedSaves, checkpoint_size, may_stage
from hf_cloudtrain.integrations.trainer.exactness import calling_trainer

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


class TrainerSaves(StagedSaves):
    """The staged saves of one training with Trainer.

    Args:
        size: bytes of a checkpoint, expected.
        trainer: that calls the callbacks.
    """

    def __init__(self, checkpointer: Checkpointer, size: int, trainer: Any) -> None:
        super().__init__(checkpointer, size)
        self._trainer = trainer
        self._told = False

    @classmethod
    def of(
        cls, checkpointer: Checkpointer, args: TrainingArguments, wish: bool | None
    ) -> TrainerSaves | None:
        """The staged saves of a training whose attempt has begun; None if they are ordinary ones. On all ranks.

        Args:
            wish: what the user wants; None: where a checkpoint is large enough.
        """
        trainer = calling_trainer()

        def refusal() -> str | None:
            if trainer is None:
                return "the trainer is not one of transformers"
            if args.push_to_hub:
                return "push_to_hub=True reads each checkpoint as soon as it is saved"
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                return f"{'FSDP' if trainer.is_fsdp_enabled else 'DeepSpeed'} writes the model in parts, on every rank"
            return None

        models = [] if trainer is None else [trainer.model]
        size = checkpoint_size(models, save_only_model=args.save_only_model)
        return cls(checkpointer, size, trainer) if may_stage(checkpointer, wish, size, refusal) else None

    def save_begins(self, state: TrainerState, control: TrainerControl) -> None:
        """Stage what Trainer may save next."""
        if self._saves is None:
            return
        if is_over(state, control) or self._has_reader():
            self.close()
            self.settle_here()
        else:
            self.open(self._checkpointer.output_dir / f"checkpoint-{state.global_step}")

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

        declared = getattr(callback, "reads_checkpoints", None)
        if declared is not None:
            return bool(declared)
        on_save = type(callback).on_save
        if on_save is TrainerCallback.on_save or on_save.__module__.startswith("hf_cloudtrain."):
            return False
        owner = on_save.__qualname__.partition(".")[0]  # the class that defines it
        if on_save.__module__.startswith("transformers.") and owner in READERS:
            try:
                return bool(READERS[owner](callback))
            except AttributeError:  # a different release: then as an unknown callback
                return True
        return True


def is_over(state: TrainerState, control: TrainerControl) -> bool:
    """Whether this is the last step of the training."""
    return bool(state.global_step >= state.max_steps or control.should_training_stop)
