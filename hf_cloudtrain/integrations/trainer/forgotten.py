"""`restore(args)` was called, and the Trainer with these arguments has no callback of the run: nothing would be uploaded.

No event of that Trainer reaches us. But its optimizer steps, and torch calls a registered hook after each step of any optimizer.
So the first step of that Trainer ends with an error, before hours are trained that no storage would have.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.storage.urls import shown_url

if TYPE_CHECKING:
    from transformers import TrainingArguments


class ForgottenCallback:
    """Watches from `restore(args)` until a callback of the run is called.

    Args:
        args: of the Trainer that is expected to have the callback.
    """

    def __init__(self, run_url: str, args: TrainingArguments) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._run_url = shown_url(run_url)
        self._output_dir = os.path.abspath(str(args.output_dir))
        self._hook = register_optimizer_step_post_hook(self._stepped)

    def close(self) -> None:
        """The callback is there: steps cost nothing from now on."""
        self._hook.remove()

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._is_in_trainer():
            self.close()
            raise ConfigurationError(
                f"restore(args) was called for the run {self._run_url!r}, but the Trainer that trains with these arguments has "
                "no callback of that run, so none of its checkpoints would be uploaded. Create it with "
                "Trainer(…, callbacks=[cloud])."
            )

    def _is_in_trainer(self) -> bool:
        """Whether the step is one of the Trainer with these arguments: a script may train something else before."""
        frame = sys._getframe()
        while (frame := frame.f_back) is not None:  # type: ignore[assignment]
            if frame.f_globals.get("__name__") == "transformers.trainer":
                trainer = frame.f_locals.get("self")
                folder = getattr(getattr(trainer, "args", None), "output_dir", None)
                return folder is not None and os.path.abspath(str(folder)) == self._output_dir
        return False
