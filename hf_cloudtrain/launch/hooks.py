"""Which functions of a training library are wrapped, once its module has been executed. Called by `hook/sitecustomize.py`.

Only light imports here: a script may import Trainer and never train.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from hf_cloudtrain.launch.notes import note


def install(module: ModuleType) -> None:
    """Wrap what is hooked in a module: `Trainer.train`."""
    note("imported", module.__name__)
    if module.__name__ == "transformers.trainer":
        _wrap_train(module.Trainer)


def _wrap_train(trainer: Any) -> None:
    original = trainer.train

    @functools.wraps(original)
    def train(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The Trainer must be `self` here: callbacks find it in the frames above theirs.
        from hf_cloudtrain.launch.trainer import HookedTraining

        training = HookedTraining.of(self, trial=kwargs.get("trial", args[0] if args else None))
        if training is None:
            return original(self, resume_from_checkpoint, *args, **kwargs)
        with training:
            return original(self, training.checkpoint(resume_from_checkpoint), *args, **kwargs)

    trainer.train = train
