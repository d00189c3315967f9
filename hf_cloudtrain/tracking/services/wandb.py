"""Weights & Biases: any text may be an id; `resume="allow"` goes on with it, on any machine.

wandb reads its environment once a process (at `wandb.login()`, for example), so its run is started here with arguments, before
Trainer's callback looks whether one is active. Trainer's callback sends its own step as `train/global_step` and leaves W&B's to
count up, so W&B cannot drop a step that is sent again. A run that was deleted keeps its id: W&B refuses to start it.
"""

from __future__ import annotations

import os
import secrets
from typing import Any, ClassVar

from hf_cloudtrain.tracking.services.service import TrackerContent, TrackerService, TrackerStart

STEP = "train/global_step"
"""The metric in which Trainer's callbacks send the step."""


class WeightsAndBiases(TrackerService):
    """W&B, online and offline."""

    name = "wandb"
    trainer_callback = "WandbCallback"
    id_argument = "id"

    # By default W&B waits up to 90 s for its server.
    patience: ClassVar[dict[str, str]] = {"WANDB_INIT_TIMEOUT": "30"}

    def users_id(self, start: TrackerStart) -> str | None:
        """Of the run that the script has begun, else `WANDB_RUN_ID`."""
        import wandb

        if wandb.run is not None:
            return str(wandb.run.id)
        return os.environ.get("WANDB_RUN_ID") or None

    def new_id(self, start: TrackerStart) -> str:
        """Ids are unique within a project: 64 random bits."""
        return secrets.token_hex(8)

    def is_lost(self, error: Exception) -> bool:
        """W&B says "run … was previously created and deleted; try a new run name"."""
        return "deleted" in str(error)

    def environment(self, tracker_id: str) -> dict[str, str]:
        """For a `wandb.init` of the script."""
        return {"WANDB_RUN_ID": tracker_id, "WANDB_RESUME": os.environ.get("WANDB_RESUME", "allow")}

    def arguments(self, tracker_id: str, start: TrackerStart) -> dict[str, Any]:
        """Of `wandb.init`."""
        return {"id": tracker_id, "resume": os.environ.get("WANDB_RESUME", "allow")}

    def before_start(self, callback: Any, args: Any, tracker_id: str, start: TrackerStart) -> dict[str, str]:
        """Start the run as Trainer's callback does, with its id."""
        import wandb

        if wandb.run is None:
            named = {} if start.run_name is None else {"name": start.run_name}
            project = os.environ.get("WANDB_PROJECT", "huggingface")
            wandb.init(project=project, **named, **self.arguments(tracker_id, start))
        return {}

    def sent(self, tracker_id: str) -> TrackerContent:
        """The summary, which comes back with a resumed run, has the last value of each metric.

        Accelerate's tracker has no metric for the step: it sends W&B's own, which W&B goes on with.
        """
        import wandb

        if wandb.run is None:
            return TrackerContent()
        summary = dict(wandb.run.summary)
        step = summary.get(STEP, wandb.run.starting_step - 1)
        return TrackerContent(last=int(step) if isinstance(step, (int, float)) else -1, values=summary)

    def page(self, tracker_id: str) -> str | None:
        """None offline."""
        import wandb

        return None if wandb.run is None else wandb.run.url

    def follows(self, previous: str, reason: str) -> None:
        """In the config of the run."""
        import wandb

        if wandb.run is not None:
            wandb.run.config.update({"cloudtrain_follows": previous}, allow_val_change=True)

    def flush(self) -> None:
        """End the run as one that was preempted."""
        import wandb

        if wandb.run is not None:
            wandb.run.mark_preempting()
            wandb.run.finish(exit_code=1)
