"""TODO docstring."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.integrations.trainer.session import Session
from hf_cloudtrain.integrations.trainer.state import (
    step_samples,
)
from hf_cloudtrain.tracking.tracker import StepTracker


class StepTrackerCallback(TrainerCallback):
    """Tracks steps: time, rate, eta and what is logged, on storage. The first three arguments are those of `CloudTrainCallback`."""

    def __init__(
        self,
        run_url: str | None = None,
        *,
        storage_options: dict[str, Any] | None = None,
        fresh: bool = False,
    ) -> None:
        self._session = Session.of(run_url, storage_options, fresh=fresh)
        self._tracker: StepTracker | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the heartbeat on rank 0."""
        attempt = self._session.begin(args, state)
        if self._tracker is not None:
            self._tracker.close("failed")
            self._tracker = None
        checkpointer = self._session.opened()
        if checkpointer.ranks.is_main:
            self._tracker = StepTracker(
                checkpointer.catalog,
                attempt,
                first_step=state.global_step,
                total_steps=state.max_steps,
                samples_per_step=step_samples(args, state),
                uploads=checkpointer.uploads,
                ownership=checkpointer.ownership,
            )
            self._tracker.start()
            self._session.close_tracker = self._tracker.close

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time."""
        if self._tracker is not None:
            self._tracker.begin_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time."""
        if self._tracker is not None:
            self._tracker.end_step(state.global_step, state.num_input_tokens_seen)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation is no step time."""
        if self._tracker is not None:
            self._tracker.pause("evaluation")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what is logged."""
        if self._tracker is not None:
            self._tracker.log(state.global_step, kwargs.get("logs") or {})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A save is no step time; the records up to it are stored beside it."""
        if self._tracker is not None:
            self._tracker.pause("save")
            self._tracker.flush_soon()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the last records, after the uploads are done."""
        if self._session.is_leaving:
            return  # whoever cut the training short says how it ended
        try:
            self._session.end()
        except CloudTrainError:
            if self._tracker is not None:
                self._tracker.close("failed")
            raise
        if self._tracker is not None:
            self._tracker.close("finished")
