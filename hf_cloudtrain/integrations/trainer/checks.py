"""Configurations of Trainer that cannot work, refused before the first step."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from transformers.trainer_utils import SaveStrategy

from hf_cloudtrain.errors import ConfigurationError, RunCompleteError
from hf_cloudtrain.integrations.trainer.position import EpochLength

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


def check_saves(args: TrainingArguments, *, by_time: bool = False) -> None:
    """Stop a training that would end without an error and with nothing on storage.

    Args:
        by_time: whether it saves by time.
    """
    if args.save_strategy == SaveStrategy.NO and not by_time:
        raise ConfigurationError(
            "save_strategy='no' never saves a checkpoint, so nothing would be uploaded. Use save_strategy='steps' with "
            "save_steps, or 'epoch', or CloudTrainCallback(…, save_interval_seconds=600); for the final model alone, remove "
            "the callback."
        )


def check_not_hyperparameter_search(state: TrainerState) -> None:
    """Stop a search: each of its trials is a run of its own."""
    if state.is_hyper_param_search:
        raise ConfigurationError(
            "A hyperparameter search trains many runs, but a run URL names one. Give each trial its own Trainer and "
            "URL, for example f'{url}/{trial.number}', or search without the callback."
        )


def check_all_processes_train_together(args: TrainingArguments) -> None:
    """Stop processes of one launch that Trainer would train one by one."""
    if args.world_size < int(os.environ.get("WORLD_SIZE", "1")):
        raise ConfigurationError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but each process would train alone, as rank 0. On a machine "
            "without an accelerator pass use_cpu=True."
        )


def check_no_jit_checkpoint(args: TrainingArguments) -> None:
    """Stop a training in which the framework, too, would save on SIGTERM."""
    if getattr(args, "enable_jit_checkpoint", False):
        raise ConfigurationError(
            "enable_jit_checkpoint=True saves on SIGTERM by itself, on each rank at a different step, and would write into "
            "the emergency save. Remove it: CloudTrainCallback saves on SIGTERM."
        )


def check_not_complete(run_url: str, state: TrainerState, epoch: EpochLength, accumulation: int) -> None:
    """Stop a complete run in the middle of an epoch: Trainer looks for the end only after a step, so it would do one more."""
    if state.global_step < state.max_steps:
        return
    if epoch.is_whole(state.global_step, accumulation):
        logger.warning(
            "The run is complete: step %d of %d. Nothing is trained.", state.global_step, state.max_steps
        )
        return
    raise RunCompleteError(
        f"The run {run_url!r} is complete: step {state.global_step} of {state.max_steps}. Trainer would train on from "
        "the middle of the epoch. Use the restored checkpoint as it is, or raise max_steps."
    )
