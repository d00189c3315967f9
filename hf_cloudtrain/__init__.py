"""A training run outlives the machine it runs on: checkpoints to any storage, and exact resume anywhere.

Importing this package imports neither torch nor transformers; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError(
        "hf_cloudtrain does not run on Windows, because it needs file locks and signals of Linux or macOS. Install it "
        "and run your training inside WSL: https://learn.microsoft.com/windows/wsl/install"
    )

if TYPE_CHECKING:
    from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
    from hf_cloudtrain.checkpoints.manifest import Manifest, Position
    from hf_cloudtrain.errors import CloudTrainError
    from hf_cloudtrain.integrations.functions.api import (
        async_writes,
        end_step,
        init,
        is_emergency_save,
        metric,
        processed_steps,
        restore,
        start_step,
        tracker_arguments,
        tracker_environment,
        train_step,
        upload_checkpoint,
    )
    from hf_cloudtrain.integrations.loop.loop import TrainLoop
    from hf_cloudtrain.integrations.trainer.callbacks import CheckpointUploadCallback
    from hf_cloudtrain.integrations.trainer.cloud_callback import CloudTrainCallback
    from hf_cloudtrain.integrations.trainer.emergency import EmergencySaveCallback
    from hf_cloudtrain.integrations.trainer.step_callback import StepTrackerCallback
    from hf_cloudtrain.report.run import Run
    from hf_cloudtrain.resume.sampler import ResumableSampler
    from hf_cloudtrain.resume.step_samplers import ResumableRandomSampler, ResumableSequentialSampler
    from hf_cloudtrain.tracking.history import History, read_history
    from hf_cloudtrain.tracking.services.service import TrackerContent, TrackerService, register_tracker

_NAMES = {
    "checkpoints.checkpointer": ("Checkpointer",),
    "checkpoints.manifest": ("Manifest", "Position"),
    "errors": ("CloudTrainError",),
    "integrations.functions.api": (
        *("async_writes", "end_step", "init", "is_emergency_save", "metric", "processed_steps", "restore"),
        *("start_step", "tracker_arguments", "tracker_environment", "train_step", "upload_checkpoint"),
    ),
    "integrations.loop.loop": ("TrainLoop",),
    "integrations.trainer.callbacks": ("CheckpointUploadCallback",),
    "integrations.trainer.cloud_callback": ("CloudTrainCallback",),
    "integrations.trainer.emergency": ("EmergencySaveCallback",),
    "integrations.trainer.step_callback": ("StepTrackerCallback",),
    "report.run": ("Run",),
    "resume.sampler": ("ResumableSampler",),
    "resume.step_samplers": ("ResumableRandomSampler", "ResumableSequentialSampler"),
    "tracking.history": ("History", "read_history"),
    "tracking.services.service": ("TrackerContent", "TrackerService", "register_tracker"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "CheckpointUploadCallback",
    "Checkpointer",
    "CloudTrainCallback",
    "CloudTrainError",
    "EmergencySaveCallback",
    "History",
    "Manifest",
    "Position",
    "ResumableRandomSampler",
    "ResumableSampler",
    "ResumableSequentialSampler",
    "Run",
    "StepTrackerCallback",
    "TrackerContent",
    "TrackerService",
    "TrainLoop",
    "async_writes",
    "end_step",
    "init",
    "is_emergency_save",
    "metric",
    "processed_steps",
    "read_history",
    "register_tracker",
    "restore",
    "start_step",
    "tracker_arguments",
    "tracker_environment",
    "train_step",
    "upload_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hf_cloudtrain")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
