"""A training run outlives the machine it runs on: checkpoints to any storage, and exact resume anywhere.

Importing this package imports neither torch nor transformers; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_cloudtrain.callbacks import CheckpointUploadCallback, CloudTrainCallback, StepTrackerCallback
    from hf_cloudtrain.checkpointer import Checkpointer
    from hf_cloudtrain.emergency import EmergencySaveCallback
    from hf_cloudtrain.errors import CloudTrainError
    from hf_cloudtrain.functional import (
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
    from hf_cloudtrain.history import History, read_history
    from hf_cloudtrain.loop import TrainLoop
    from hf_cloudtrain.manifest import Manifest, Position
    from hf_cloudtrain.sampler import ResumableSampler

_HOMES = {
    "CheckpointUploadCallback": "callbacks",
    "Checkpointer": "checkpointer",
    "CloudTrainCallback": "callbacks",
    "CloudTrainError": "errors",
    "EmergencySaveCallback": "emergency",
    "History": "history",
    "Manifest": "manifest",
    "Position": "manifest",
    "ResumableSampler": "sampler",
    "StepTrackerCallback": "callbacks",
    "TrainLoop": "loop",
    "end_step": "functional",
    "init": "functional",
    "is_emergency_save": "functional",
    "metric": "functional",
    "processed_steps": "functional",
    "read_history": "history",
    "restore": "functional",
    "start_step": "functional",
    "train_step": "functional",
    "upload_checkpoint": "functional",
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
