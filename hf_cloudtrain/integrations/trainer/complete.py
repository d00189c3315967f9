"""A run that is complete: Trainer trains nothing more, and the script goes on to its end, as after an uninterrupted training.

Trainer looks for the end only after a step, so it would train on in the middle of an epoch. Its loop over the epochs is empty
if trainer_state.json names a step behind all of them. So the restored file says that until Trainer has read it; then file and
state get their own step back.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.checkpoints.completion import HOW_TO_TRAIN_ON, Completion
from hf_cloudtrain.checkpoints.restore import Restored
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.integrations.trainer.state import TRAINER_STATE
from hf_cloudtrain.resume.topology import Conversion
from hf_cloudtrain.runtime.files import write_whole

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

BEHIND_ALL = 10**30
"""A step behind all epochs: a stream has `sys.maxsize` of them, each of up to `max_steps` steps."""
_RATES = ("train_samples_per_second", "train_steps_per_second")

Record = dict[str, Any]


@dataclass(frozen=True)
class CompleteRun:
    """A restored checkpoint after which nothing is left to train."""

    path: Path
    """The restored trainer_state.json."""
    global_step: int
    why: str
    how_to_train_on: str = "To train on, raise max_steps."

    @classmethod
    def find(
        cls,
        lifecycle: AttemptLifecycle,
        args: TrainingArguments,
        restored: Restored,
        conversion: Conversion | None,
    ) -> CompleteRun | None:
        """What `restore` found, if the run is complete; None if there is something to train. On all ranks."""
        position = restored.manifest.position
        step = (conversion or position).global_step
        path = restored.path / TRAINER_STATE
        if 0 < args.max_steps <= step:
            return cls(path, step, f"step {step} of {args.max_steps}")
        # As Trainer.set_initial_training_values computes it; 1.5 epochs end in the middle of one.
        epoch_steps = (conversion.new.steps if conversion else position.epoch_steps) or 0
        planned = math.ceil(args.num_train_epochs * epoch_steps)
        if args.max_steps <= 0 and 0 < planned <= step and step % epoch_steps:
            return cls(path, step, f"step {step} of {planned}", "To train on, raise num_train_epochs.")
        checkpointer = lifecycle.checkpointer
        found = checkpointer.ranks.agree(
            lambda: Completion.of(checkpointer.storage, restored.manifest), "read whether the run is complete"
        )
        if found is None or not found.holds_for(_planned(args, conversion)):
            return None
        ended = f"a callback ended training at step {found.global_step}"
        if "max_steps" in found.planned:
            ended += f" of {found.planned['max_steps']:.0f}"
        newest = (
            "" if found.global_step == restored.manifest.step else ", and its newest checkpoint is of step "
        )
        newest += str(restored.manifest.step) if newest else ""
        return cls(path, step, f"{ended}{newest}", HOW_TO_TRAIN_ON)

    def behind_all(self, adjust: Callable[[Record], Record]) -> Callable[[Record], Record]:
        """`adjust`, and the step behind all epochs."""
        return lambda record: {**adjust(record), "global_step": BEHIND_ALL} if record else record

    def settle(self, lifecycle: AttemptLifecycle, state: TrainerState) -> None:
        """Set state and file to their own step, once Trainer has read them. On all ranks."""
        ranks = lifecycle.checkpointer.ranks
        ranks.each_leader(self._settle_file, f"adjust {TRAINER_STATE}")
        if state.global_step == BEHIND_ALL:
            state.global_step = self.global_step
            if ranks.is_main:
                logger.warning(
                    "The run is complete: %s. Nothing is trained. %s", self.why, self.how_to_train_on
                )

    def correct(self, state: TrainerState, logs: dict[str, Any]) -> None:
        """Nothing was trained, so rates that Trainer computed from the step behind all epochs are 0."""
        for record in (logs, *state.log_history[-1:]):
            record.update({name: 0.0 for name in _RATES if name in record})

    def _settle_file(self) -> None:
        record = json.loads(self.path.read_text())
        if record.get("global_step") == BEHIND_ALL:
            record["global_step"] = self.global_step
            write_whole(self.path, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def record_completion(lifecycle: AttemptLifecycle, args: TrainingArguments, state: TrainerState) -> None:
    """Record that training has ended although more steps were planned. On all ranks."""
    checkpointer = lifecycle.checkpointer
    attempt = checkpointer.attempt
    assert attempt is not None
    epochs = args.num_train_epochs if args.max_steps <= 0 else state.num_train_epochs
    planned = {"num_train_epochs": float(epochs), "max_steps": float(state.max_steps)}
    found = Completion(attempt.number, state.global_step, planned)
    checkpointer.ranks.agree(lambda: found.write(checkpointer.storage), "record that the run is complete")


def _planned(args: TrainingArguments, conversion: Conversion | None) -> dict[str, float]:
    """What is planned now, in the steps of the checkpoint."""
    if args.max_steps <= 0:
        return {"num_train_epochs": float(args.num_train_epochs)}
    steps = args.max_steps
    if conversion is not None and conversion.global_step:
        steps = round(steps * conversion.saved.global_step / conversion.global_step)
    return {"max_steps": float(steps)}
