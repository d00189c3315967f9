"""Where a loop stands, in the terms of a manifest."""

from __future__ import annotations

import math
from typing import Any

from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.integrations.loop.state import LoopState
from hf_cloudtrain.resume.data_position import DataPosition
from hf_cloudtrain.resume.dataloaders import batch_size_of, length


def topology(accelerator: Any) -> Position:
    """What decides the meaning of a step, as far as it is known before there is a loader."""
    return Position(
        global_step=0,
        world_size=accelerator.num_processes,
        gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
    )


def position(accelerator: Any, state: LoopState, place: DataPosition, num_epochs: int) -> Position:
    """Where training stands."""
    dataloader = place.dataloader
    batch, batches, samples = batch_size_of(dataloader), length(dataloader), length(dataloader.dataset)
    seen = None
    if batch is not None and samples is not None:
        # An epoch's last batch may be short, or filled up with samples that were seen.
        seen = state.epoch * samples + min(state.batches * batch * accelerator.num_processes, samples)
    return Position(
        global_step=state.step,
        epoch=state.epoch + (state.batches / batches if batches else 0.0),
        samples_seen=seen,
        world_size=accelerator.num_processes,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
        num_train_epochs=float(num_epochs),
        max_steps=total_steps(accelerator, dataloader, num_epochs),
        dataset_length=samples,
        fingerprint=place.fingerprint if state.batches else None,
        epoch_steps=None if not batches else math.ceil(batches / accelerator.gradient_accumulation_steps),
        data_seed=place.seed,
    )


def samples_per_step(accelerator: Any, dataloader: Any) -> int | None:
    """Samples of all processes in one optimizer step; None where that is not known."""
    batch = batch_size_of(dataloader)
    if batch is None:
        return None
    return int(batch * accelerator.gradient_accumulation_steps * accelerator.num_processes)


def total_steps(accelerator: Any, dataloader: Any, num_epochs: int) -> int | None:
    """Optimizer steps of the whole training; None where the data does not tell its length."""
    batches = length(dataloader)
    if batches is None:
        return None
    accumulation: int = accelerator.gradient_accumulation_steps
    return num_epochs * math.ceil(batches / accumulation)
