"""Optimizer steps, counted for the scripts that save with `Accelerator.save_state`: torch calls a hook after each step.

Only light imports: this is installed when accelerate is imported, and most scripts never call `save_state`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any


class OptimizerSteps:
    """How often each optimizer of this process has stepped.

    Args:
        on_first: called at the first step that a script itself takes with an optimizer of Accelerate.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.on_step: Callable[[Any], None] | None = None
        """Called after each step with the optimizer."""
        self._counts: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._on_first: Callable[[], None] | None = on_first
        register_optimizer_step_post_hook(self._stepped)

    def of(self, accelerator: Any) -> int:
        """Steps of the first optimizer that was prepared; 0 where there is none, or one that is not torch's."""
        optimizer = _first(accelerator)
        return 0 if optimizer is None else self._counts.get(optimizer, 0)

    def counts_for(self, accelerator: Any, optimizer: Any) -> bool:
        """Whether an optimizer is the one whose steps count."""
        return optimizer is _first(accelerator)

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._counts[optimizer] = self._counts.get(optimizer, 0) + 1
        if self._on_first is not None and (is_of_script := _is_of_script()) is not None:
            on_first, self._on_first = self._on_first, None
            if is_of_script:
                on_first()
        if self.on_step is not None:
            self.on_step(optimizer)


def _first(accelerator: Any) -> Any:
    return getattr(accelerator._optimizers[0], "optimizer", None) if accelerator._optimizers else None


def _is_of_script() -> bool | None:
    """Whether a script steps itself, rather than through Trainer or this package; None where the optimizer is not Accelerate's."""
    frame: FrameType | None = sys._getframe()
    found = None
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name == "accelerate.optimizer":
            found = True
        elif name == "transformers.trainer" or name.startswith("hf_cloudtrain.integrations."):
            return False
        frame = frame.f_back
    return found
