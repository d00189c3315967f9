"""A Trainer's checkpoint in another topology: the place in its data and its schedule, in steps of today (law 8).

plan         before the download: the place in steps of today, or why there is none
put_right    the restored folder: trainer_state.json, which Trainer reads before any callback runs, and random states for
             processes that did not exist
check        before the first step: whether the live data, its order and its place are those of the checkpoint
go_on        the learning rate's schedule, on the live objects: no file of it is read by us
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Manifest, Position
from hf_cloudtrain.checkpoints.restore import Restored
from hf_cloudtrain.errors import PositionError
from hf_cloudtrain.integrations.trainer.state import EpochLength, batch_of, localize_state, topology
from hf_cloudtrain.resume.dataloaders import sampler_name
from hf_cloudtrain.resume.random_state import RandomState, derived_seed
from hf_cloudtrain.resume.schedules import check_movable, check_same_schedule, move_to
from hf_cloudtrain.resume.topology import (
    Conversion,
    Epoch,
    batches_per_epoch,
    check_same_length,
    convert,
    refusal,
    same_topology,
)

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_BY_LENGTH = ("group_by_length", "batch_rebalance")
"""Sampling strategies whose order depends on the size of a batch."""
_SAME_ORDER = ("accelerate.SeedableRandomSampler", "torch.SequentialSampler")
"""Samplers whose order depends on nothing but a seed and the number of the epoch."""


def plan(args: TrainingArguments, manifest: Manifest) -> Conversion | None:
    """The place of a checkpoint in steps of today; None where a step means the same as then.

    Raises:
        PositionError: samples would be skipped or repeated, or the schedule would end elsewhere.
    """
    saved, now, what = manifest.position, topology(args), manifest.folder
    if same_topology(saved, now):
        return None
    strategy = getattr(args, "train_sampling_strategy", None)
    if strategy in _BY_LENGTH:
        why = f"train_sampling_strategy={strategy!r} orders the data by the size of a batch."
        raise refusal(saved, now, what, why)
    conversion = convert(saved, now, _epoch_of(args, saved), what)
    check_same_schedule(saved.lr_scheduler, what, conversion.changes)
    _check_same_end(args, conversion)
    return conversion


def repair(
    checkpointer: Checkpointer, restored: Restored, conversion: Conversion, args: TrainingArguments
) -> None:
    """Make a restored folder say what is true in steps of today. On all ranks."""
    localize_state(
        checkpointer,
        restored,
        needs_best=args.load_best_model_at_end,
        conversion=conversion,
        adjust=lambda record: convert_state(record, conversion, args),
    )
    ranks = checkpointer.ranks
    ranks.each_leader(
        lambda: derive_states(restored.path, restored.manifest, args, ranks.neighbours),
        "derive random states",
    )
    if ranks.is_main:
        _say(conversion, args)


def convert_state(record: dict[str, Any], conversion: Conversion, args: TrainingArguments) -> dict[str, Any]:
    """What trainer_state.json must say for Trainer to go on at the same place.

    `num_train_epochs` it sets itself; the intervals of saves and the like it would take from the old file.
    """
    log = record.get("log_history")
    log = log if isinstance(log, list) else []
    found = {
        **record,
        "global_step": conversion.global_step,
        "max_steps": _max_steps(args, conversion),
        "log_history": [_renumbered(entry, conversion) for entry in log],
    }
    if not args.auto_find_batch_size:
        found["train_batch_size"] = args.train_batch_size
    for name in ("logging_steps", "eval_steps", "save_steps"):
        given = getattr(args, name)
        if given is not None:  # below 1 it is a share of all steps, as TrainerState.compute_steps has it
            found[name] = math.ceil(found["max_steps"] * given) if given < 1 else given
    return found


def derive_states(folder: Path, manifest: Manifest, args: TrainingArguments, ranks: list[int]) -> None:
    """Write the random states that Trainer will look for and the checkpoint does not have, from seed, rank and step.

    Trainer sets them itself, at the right moment: after it has skipped the data that was seen.
    """
    import torch

    there = {entry.path for entry in manifest.files}
    for rank in ranks:
        # As Trainer._load_rng_state names them.
        name = f"rng_state_{rank}.pth" if args.world_size > 1 else "rng_state.pth"
        if name not in there:
            torch.save(_states(args, rank, manifest.step), folder / name)


def check(saved: Manifest, args: TrainingArguments, state: TrainerState, epoch: EpochLength) -> None:
    """Stop before the first step where the live data is not at the place of the checkpoint.

    Raises:
        PositionError: the data, its order or its place is another.
    """
    position, what = saved.position, saved.folder
    if args.ignore_data_skip or position.samples_seen is None:
        return  # who passes that wants other data, or the same again
    check_same_length(position.dataset_length, epoch.samples, what)
    if epoch.dispatched and epoch.samples and position.samples_seen % epoch.samples:
        # Executed with accelerate 1.15: skip_first_batches counts batches of one process, and begins epoch 0's order.
        raise PositionError(
            f"{what} stands within an epoch, and a loader whose first process reads for all cannot go there: Accelerate "
            "would skip other samples than were seen. Pass accelerator_config={'dispatch_batches': False}: the order of "
            "the data is the same."
        )
    if None not in (position.data_seed, epoch.seed) and position.data_seed != epoch.seed:
        raise PositionError(
            f"{what} was saved with the data in the order of seed {position.data_seed}, and now it is that of seed "
            f"{epoch.seed}: samples would be repeated and skipped. Use the same seed and data_seed."
        )
    # Not by the state's batch: where Trainer searches for one itself, the loader's may be smaller by now.
    size = (
        (epoch.batch or batch_of(args, args.train_batch_size))
        * args.gradient_accumulation_steps
        * args.world_size
    )
    seen = epoch.samples_seen(state.global_step, size, args.gradient_accumulation_steps)
    if seen != position.samples_seen:
        raise PositionError(
            f"{what} was saved after {position.samples_seen} samples, and step {state.global_step} of this Trainer would "
            f"go on after {seen}: its loader makes {epoch.batches} batches an epoch. Use the same loader, drop_last and "
            "batch size, or start a run of its own from the model in that checkpoint."
        )


def check_converted(saved: Manifest, args: TrainingArguments) -> None:
    """Stop where a checkpoint of another topology was handed to Trainer as it is.

    Raises:
        PositionError: names every difference.
    """
    now = topology(args)
    if not same_topology(saved.position, now):
        why = "The same step means another place in the data; cloud.restore(args) converts it."
        raise refusal(saved.position, now, saved.folder, why)


def go_on(conversion: Conversion, state: TrainerState, live: dict[str, Any]) -> None:
    """Set the live schedule and learning rate to where they are after the converted steps.

    Args:
        live: what Trainer hands to callbacks.

    Raises:
        PositionError: the order of the data depends on more than a seed, or the schedule on more than a step.
    """
    scheduler: Any = live.get("lr_scheduler")
    _check_same_order(conversion, live.get("train_dataloader"))
    check_movable(scheduler, conversion.what, conversion.changes)
    _check_steps_left(conversion, state)
    step = conversion.saved.global_step
    # A step that the gradient scaler skipped moved no schedule; their share stays the same.
    move_to(scheduler, round(scheduler.last_epoch * conversion.global_step / step) if step else 0)


def _epoch_of(args: TrainingArguments, saved: Position) -> Epoch | None:
    """An epoch of today, as far as it is known before there is a loader; `check` compares it with the loader."""
    batch = topology(args).per_device_train_batch_size or saved.per_device_train_batch_size
    if not saved.dataset_length or not batch:
        return None
    batches = batches_per_epoch(
        saved.dataset_length, batch, args.world_size, drop_last=args.dataloader_drop_last
    )
    accumulation, processes = args.gradient_accumulation_steps, args.world_size
    return Epoch.of(
        saved.dataset_length, batches, batch=batch, accumulation=accumulation, processes=processes
    )


def _say(conversion: Conversion, args: TrainingArguments) -> None:
    other_ranks = conversion.saved.world_size != conversion.now.world_size
    logger.warning("%s", conversion.story(derived=other_ranks))
    if args.warmup_steps >= 1 and conversion.is_renumbered:
        logger.warning("warmup_steps=%d counts steps of today, which are of another size.", args.warmup_steps)


def _check_same_end(args: TrainingArguments, conversion: Conversion) -> None:
    wanted = conversion.max_steps
    if args.max_steps > 0 and wanted is not None and args.max_steps != wanted:
        why = (
            f"max_steps={args.max_steps} counts steps of today, and after the same samples as then, at step "
            f"{conversion.saved.max_steps}, the schedule ends at step {wanted}: pass max_steps={wanted}."
        )
        raise conversion.refusal(why)


def _check_same_order(conversion: Conversion, dataloader: Any) -> None:
    sampler = sampler_name(dataloader)
    if conversion.samples_into_epoch and sampler not in _SAME_ORDER:
        why = f"Its data comes in the order of a {sampler!r}, which may be another with these numbers."
        raise conversion.refusal(why)


def _check_steps_left(conversion: Conversion, state: TrainerState) -> None:
    """There were steps to do then, so there are now: else nothing would be trained, and it would look like success."""
    planned = conversion.max_steps
    if planned is not None and conversion.global_step < planned and state.global_step >= state.max_steps:
        why = f"{planned} steps were planned, and this Trainer ends at {state.max_steps}."
        raise conversion.refusal(why)


def _max_steps(args: TrainingArguments, conversion: Conversion) -> int:
    """As Trainer.set_initial_training_values computes it."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * conversion.new.steps)


def _renumbered(entry: Any, conversion: Conversion) -> Any:
    if isinstance(entry, dict) and type(entry.get("step")) is int and entry["step"] >= 0:
        return {**entry, "step": conversion.step_of(entry["step"])}
    return entry


def _states(args: TrainingArguments, rank: int, step: int) -> dict[str, Any]:
    """Random states as Trainer._save_rng_state keeps them."""
    import torch

    seed = derived_seed(args.seed, rank, step)
    state = RandomState.derived(seed)
    states: dict[str, Any] = {"python": state.python, "numpy": state.numpy, "cpu": state.torch}
    if torch.cuda.is_available():
        cuda = [
            torch.Generator(device=f"cuda:{index}").manual_seed(seed).get_state()
            for index in range(torch.cuda.device_count())
        ]
        states["cuda"] = cuda if args.world_size > 1 else cuda[0]
    return states
