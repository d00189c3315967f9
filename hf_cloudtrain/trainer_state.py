"""What a Trainer's state says of its place in data and schedule, and what it must say on another machine."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.catalog import CheckpointKey
from hf_cloudtrain.checkpointer import Checkpointer, Restored
from hf_cloudtrain.manifest import Manifest, Position

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"


class EpochLength:
    """How many samples and batches an epoch has; None where the data is a stream."""

    def __init__(self, dataloader: Any = None) -> None:
        collate = getattr(dataloader, "collate_fn", None)
        self.masks_at_random = bool(getattr(getattr(collate, "data_collator", collate), "mlm", False))
        """Whether fetching a batch draws random numbers (masked language models)."""
        self.samples: int | None
        self.batches: int | None
        try:
            self.samples, self.batches = len(dataloader.dataset), len(dataloader)
        except (AttributeError, TypeError):
            self.samples = self.batches = None

    def is_whole(self, global_step: int, accumulation: int) -> bool:
        """Whether a step is the last of an epoch; False where that is not known."""
        return bool(self.batches) and global_step % math.ceil((self.batches or 1) / accumulation) == 0

    def samples_seen(self, global_step: int, step_samples: int, accumulation: int) -> int:
        """Samples after `global_step` optimizer steps of `step_samples` each; an epoch's last step may be short."""
        if self.samples is None or not self.batches:
            return global_step * step_samples
        epochs, into = divmod(global_step, math.ceil(self.batches / accumulation))
        return epochs * self.samples + min(into * step_samples, self.samples)


def topology(args: TrainingArguments) -> Position:
    """What decides the meaning of a step, as configured now."""
    return Position(
        global_step=0,
        world_size=args.world_size,
        # Trainer takes the batch size of the checkpoint where it searches for one itself.
        per_device_train_batch_size=None if args.auto_find_batch_size else args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )


def step_samples(args: TrainingArguments, state: TrainerState) -> int:
    """Samples of all processes in one optimizer step."""
    batch: int = state.train_batch_size or args.train_batch_size
    return batch * int(args.gradient_accumulation_steps) * int(args.world_size)


def epoch_ends(state: TrainerState, control: TrainerControl) -> bool:
    """Whether the step that is over is the last one of its epoch, or of the training."""
    return (
        control.should_training_stop
        or control.should_epoch_stop
        or (state.epoch is not None and float(state.epoch).is_integer())
    )


def position(args: TrainingArguments, state: TrainerState, epoch: EpochLength) -> Position:
    """Where the training stands."""
    return Position(
        global_step=state.global_step,
        epoch=state.epoch,
        samples_seen=epoch.samples_seen(
            state.global_step, step_samples(args, state), args.gradient_accumulation_steps
        ),
        world_size=args.world_size,
        per_device_train_batch_size=state.train_batch_size or args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=float(state.num_train_epochs),
        max_steps=state.max_steps,
        dataset_length=epoch.samples,
    )


def metrics(state: TrainerState, *, best: bool) -> dict[str, float]:
    """The values logged last, for people who choose a checkpoint: the loss, and all that was logged at this step."""
    found: dict[str, float] = {}
    for record in reversed(state.log_history):
        here = record.get("step") == state.global_step
        for key, value in record.items():
            wanted = key == "loss" or (here and key not in ("step", "epoch"))
            if wanted and isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault(key, float(value))
        if not here and "loss" in found:
            break
    if best and state.best_metric is not None:
        found["best_metric"] = float(state.best_metric)
    return found


def make_true_here(checkpointer: Checkpointer, restored: Restored, *, needs_best: bool) -> None:
    """Set the paths in trainer_state.json to this machine's, and bring the best checkpoint along if it is needed."""
    world = checkpointer.world
    best = world.agree(
        lambda: _best_of(checkpointer, restored) if needs_best else None, "find the best checkpoint"
    )
    if best is not None:
        outcomes = world.each_leader(checkpointer.bringer(best), "download the best checkpoint")
        problems = [problem for problem in outcomes if problem]
        if problems and world.is_main:
            logger.warning(
                "The best checkpoint %s is damaged and is not loaded at the end. %s", best.key, problems[0]
            )
    world.each_leader(lambda: _rewrite(checkpointer, restored), f"adjust {TRAINER_STATE}")


def _best_of(checkpointer: Checkpointer, restored: Restored) -> Manifest | None:
    """The manifest of the best checkpoint that the restored state names, in the line that led to it."""
    step = _read(restored.path / TRAINER_STATE).get("best_global_step")
    if not step:
        return None
    newest = CheckpointKey(restored.manifest.attempt, restored.manifest.step)
    keys = [key for key in checkpointer.catalog.checkpoints() if key.step == step and key <= newest]
    if not keys:
        logger.warning(
            "The best checkpoint (step %s) is not on storage, so it cannot be loaded at the end.", step
        )
        return None
    return checkpointer.catalog.read(keys[-1])


def _rewrite(checkpointer: Checkpointer, restored: Restored) -> None:
    path = restored.path / TRAINER_STATE
    record = _read(path)
    named = record.get("best_model_checkpoint")
    if not named:
        return
    here = checkpointer.output_dir / re.split(r"[/\\]", str(named))[-1]
    if here.is_dir() and here != restored.path:
        # Trainer deletes the oldest by modification time first; the best must not look newer than this one.
        moment = time.time() - 60
        os.utime(here, (moment, moment))
    if str(here) == named:
        return
    original = checkpointer.originals(restored.manifest) / TRAINER_STATE
    if not original.exists():
        original.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, original)
    beside = path.with_suffix(".tmp")
    beside.write_text(
        json.dumps({**record, "best_model_checkpoint": str(here)}, indent=2, sort_keys=True) + "\n"
    )
    os.replace(beside, path)


def _read(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text()) if path.is_file() else {}
    return record if isinstance(record, dict) else {}
