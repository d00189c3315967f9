"""What a Trainer's state says of its place in data and schedule, and what it must say on another machine."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.local_folders import parse_renumbered
from hf_cloudtrain.checkpoints.manifest import CheckpointKey, Manifest, Position
from hf_cloudtrain.checkpoints.restore import Restored
from hf_cloudtrain.resume.dataloaders import batch_size_of, is_dispatcher, sampler_name, seed_of
from hf_cloudtrain.resume.topology import Conversion, Epoch

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
_DRAWN_ANEW = ("torch.RandomSampler", "transformers.LengthGroupedSampler")


class EpochLength:
    """How many samples and batches an epoch has; None where the data is a stream."""

    def __init__(self, dataloader: Any = None) -> None:
        collate = getattr(dataloader, "collate_fn", None)
        self.masks_at_random = bool(getattr(getattr(collate, "data_collator", collate), "mlm", False))
        """Whether fetching a batch draws random numbers (masked language models)."""
        self.samples: int | None
        self.batches: int | None
        self.batch: int | None = None
        """Samples in one batch of one process."""
        self.seed: int | None = None
        """What each epoch's order is drawn from; None where it is not drawn from a seed."""
        self.dispatched = dataloader is not None and is_dispatcher(dataloader)
        """Whether one process reads for all."""
        self.drawn_anew = False
        """Whether an epoch's order comes from the random states at its beginning, which no checkpoint within it has."""
        try:
            self.samples, self.batches = len(dataloader.dataset), len(dataloader)
            self.batch = batch_size_of(dataloader)
            self.seed = seed_of(dataloader)
            self.drawn_anew = sampler_name(dataloader) in _DRAWN_ANEW
        except (AttributeError, TypeError):
            self.samples = self.batches = None

    def is_whole(self, global_step: int, accumulation: int) -> bool:
        """Whether a step is the last of an epoch; False where that is not known."""
        return bool(self.batches) and global_step % math.ceil((self.batches or 1) / accumulation) == 0

    def samples_seen(self, global_step: int, step_samples: int, accumulation: int) -> int:
        """Samples after `global_step` optimizer steps of `step_samples` each; an epoch's last step may be short."""
        steps = self.steps(accumulation)
        if self.samples is None or not steps:
            return global_step * step_samples
        return Epoch(self.samples, steps, step_samples).samples_at(global_step)

    def steps(self, accumulation: int) -> int | None:
        """Optimizer steps in one epoch; None where that is not known."""
        return math.ceil(self.batches / accumulation) if self.batches else None


def topology(args: TrainingArguments) -> Position:
    """What decides the meaning of a step, as configured now."""
    return Position(
        global_step=0,
        world_size=args.world_size,
        # Trainer takes the batch size of the checkpoint where it searches for one itself.
        per_device_train_batch_size=None
        if args.auto_find_batch_size
        else batch_of(args, args.train_batch_size),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
    )


def batch_of(args: TrainingArguments, batch: int) -> int:
    """Samples that one process gets of what Trainer calls a batch."""
    split = getattr(args.accelerator_config, "split_batches", False)
    return batch // int(args.world_size) if split else batch


def step_samples(args: TrainingArguments, state: TrainerState) -> int:
    """Samples of all processes in one optimizer step."""
    batch = batch_of(args, state.train_batch_size or args.train_batch_size)
    return batch * int(args.gradient_accumulation_steps) * int(args.world_size)


def epoch_ends(state: TrainerState, control: TrainerControl) -> bool:
    """Whether the step that is over is the last one of its epoch, or of the training."""
    return (
        control.should_training_stop
        or control.should_epoch_stop
        or (state.epoch is not None and float(state.epoch).is_integer())
    )


