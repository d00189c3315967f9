"""TensorBoard: event files in a folder. A writer with `purge_step` hides what earlier files have from that step on.

The id is the folder: relative to the output folder, as Trainer names it at the first start, or what `TENSORBOARD_LOGGING_DIR` says.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from hf_cloudtrain.tracking.services.service import TrackerContent, TrackerService, TrackerStart


class TensorBoard(TrackerService):
    """TensorBoard."""

    name = "tensorboard"
    trainer_callback = "TensorBoardCallback"

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._writer: Any = None

    def users_id(self, start: TrackerStart) -> str | None:
        """The folder that `TENSORBOARD_LOGGING_DIR` names, for Trainer; Accelerate does not know it."""
        return None if start.logging_dir else os.environ.get("TENSORBOARD_LOGGING_DIR") or None

    def new_id(self, start: TrackerStart) -> str:
        """The folder that Trainer would choose: time and host of the first start. Accelerate's is that of the project."""
        if start.logging_dir is not None:
            return start.logging_dir.name
        from transformers.integrations.integration_utils import default_logdir

        return default_logdir()

    def lacks(self, tracker_id: str) -> str | None:
        """A record is untrusted: it must not name a folder outside of the output folder."""
        outside = os.path.isabs(tracker_id) or ".." in Path(tracker_id).parts
        return "TENSORBOARD_LOGGING_DIR is not set any more" if outside else None

    def before_start(self, callback: Any, args: Any, tracker_id: str, start: TrackerStart) -> dict[str, str]:
        """A writer for the folder; not where the user has given the callback one."""
        if callback.tb_writer is None or callback.tb_writer is self._writer:
            if self._writer is not None:
                self._writer.close()
            self._folder = start.output_dir / Path(tracker_id).expanduser()
            callback.logging_dir = str(self._folder)
            purge = start.step + 1 if start.step else None
            callback.tb_writer = self._writer = _writer_class()(
                log_dir=callback.logging_dir, purge_step=purge
            )
        return {}

    def arguments(self, tracker_id: str, start: TrackerStart) -> dict[str, Any]:
        """Of SummaryWriter; Accelerate names the folder."""
        self._folder = start.logging_dir
        return {"purge_step": start.step + 1} if start.step else {}

    def sent(self, tracker_id: str) -> TrackerContent:
        """The last step of each scalar in the folder, where tensorboard itself is installed."""
        try:
            from tensorboard.backend.event_processing import event_accumulator
        except ImportError:
            return TrackerContent()
        if self._folder is None:
            return TrackerContent()
        sizes = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 1)
        found = event_accumulator.EventAccumulator(str(self._folder), size_guidance=sizes)
        found.Reload()
        return TrackerContent({tag: found.Scalars(tag)[-1].step for tag in found.Tags()["scalars"]})


def _writer_class() -> Any:
    try:
        module: Any = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        module = importlib.import_module("tensorboardX")
    return module.SummaryWriter
