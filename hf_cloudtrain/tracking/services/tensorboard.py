"""TensorBoard: event files in a folder. A writer with `purge_step` hides what earlier files have from that step on.

The id is the folder: relative to the output folder, as Trainer names it at the first start, or what `TENSORBOARD_LOGGING_DIR` says.
"""

from __future__ import annotations

import importlib
import os
import socket
import time
from pathlib import Path
from typing import Any

from hf_cloudtrain.tracking.services.service import TrackerContent, TrackerService, TrackerStart


class TensorBoard(TrackerService):
    """TensorBoard."""

    name = "tensorboard"
    trainer_callback = "TensorBoardCallback"

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._step = 0
        """From which the training resumes; what the folder has of later steps is hidden."""
        self._writer: Any = None

    def users_id(self, start: TrackerStart) -> str | None:
        """The folder that `TENSORBOARD_LOGGING_DIR` names, for Trainer; Accelerate does not know it."""
        return None if start.logging_dir else os.environ.get("TENSORBOARD_LOGGING_DIR") or None

    def new_id(self, start: TrackerStart) -> str:
        """The folder that Trainer would choose: time and host of the first start. Accelerate's is that of the project."""
        if start.logging_dir is not None:
            return start.logging_dir.name
        return os.path.join("runs", f"{time.strftime('%b%d_%H-%M-%S')}_{socket.gethostname()}")

    def lacks(self, tracker_id: str) -> str | None:
        """A record is untrusted: it must not name a folder outside of the output folder."""
        outside = os.path.isabs(tracker_id) or ".." in Path(tracker_id).parts
        return "TENSORBOARD_LOGGING_DIR is not set any more" if outside else None

    def before_start(self, callback: Any, args: Any, tracker_id: str, start: TrackerStart) -> dict[str, str]:
        """A writer for the folder; not where the user has given the callback one."""
        if callback.tb_writer is None or callback.tb_writer is self._writer:
            if self._writer is not None:
                self._writer.close()
            self._folder, self._step = start.output_dir / Path(tracker_id).expanduser(), start.step
            callback.logging_dir = str(self._folder)
            purge = start.step + 1 if start.step else None
            callback.tb_writer = self._writer = _writer_class()(
                log_dir=callback.logging_dir, purge_step=purge
            )
        return {}

    def arguments(self, tracker_id: str, start: TrackerStart) -> dict[str, Any]:
        """Of SummaryWriter; Accelerate names the folder."""
        self._folder, self._step = start.logging_dir, start.step
        return {"purge_step": start.step + 1} if start.step else {}

    def location(self, tracker_id: str) -> str:
        """The folder: two output folders may have event files in folders of one name."""
        return str(self._folder or tracker_id)

    def files(self, tracker_id: str) -> Path | None:
        """The folder, unless the user has given the callback a writer."""
        return self._folder

    def flush(self) -> None:
        """Its writer writes every two minutes by itself."""
        if self._writer is not None:
            self._writer.flush()

    def sent(self, tracker_id: str) -> TrackerContent:
        """The last step of each tag in the folder, where tensorboard itself is installed."""
        try:
            from tensorboard.backend.event_processing import event_file_loader
        except ImportError:
            return TrackerContent()
        last: dict[str, int] = {}
        for path in sorted(self._folder.glob("*tfevents*")) if self._folder else ():
            for event in event_file_loader.LegacyEventFileLoader(str(path)).Load():
                if (
                    event.session_log.status == event.session_log.START
                ):  # an attempt that resumed hid what came after
                    last = {tag: min(step, event.step - 1) for tag, step in last.items()}
                last |= {value.tag: event.step for value in event.summary.value}
        # The mark of this attempt may not be in its file yet.
        return TrackerContent({tag: min(step, self._step or step) for tag, step in last.items()})


def _writer_class() -> Any:
    try:
        module: Any = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        module = importlib.import_module("tensorboardX")
    return module.SummaryWriter
