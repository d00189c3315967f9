"""Which functions of a training library are wrapped, once its module has been executed. Called by `hook/sitecustomize.py`.

Only light imports here: a script may import a library and never train.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_cloudtrain.launch.notes import note


def install(module: ModuleType) -> None:
    """Wrap what is hooked in a module: `Trainer.train`, or `Accelerator.save_state` and `load_state`."""
    note("imported", module.__name__)
    if module.__name__ == "transformers.trainer":
        _wrap_train(module.Trainer)
    else:
        _wrap_states(module.Accelerator)


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


def _wrap_states(accelerator: Any) -> None:
    save, load = accelerator.save_state, accelerator.load_state
    states = _States()

    @functools.wraps(save)
    def save_state(self: Any, output_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
        is_named = not self.project_configuration.automatic_checkpoint_naming
        folder = _absolute(output_dir) if is_named else None
        ours = states.of(self, folder or Path(self.project_dir or ".", "checkpoints", "next").absolute())
        if ours is None:
            return save(self, output_dir, *args, **kwargs)
        with ours.saving(folder) as saved:
            saved.folder = save(self, output_dir, *args, **kwargs)
        return saved.folder

    @functools.wraps(load)
    def load_state(self: Any, input_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
        folder = _newest(self) if input_dir is None else _absolute(os.path.expanduser(input_dir))
        ours = None if folder is None else states.of(self, folder)
        if ours is None or folder is None:
            return load(self, input_dir, *args, **kwargs)
        ours.before_loading(folder)
        answer = load(self, input_dir, *args, **kwargs)
        ours.loaded(folder)
        return answer

    accelerator.save_state, accelerator.load_state = save_state, load_state


class _States:
    """The states of the first Accelerator of this process that saves or loads one."""

    def __init__(self) -> None:
        from hf_cloudtrain.launch.steps import OptimizerSteps

        self._steps = OptimizerSteps(self._first_step)
        self._ours: Any = None
        self._is_alone = False

    def of(self, accelerator: Any, folder: Path) -> Any:
        """What takes care of them; None where they are left alone."""
        caller = str(sys._getframe(2).f_globals.get("__name__", ""))
        if caller.startswith("hf_cloudtrain.") or self._is_alone:
            return None
        if self._ours is None:
            from hf_cloudtrain.launch.accelerator import SavedStates, why_left_alone

            run_url = os.environ.get("HF_CLOUDTRAIN_RUN_URL")
            reason = why_left_alone(run_url)
            if reason is not None:
                self._is_alone = True
                note("left-alone", f"save_state(): {reason}")
                return None
            self._ours = SavedStates(accelerator, str(run_url), self._steps, folder)
        return self._ours

    def _first_step(self) -> None:
        run_url = os.environ.get("HF_CLOUDTRAIN_RUN_URL")
        if self._ours is None and run_url:
            from hf_cloudtrain.launch.accelerator import check_loaded

            check_loaded(run_url)


def _newest(accelerator: Any) -> Path | None:
    """The folder that `load_state()` chooses: the one with the highest number, where Accelerate names the folders."""
    above = Path(accelerator.project_dir or ".", "checkpoints").absolute()
    if not accelerator.project_configuration.automatic_checkpoint_naming or not above.is_dir():
        return None
    numbered = [path for path in above.iterdir() if re.search(r"[0-9]", path.name)]
    return max(numbered, key=lambda path: int(re.findall(r"[0-9]+", path.name)[0]), default=None)


def _absolute(folder: Any) -> Path:
    return Path(os.path.abspath(folder))