def position(
    args: TrainingArguments, state: TrainerState, epoch: EpochLength, lr_scheduler: Any = None
) -> Position:
    """Where the training stands."""
    return Position(
        global_step=state.global_step,
        epoch=state.epoch,
        samples_seen=epoch.samples_seen(
            state.global_step, step_samples(args, state), args.gradient_accumulation_steps
        ),
        world_size=args.world_size,
        per_device_train_batch_size=batch_of(args, state.train_batch_size or args.train_batch_size),
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_train_epochs=float(state.num_train_epochs),
        max_steps=state.max_steps,
        dataset_length=epoch.samples,
        epoch_steps=epoch.steps(args.gradient_accumulation_steps),
        data_seed=epoch.seed,
        lr_scheduler=None if lr_scheduler is None else _kind_of(lr_scheduler),
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


def localize_state(
    checkpointer: Checkpointer,
    restored: Restored,
    *,
    needs_best: bool,
    conversion: Conversion | None = None,
    adjust: Callable[[dict[str, Any]], dict[str, Any]] = lambda record: record,
) -> None:
    """Set what trainer_state.json says to what is true on this machine, and bring the best checkpoint along if needed.

    Args:
        conversion: to steps of today, where those are others.
        adjust: changes the record in all else.
    """
    ranks = checkpointer.ranks
    best = None
    if needs_best or conversion is not None:
        best = ranks.agree(lambda: _best_of(checkpointer, restored), "find the best checkpoint")
    if best is not None:
        number_here(checkpointer, best.manifest, conversion, best.number)
    if best is not None and needs_best:
        outcomes = ranks.each_leader(
            checkpointer.restorer.fetcher(best.manifest), "download the best checkpoint"
        )
        problems = [problem for problem in outcomes if problem]
        if problems and ranks.is_main:
            logger.warning(
                "The best checkpoint %s is damaged and is not loaded at the end. %s",
                best.manifest.key,
                problems[0],
            )
    ranks.each_leader(
        lambda: _rewrite(checkpointer, restored, best, conversion, adjust), f"adjust {TRAINER_STATE}"
    )


def number_here(
    checkpointer: Checkpointer, manifest: Manifest, conversion: Conversion | None, number: int | None = None
) -> None:
    """Give a checkpoint the number that it has in steps of today.

    Args:
        number: its number in the steps that the restored checkpoint counts, if that is not its own.
    """
    if conversion is not None and conversion.is_renumbered:
        number = conversion.step_of(manifest.step if number is None else number)
    checkpointer.local.renumber(manifest.key, number)


@dataclass(frozen=True)
class _Best:
    """The best checkpoint that a restored state names."""

    manifest: Manifest
    number: int | None
    """In the steps that the restored checkpoint counts, if that is not its own."""


def _best_of(checkpointer: Checkpointer, restored: Restored) -> _Best | None:
    """The best checkpoint that the restored state names, in the line that led to it."""
    record = _as_saved(checkpointer, restored)
    newest = CheckpointKey(restored.manifest.attempt, restored.manifest.step)
    renumbered = parse_renumbered(_last_part(record.get("best_model_checkpoint")))
    step = record.get("best_global_step")
    if renumbered is not None:  # it was the best already when steps were of another size
        step = renumbered[1].step
        keys = [key for key in checkpointer.catalog.checkpoints() if key == renumbered[1]]
    elif step:
        keys = [key for key in checkpointer.catalog.checkpoints() if key.step == step and key <= newest]
    else:
        return None
    if not keys:
        logger.warning(
            "The best checkpoint (step %s) is not on storage, so it cannot be loaded at the end.", step
        )
        return None
    return _Best(checkpointer.catalog.read(keys[-1]), renumbered[0] if renumbered else None)


def _rewrite(
    checkpointer: Checkpointer,
    restored: Restored,
    best: _Best | None,
    conversion: Conversion | None,
    adjust: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    record = _as_saved(checkpointer, restored)
    if not record:
        return
    changed = adjust(record)
    name = checkpointer.local.folder(best.manifest).name if best else None
    if name is None and record.get("best_model_checkpoint"):
        name = _last_part(record["best_model_checkpoint"])
    if name:
        here = checkpointer.output_dir / name
        if here.is_dir() and here != restored.path:
            # Trainer deletes the oldest by modification time first; the best must not look newer than this one.
            moment = time.time() - 60
            os.utime(here, (moment, moment))
        changed = {**changed, "best_model_checkpoint": str(here)}
    if conversion is not None and conversion.is_renumbered:
        # Of then: Trainer would take the checkpoint with that number of today for the best.
        changed = {**changed, "best_global_step": None}
    path = restored.path / TRAINER_STATE
    if changed != _read(path):
        _keep_original(checkpointer, restored)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n")
        os.replace(beside, path)


def _as_saved(checkpointer: Checkpointer, restored: Restored) -> dict[str, Any]:
    """The state as the checkpoint has it: what lies here may have been made true, in another topology even."""
    original = checkpointer.local.originals(restored.manifest) / TRAINER_STATE
    return _read(original if original.is_file() else restored.path / TRAINER_STATE)


def _keep_original(checkpointer: Checkpointer, restored: Restored) -> None:
    original = checkpointer.local.originals(restored.manifest) / TRAINER_STATE
    if not original.exists():
        original.parent.mkdir(parents=True, exist_ok=True)
        beside = original.with_suffix(".tmp")
        shutil.copyfile(restored.path / TRAINER_STATE, beside)
        os.replace(beside, original)


def _last_part(path: Any) -> str:
    return re.split(r"[/\\]", str(path or ""))[-1]


def _kind_of(lr_scheduler: Any) -> str:
    """`LambdaLR` for whatever is one, else the name of its class."""
    names = [kind.__name__ for kind in type(lr_scheduler).__mro__]
    return "LambdaLR" if "LambdaLR" in names else names[0]


def _read(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text()) if path.is_file() else {}
    return record if isinstance(record, dict) else {}
