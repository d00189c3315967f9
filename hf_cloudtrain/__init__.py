"""A training run outlives the machine it runs on: checkpoints to any storage, and exact resume anywhere.

Importing this package imports neither torch nor transformers; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
    from hf_cloudtrain.checkpoints.manifest import Manifest, Position
    from hf_cloudtrain.errors import CloudTrainError
    from hf_cloudtrain.integrations.functions.api import (
        end_step,
        init,
        is_emergency_save,
        metric,
        processed_steps,
        restore,
        start_step,
        train_step,
        upload_checkpoint,
    )
    from hf_cloudtrain.integrations.loop.loop import TrainLoop
    from hf_cloudtrain.integrations.trainer.callbacks import CheckpointUploadCallback, CloudTrainCallback
    from hf_cloudtrain.integrations.trainer.emergency import EmergencySaveCallback
    from hf_cloudtrain.integrations.trainer.step_callback import StepTrackerCallback
    from hf_cloudtrain.resume.sampler import ResumableSampler
    from hf_cloudtrain.tracking.history import History, read_history

_HOMES = {
    "CheckpointUploadCallback": "integrations.trainer.callbacks",
    "Checkpointer": "checkpoints.checkpointer",
    "CloudTrainCallback": "integrations.trainer.callbacks",
    "CloudTrainError": "errors",
    "EmergencySaveCallback": "integrations.trainer.emergency",
    "History": "tracking.history",
    "Manifest": "checkpoints.manifest",
    "Position": "checkpoints.manifest",
    "ResumableSampler": "resume.sampler",
    "StepTrackerCallback": "integrations.trainer.step_callback",
    "TrainLoop": "integrations.loop.loop",
    "end_step": "integrations.functions.api",
    "init": "integrations.functions.api",
    "is_emergency_save": "integrations.functions.api",
    "metric": "integrations.functions.api",
    "processed_steps": "integrations.functions.api",
    "read_history": "tracking.history",
    "restore": "integrations.functions.api",
    "start_step": "integrations.functions.api",
    "train_step": "integrations.functions.api",
    "upload_checkpoint": "integrations.functions.api",
}

__all__ = [
    "CheckpointUploadCallback",
    "Checkpointer",
    "CloudTrainCallback",
    "CloudTrainError",
    "EmergencySaveCallback",
    "History",
    "Manifest",
    "Position",
    "ResumableSampler",
    "StepTrackerCallback",
    "TrainLoop",
    "end_step",
    "init",
    "is_emergency_save",
    "metric",
    "processed_steps",
    "read_history",
    "restore",
    "start_step",
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
