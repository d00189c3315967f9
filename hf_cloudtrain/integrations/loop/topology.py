"""A loop's checkpoint in another topology: its place in the data and its schedules, in steps of today (law 8).

plan             before the download: the place in steps of today, or why there is none
convert_state    epoch, step and batches of this epoch
move_schedules   the learning rate's schedules, on the live objects
convert_here     the place in the epoch's data and the random states of one process
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_cloudtrain.checkpoints.manifest import Manifest, Position
from hf_cloudtrain.integrations.loop.position import topology
from hf_cloudtrain.integrations.loop.state import LoopState
from hf_cloudtrain.resume.data_position import DataPosition, converted
from hf_cloudtrain.resume.dataloaders import batch_size_of, innermost_sampler, keeps_state, length
from hf_cloudtrain.resume.loader_state import BY_READING
from hf_cloudtrain.resume.random_state import RandomState, derived_seed
from hf_cloudtrain.resume.schedules import check_movable, move_to
from hf_cloudtrain.resume.topology import Conversion, Epoch, convert, refusal, same_topology

_FEW_SKIPPED = 0.9
"""Least share of the steps that a schedule has followed, for the rest to be steps that the gradient scaler skipped."""


def plan(accelerator: Any, manifest: Manifest) -> Conversion | None:
    """The place of a checkpoint in steps of today; None where a step means the same as then.

    Raises:
        PositionError: samples would be skipped or repeated, or a schedule cannot follow.
    """
    saved, what = manifest.position, manifest.folder
    loader = _training_loader(accelerator, saved)
    now = dataclasses.replace(
        topology(accelerator), per_device_train_batch_size=None if loader is None else batch_size_of(loader)
    )
    if same_topology(saved, now):
        return None
    if loader is None and saved.dataset_length is not None:
        why = f"No prepared loader has its {saved.dataset_length} samples: call accelerator.prepare before the loop."
        raise refusal(saved, now, what, why)
    conversion = convert(saved, now, _epoch_of(accelerator, loader), what)
    _check_same_order(conversion, loader)
    for scheduler in accelerator._schedulers:
        check_movable(getattr(scheduler, "scheduler", scheduler), what, conversion.changes)
    return conversion


def convert_state(state: LoopState, conversion: Conversion) -> LoopState:
    """The same place in steps and batches of today. The best step stays what it was called: its checkpoint is."""
    return dataclasses.replace(state, step=conversion.global_step, batches=_batches_of_epoch(conversion))


def move_schedules(accelerator: Any, conversion: Conversion) -> None:
    """Set every schedule and its learning rates to where they are after the converted steps.

    Raises:
        PositionError: a schedule stands neither at the steps nor at the epochs that were trained.
    """
    for scheduler in accelerator._schedulers:
        inner = getattr(scheduler, "scheduler", scheduler)
        # AcceleratedScheduler.step moves it once a process, because the script's batch is one process's.
        each = getattr(scheduler, "step_with_optimizer", False) and not scheduler.split_batches
        old = int(conversion.saved.world_size or 1) if each else 1
        new = int(accelerator.num_processes) if each else 1
        move_to(inner, _schedule_at(inner.last_epoch, old, new, conversion))


def convert_here(
    main: dict[str, Any], own: dict[str, Any] | None, conversion: Conversion, seed: int, rank: int
) -> tuple[dict[str, Any] | None, RandomState]:
    """The place in the data and the random states of one process.

    Args:
        main: what process 0 has saved; all of them stand at the same place.
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
    """The order itself is compared once it is drawn; here what cannot be cut into other pieces."""
    if not conversion.samples_into_epoch or conversion.has_same_batches:
        return
    why = None
    drawn = length(innermost_sampler(getattr(loader, "base_dataloader", loader)))
    if DataPosition(loader).way == BY_READING:
        why = "Its data is read and dealt out in batches of then."
    elif keeps_state(loader):
        why = "A stateful loader keeps its place in batches of then."
    elif drawn not in (None, conversion.new.samples):
        why = f"Its sampler draws {drawn} of {conversion.new.samples} samples."
    if why is not None:
        raise conversion.refusal(why)


def _batches_of_epoch(conversion: Conversion) -> int:
    """Batches of the epoch under way that each process has trained on."""
    batch = conversion.new.step_samples // int(conversion.now.gradient_accumulation_steps or 1)
    return conversion.samples_into_epoch // batch


def _schedule_at(last: int, old: int, new: int, conversion: Conversion) -> int:
    """Where a schedule stands that moves `today` times a step and did `then` times."""
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
        f"A schedule of its learning rate stands at {last}, which is neither its {saved.global_step} steps nor its {epochs} "
        "epochs."
    )
