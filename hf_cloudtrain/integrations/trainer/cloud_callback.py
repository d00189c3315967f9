"""CloudTrainCallback: uploads, step tracking and emergency saves of a Trainer in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hf_cloudtrain.integrations.trainer.callbacks import CheckpointUploadCallback
from hf_cloudtrain.integrations.trainer.emergency import EmergencySaveCallback
from hf_cloudtrain.integrations.trainer.step_callback import StepTrackerCallback
from hf_cloudtrain.runtime.tracebacks import short_traceback


class CloudTrainCallback(TrainerCallback):
    """Everything in one line: steps tracked, checkpoints uploaded, saves on SIGTERM, and `restore` for the next machine.

    Args:
        run_url: any fsspec URL or a folder that names the run; None takes `HF_CLOUDTRAIN_RUN_URL`.
        storage_options: for fsspec; None takes `HF_CLOUDTRAIN_STORAGE_OPTIONS`.
        fresh: start at step 0 although the run has checkpoints. They stay, and rank below those of this attempt.
        grace_seconds: see `EmergencySaveCallback`.
        save_interval_seconds: see `EmergencySaveCallback`.
        save_overhead: see `EmergencySaveCallback`.
        save_total_limit: how many checkpoints stay on storage, the newest ones of the run; None keeps all. In addition the
            best, the pinned, and the one that was resumed from stay. `TrainingArguments.save_total_limit` is about this disk.
        keep_every_n_steps: checkpoints of steps that are a multiple of this stay too.
        async_save: whether training waits for one copy in memory only, and a process of its own writes the files. None takes
            `HF_CLOUDTRAIN_ASYNC_SAVE`, else where a checkpoint has 64 MB or more. See `docs/async-save.md`.
        page: see `StepTrackerCallback`.

    Raises:
        ConfigurationError: no run URL, or a configuration that would never save.

    Example:
        >>> cloud = CloudTrainCallback("s3://bucket/runs/mrpc")
        >>> trainer = Trainer(model=model, args=args, train_dataset=train, callbacks=[cloud])
        >>> trainer.train(resume_from_checkpoint=cloud.restore(args))
    """

    @short_traceback
    def __init__(
        self,
        run_url: str | os.PathLike[str] | None = None,
        *,
        storage_options: dict[str, Any] | None = None,
        fresh: bool = False,
        grace_seconds: float | None = None,
        save_total_limit: int | None = None,
        keep_every_n_steps: int | None = None,
        async_save: bool | None = None,
        save_interval_seconds: float | None = None,
        save_overhead: float | None = None,
        page: bool | None = None,
    ) -> None:
        common: Any = {"storage_options": storage_options, "fresh": fresh}
        self._uploads = CheckpointUploadCallback(
            run_url,
            save_total_limit=save_total_limit,
            keep_every_n_steps=keep_every_n_steps,
            async_save=async_save,
            **common,
        )
        steps = StepTrackerCallback(run_url, page=page, **common)
        emergency = EmergencySaveCallback(
            run_url,
            grace_seconds=grace_seconds,
            save_interval_seconds=save_interval_seconds,
            save_overhead=save_overhead,
            **common,
        )
        self._parts: tuple[TrainerCallback, ...] = (self._uploads, steps, emergency)

    def restore(self, args: TrainingArguments) -> str | None:
        """See `CheckpointUploadCallback.restore`."""
        return self._uploads.restore(args)

    def wait(self, timeout: float | None = None) -> None:
        """See `CheckpointUploadCallback.wait`."""
        self._uploads.wait(timeout)

    def save(self, folder: str | os.PathLike[str], name: str) -> str:
        """See `CheckpointUploadCallback.save`."""
        return self._uploads.save(folder, name)


def _to_all_parts(event: str) -> Callable[..., None]:
    def forward(self: CloudTrainCallback, *args: Any, **kwargs: Any) -> None:
        # What begins first ends last: an emergency decides before the others look at what Trainer is about to do. A save is
        # frozen before the tracker wakes its thread, which would take turns with the training.
        forwards = event in ("on_train_begin", "on_save")
        for part in self._parts if forwards else reversed(self._parts):
            getattr(part, event)(*args, **kwargs)

    return forward


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(CloudTrainCallback, _event, _to_all_parts(_event))
