"""Where a loop stands, in the terms of a manifest, and its checkpoint in a different topology, in new steps (law 8).

plan              before the download: the position in new steps, or why it cannot be computed
convert_state     epoch, step and batches of this epoch
move_schedules    the learning rate's schedules, on the live objects
convert_cursor    the position in the epoch's data and the random states of one process
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hf_cloudtrain.checkpoints.manifest import Manifest, Position
from hf_cloudtrain.integrations.loop.state import LoopState
from hf_cloudtrain.resume.data_position import DataPosition, converted
from hf_cloudtrain.resume.dataloaders import BY_READING, batch_size_of, innermost_sampler, keeps_state, length
from hf_cloudtrain.resume.loader_state import LoaderState
from hf_cloudtrain.resume.random_state import RandomState, derived_seed
from hf_cloudtrain.resume.schedules import check_movable, move_to
from hf_cloudtrain.resume.topology import Conversion, Epoch, convert, refusal, same_topology

_FEW_SKIPPED = 0.9
"""Least share of the steps that a schedule has followed, for the rest to be steps that the gradient scaler skipped."""


def topology(accelerator: Any, loader: Any = None) -> Position:
    """What decides the meaning of a step, as far as it is known before there is a loader."""
    return Position(
        global_step=0,
        world_size=accelerator.num_processes,
        per_device_train_batch_size=None if loader is None else batch_size_of(loader),
        gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
    )


def position(
    accelerator: Any, state: LoopState, data: DataPosition, num_epochs: int, max_steps: int | None
) -> Position:
    """Where training stands."""
    loader = data.dataloader
    batches, samples = length(loader), length(loader.dataset)
    now = topology(accelerator, loader)
    batch, seen = now.per_device_train_batch_size, None
    if batch is not None and samples is not None:
        # An epoch's last batch may be short, or filled up with samples that were seen.
        seen = state.epoch * samples + min(state.batches * batch * accelerator.num_processes, samples)
    return dataclasses.replace(
        now,
        global_step=state.step,
        epoch=state.epoch + (state.batches / batches if batches else 0.0),
        samples_seen=seen,
        num_train_epochs=float(num_epochs),
        max_steps=max_steps,
        dataset_length=samples,
        fingerprint=data.fingerprint if state.batches else None,
        epoch_steps=total_steps(accelerator, loader, 1) if batches else None,
        data_seed=data.seed,
    )


def samples_per_step(accelerator: Any, dataloader: Any) -> int | None:
    """Samples of all processes in one optimizer step; None where that is not known."""
    batch = batch_size_of(dataloader)
    if batch is None:
        return None
    return int(batch * accelerator.gradient_accumulation_steps * accelerator.num_processes)


def total_steps(accelerator: Any, dataloader: Any, num_epochs: int) -> int | None:
    """Optimizer steps of the whole training; None where the length of the data is not known."""
    batches = length(dataloader)
    if batches is None:
        return None
    accumulation: int = accelerator.gradient_accumulation_steps
    return num_epochs * math.ceil(batches / accumulation)


def plan(accelerator: Any, manifest: Manifest) -> Conversion | None:
    """The position of a checkpoint in new steps; None where a step means the same as before.

    Raises:
        PositionError: samples would be skipped or repeated, or a schedule cannot follow.
    """
    saved, what = manifest.position, manifest.folder
    loader = _training_loader(accelerator, saved)
    now = topology(accelerator, loader)
    if same_topology(saved, now):
        return None
    if loader is None and saved.dataset_length is not None:
        why = f"No prepared DataLoader has its {saved.dataset_length} samples: call accelerator.prepare before the loop."
        raise refusal(saved, now, what, why)
    conversion = convert(saved, now, _epoch_of(accelerator, loader), what)
    _check_same_order(conversion, loader)
    for scheduler in accelerator._schedulers:
        check_movable(getattr(scheduler, "scheduler", scheduler), conversion)
    return conversion


def convert_state(state: LoopState, conversion: Conversion) -> LoopState:
    """The same position in new steps and batches. The best step keeps its number, because its checkpoint does."""
    return dataclasses.replace(state, step=conversion.global_step, batches=_batches_of_epoch(conversion))


def move_schedules(accelerator: Any, conversion: Conversion) -> None:
    """Set every schedule and its learning rates to where they are after the converted steps.

    Raises:
        PositionError: a schedule has followed neither the steps nor the epochs that were trained.
    """
    for scheduler in accelerator._schedulers:
        inner = getattr(scheduler, "scheduler", scheduler)
        # AcceleratedScheduler.step moves it once a process, because the script's batch is one process's.
        each = getattr(scheduler, "step_with_optimizer", False) and not scheduler.split_batches
        old = int(conversion.saved.world_size or 1) if each else 1
        new = int(accelerator.num_processes) if each else 1
        move_to(inner, _schedule_at(inner.last_epoch, old, new, conversion))


def convert_cursor(
    main: dict[str, Any], own: dict[str, Any] | None, conversion: Conversion, seed: int, rank: int
) -> tuple[dict[str, Any] | None, RandomState]:
    """The position in the data and the random states of one process.

    Args:
        main: what process 0 has saved; all processes stand at the same position.
        own: what this process has saved; None where it did not exist.
        seed: of the saved run.
    """
    saved = conversion.saved
    if own is None:
        random = RandomState.derived(
            derived_seed(seed, rank, saved.global_step),
            generators=RandomState.from_record(main["now"]).generators,
        )
    else:
        random = RandomState.from_record(own["now"])
    if own is not None and conversion.has_same_batches:
        return own["place"], random
    if main["place"] is None:
        return None, random
    old = (int(saved.world_size or 1), int(saved.per_device_train_batch_size or 1))
    return converted(main["place"], batches=_batches_of_epoch(conversion), old=old), random


def _training_loader(accelerator: Any, saved: Position) -> Any:
    """The prepared loader of the data that was trained on; where several have its length, one with its batch, or the first."""
    fitting = [
        loader for loader in accelerator._dataloaders if length(loader.dataset) == saved.dataset_length
    ]
    if saved.dataset_length is None or not fitting:
        return None
    alike = [loader for loader in fitting if batch_size_of(loader) == saved.per_device_train_batch_size]
    return (alike or fitting)[0]


def _epoch_of(accelerator: Any, loader: Any) -> Epoch | None:
    batch, batches = (None, None) if loader is None else (batch_size_of(loader), length(loader))
    samples = None if loader is None else length(loader.dataset)
    if not (batch and batches and samples):
        return None
    accumulation, processes = accelerator.gradient_accumulation_steps, int(accelerator.num_processes)
    return Epoch.of(samples, batches, batch=batch, accumulation=accumulation, processes=processes)


def _check_same_order(conversion: Conversion, loader: Any) -> None:
    """The order itself is compared once it is drawn; this checks that it can be cut into new batches."""
    if not conversion.samples_into_epoch or conversion.has_same_batches:
        return
    why = None
    drawn = length(innermost_sampler(getattr(loader, "base_dataloader", loader)))
    if LoaderState(loader).way == BY_READING:
        why = "The data was dispatched in batches of the old size."
    elif keeps_state(loader):
        why = "A stateful DataLoader keeps its position in batches of the old size."
    elif drawn not in (None, conversion.new.samples):
        why = f"Its sampler draws {drawn} of {conversion.new.samples} samples."
    if why is not None:
        raise conversion.refusal(why)


def _batches_of_epoch(conversion: Conversion) -> int:
    """Batches of the epoch under way that each process has trained on."""
    batch = conversion.new.step_samples // int(conversion.now.gradient_accumulation_steps or 1)
    return conversion.samples_into_epoch // batch


def _schedule_at(last: int, old: int, new: int, conversion: Conversion) -> int:
    """The new state of a schedule that is at `last`, and moves `new` times a step where it moved `old` times."""
    saved = conversion.saved
    steps = old * saved.global_step
    epochs = (saved.samples_seen or 0) // conversion.old.samples
    if last == steps:
        return new * conversion.global_step
    if last == old * epochs:
        return new * epochs
    if _FEW_SKIPPED * steps <= last < steps:
        return round(last * new * conversion.global_step / steps)
    raise conversion.refusal(
        f"A schedule of its learning rate is at {last}, which is neither its {saved.global_step} steps nor its {epochs} "
        "epochs."
    )
