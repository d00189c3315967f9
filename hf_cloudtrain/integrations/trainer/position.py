"""Where a Trainer stands in its data and schedule, in the terms of a manifest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.resume.dataloaders import (
    batch_size_of,
    innermost_sampler,
    is_dispatcher,
    sampler_name,
    seed_of,
)
from hf_cloudtrain.resume.topology import Epoch

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_DRAWN_EACH_EPOCH = ("torch.RandomSampler", "transformers.LengthGroupedSampler")


class EpochLength:
    """How many samples and batches an epoch has; None where the dataset is streamed."""

    def __init__(self, dataloader: Any = None) -> None:
        self.samples: int | None
        self.batches: int | None
        self.batch: int | None = None
        """Samples in one batch of one process."""
        self.seed: int | None = None
        """The seed of each epoch's order; None where the order is not drawn from a seed."""
        self.dispatched = dataloader is not None and is_dispatcher(dataloader)
        """Whether one process reads for all."""
        self.drawn_each_epoch = False
        """Whether an epoch's order comes from the random states at its beginning, which no checkpoint within it has."""
        self.has_generator = False
        """Whether it comes from a generator of the sampler, as Accelerate gives it one where several processes share it."""
        try:
            self.samples, self.batches = len(dataloader.dataset), len(dataloader)
            self.batch = batch_size_of(dataloader)
            self.seed = seed_of(dataloader)
            self.drawn_each_epoch = sampler_name(dataloader) in _DRAWN_EACH_EPOCH
            self.has_generator = getattr(innermost_sampler(dataloader), "generator", None) is not None
        except (AttributeError, TypeError):
            self.samples = self.batches = None

    def is_whole(self, global_step: int, accumulation: int) -> bool:
        """Whether a step is the last of an epoch; False where that is not known."""
        steps = self.steps(accumulation)
        return bool(steps) and global_step % (steps or 1) == 0

    def exactness(self, state: TrainerState, accumulation: int) -> Exactness:
        """Whether a resume finds the order of the data."""
        steps = self.steps(accumulation)
        if not self.drawn_each_epoch or not steps or state.global_step < steps:
            return EXACT
        if state.global_step % steps and state.global_step > steps:
            return Exactness.no(
                "the order of the data is drawn from the random states at the beginning of each epoch, which are not saved, so "
                "some samples of this epoch are repeated and others are skipped"
            )
        if self.has_generator and state.global_step < state.max_steps:
            return Exactness.no("the order of each epoch is drawn from a generator that no checkpoint holds")
        return EXACT

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
    # Trainer takes the batch size of the checkpoint where it searches for one itself.
    batch = None if args.auto_find_batch_size else batch_of(args, args.train_batch_size)
    return Position(
        global_step=0,
        world_size=args.world_size,
        per_device_train_batch_size=batch,
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
    accumulation = args.gradient_accumulation_steps
    return Position(
        global_step=state.global_step,
        epoch=state.epoch,
        samples_seen=epoch.samples_seen(state.global_step, step_samples(args, state), accumulation),
        world_size=args.world_size,
        per_device_train_batch_size=batch_of(args, state.train_batch_size or args.train_batch_size),
        gradient_accumulation_steps=accumulation,
        num_train_epochs=float(state.num_train_epochs),
        max_steps=state.max_steps,
        dataset_length=epoch.samples,
        epoch_steps=epoch.steps(accumulation),
        data_seed=epoch.seed,
        lr_scheduler=None if lr_scheduler is None else _kind_of(lr_scheduler),
    )


def metrics(state: TrainerState, *, best: bool) -> dict[str, float]:
    """The values logged last, for people who choose a checkpoint: the loss, and all that was logged at this step.

    A loss that is not finite is given as it is: the last finite one belongs to an earlier step.
    """
    found: dict[str, float] = {}
    for record in reversed(state.log_history):
        is_of_this_step = record.get("step") == state.global_step
        for key, value in record.items():
            wanted = key == "loss" or (is_of_this_step and key not in ("step", "epoch"))
            if wanted and isinstance(value, (int, float)):
                found.setdefault(key, float(value))
        if not is_of_this_step and "loss" in found:
            break
    if best and state.best_metric is not None:
        found["best_metric"] = float(state.best_metric)
    return found


def _kind_of(lr_scheduler: Any) -> str:
    """`LambdaLR` for a schedule of that class or a subclass, else the name of its class."""
    names = [kind.__name__ for kind in type(lr_scheduler).__mro__]
    return "LambdaLR" if "LambdaLR" in names else names[0]
