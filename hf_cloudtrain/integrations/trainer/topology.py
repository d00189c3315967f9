"""A Trainer's checkpoint in a different topology: its position in data and schedule, in new steps (law 8).

plan             before the download: the position in new steps, or why it cannot be computed
repair           the restored folder: trainer_state.json, which Trainer reads before any callback runs, and random states for
                 processes that did not exist
check            before the first step: whether the live data, its order and its position are those of the checkpoint
move_schedule    the learning rate's schedule, on the live objects: this package reads no file of it
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.checkpoints.manifest import Manifest, Position
from hf_cloudtrain.checkpoints.restore import Restored
from hf_cloudtrain.errors import PositionError
from hf_cloudtrain.integrations.trainer.position import EpochLength, batch_of, topology
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
from hf_cloudtrain.runtime.ranks import Ranks

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_BY_LENGTH = ("group_by_length", "batch_rebalance")
"""Sampling strategies whose order depends on the size of a batch."""
_SAME_ORDER = ("accelerate.SeedableRandomSampler", "torch.SequentialSampler")
"""Samplers whose order depends on nothing but a seed and the number of the epoch."""


def plan(args: TrainingArguments, manifest: Manifest) -> Conversion | None:
    """The position of a checkpoint in new steps; None where a step means the same as before.

    Raises:
        PositionError: samples would be skipped or repeated, or the schedule would end at a different sample.
    """
    saved, now, what = manifest.position, topology(args), manifest.folder
    if same_topology(saved, now):
        return None
    strategy = getattr(args, "train_sampling_strategy", None)
    if strategy in _BY_LENGTH:
        why = f"train_sampling_strategy={strategy!r} orders the data by the batch size."
        raise refusal(saved, now, what, why)
    conversion = convert(saved, now, _epoch_of(args, saved), what)
    check_same_schedule(saved.lr_scheduler, conversion)
    _check_same_end(args, conversion)
    return conversion


def repair(restored: Restored, conversion: Conversion, args: TrainingArguments, ranks: Ranks) -> None:
    """Add the random states that the restored folder lacks, and log what was converted. On all ranks."""
    ranks.each_leader(
        lambda: derive_states(restored.path, restored.manifest, args, ranks.neighbours),
        "derive random states",
    )
    if ranks.is_main:
        _log(conversion, args)


def convert_state(record: dict[str, Any], conversion: Conversion, args: TrainingArguments) -> dict[str, Any]:
    """What trainer_state.json must say for Trainer to continue at the same position.

    Trainer sets `num_train_epochs` itself, but takes the intervals of saves, logs and evaluations from the file.
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

    Trainer loads them at the right moment: after it has skipped the data that was seen.
    """
    import torch

    saved = {entry.path for entry in manifest.files}
    for rank in ranks:
        # As Trainer._load_rng_state names them.
        name = f"rng_state_{rank}.pth" if args.world_size > 1 else "rng_state.pth"
        if name not in saved:
            torch.save(_states(args, rank, manifest.step), folder / name)


def check(saved: Manifest, args: TrainingArguments, state: TrainerState, epoch: EpochLength) -> None:
    """Stop before the first step if the live data is not at the position of the checkpoint.

    Raises:
        PositionError: the data, its order or its position is different.
    """
    position, what = saved.position, saved.folder
    if args.ignore_data_skip or position.samples_seen is None:
        return  # the user wants different data, or the same again
    check_same_length(position.dataset_length, epoch.samples, what)
    if epoch.dispatched and epoch.samples and position.samples_seen % epoch.samples:
        # Executed with accelerate 1.15: skip_first_batches counts batches of one process, and begins epoch 0's order.
        raise PositionError(
            f"{what} was saved within an epoch, and a DataLoader whose first process reads for all cannot resume there: "
            "Accelerate would skip the wrong samples. Pass accelerator_config={'dispatch_batches': False}: the order of "
            "the data is the same."
        )
    if None not in (position.data_seed, epoch.seed) and position.data_seed != epoch.seed:
        raise PositionError(
            f"{what} was saved with the data in the order of seed {position.data_seed}, but this Trainer uses seed "
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
            f"{what} was saved after {position.samples_seen} samples, but step {state.global_step} of this Trainer would "
            f"continue after {seen}: its DataLoader yields {epoch.batches} batches an epoch. Use the same DataLoader, "
            "drop_last and batch size, or start a new run from the model in that checkpoint."
        )


def check_converted(saved: Manifest, args: TrainingArguments) -> None:
    """Stop where a checkpoint of a different topology was passed to Trainer as it is.

    Raises:
        PositionError: names every difference.
    """
    now = topology(args)
    if not same_topology(saved.position, now):
        why = "The same step is a different position in the data; cloud.restore(args) converts it."
        raise refusal(saved.position, now, saved.folder, why)


def move_schedule(conversion: Conversion, state: TrainerState, live: dict[str, Any]) -> None:
    """Set the live schedule and learning rate to where they are after the converted steps.

    Args:
        live: what Trainer passes to callbacks.

    Raises:
        PositionError: the order of the data depends on more than a seed, or the schedule on more than a step.
    """
    scheduler: Any = live.get("lr_scheduler")
    _check_same_order(conversion, live.get("train_dataloader"))
    check_movable(scheduler, conversion)
    _check_steps_left(conversion, state)
    step = conversion.saved.global_step
    # A step that the gradient scaler skipped moved no schedule; their share stays the same.
    move_to(scheduler, round(scheduler.last_epoch * conversion.global_step / step) if step else 0)


def _epoch_of(args: TrainingArguments, saved: Position) -> Epoch | None:
    """A new epoch, as far as it is known before there is a DataLoader; `check` compares it with the DataLoader."""
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


def _log(conversion: Conversion, args: TrainingArguments) -> None:
    other_ranks = conversion.saved.world_size != conversion.now.world_size
    logger.warning("%s", conversion.story(derived=other_ranks))
    if args.warmup_steps >= 1 and conversion.is_renumbered:
        logger.warning("warmup_steps=%d is counted in the new (differently sized) steps.", args.warmup_steps)


def _check_same_end(args: TrainingArguments, conversion: Conversion) -> None:
    wanted = conversion.max_steps
    if args.max_steps > 0 and wanted is not None and args.max_steps != wanted:
        why = (
            f"max_steps={args.max_steps} is counted in the new (differently sized) steps, and the schedule ended after the "
            f"samples of {conversion.saved.max_steps} old steps: pass max_steps={wanted}."
        )
        raise conversion.refusal(why)


def _check_same_order(conversion: Conversion, dataloader: Any) -> None:
    sampler = sampler_name(dataloader)
    if conversion.samples_into_epoch and sampler not in _SAME_ORDER:
        why = f"Its data comes in the order of a {sampler!r}, which may be different with the new settings."
        raise conversion.refusal(why)


def _check_steps_left(conversion: Conversion, state: TrainerState) -> None:
    """Stop if the old schedule has steps left and the new one has none: nothing would be trained, and it would look like success."""
    planned = conversion.max_steps
    if planned is not None and conversion.global_step < planned and state.global_step >= state.max_steps:
        why = f"{planned} steps were planned, but this Trainer ends at step {state.max_steps}."
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
    states: dict[str, Any] = {**vars(state.host), "cpu": state.torch}
    if torch.cuda.is_available():
        cuda = [
            torch.Generator(device=f"cuda:{index}").manual_seed(seed).get_state()
            for index in range(torch.cuda.device_count())
        ]
        states["cuda"] = cuda if args.world_size > 1 else cuda[0]
    return states
