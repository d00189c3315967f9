"""Feeds the step tracker from a Trainer's events: when steps begin and end, what is logged, what interrupts the steps."""

from __future__ import annotations

import os
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers import TrainerControl as Control
from transformers import TrainerState as State

from hf_cloudtrain.integrations.trainer.session import Session
from hf_cloudtrain.report import live
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.tracking.tracker import StepTracker


class StepTrackerCallback(TrainerCallback):
    """Tracks steps: time, rate, eta and what is logged, on storage. The first three arguments are those of `CloudTrainCallback`.

    Args:
        page: whether a page lives with the run: `index.html` beside it, renewed while it trains. None takes
            `HF_CLOUDTRAIN_PAGE`. Needs `hf_cloudtrain[report]`.

    Raises:
        MissingExtraError: a page is wanted, and its packages are not installed.
    """

    @short_traceback
    def __init__(
        self,
        run_url: str | os.PathLike[str] | None = None,
        *,
        storage_options: dict[str, Any] | None = None,
        fresh: bool = False,
        page: bool | None = None,
    ) -> None:
        self._session = Session.of(run_url, storage_options, fresh=fresh, page=live.is_wanted(page))
        self._session.tracks = True
        self._tracker: StepTracker | None = None

    @short_traceback
    def on_train_begin(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Start the heartbeat on rank 0."""
        self._tracker = self._session.begin(args, state).tracker

    def on_step_begin(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Note the time."""
        if self._tracker is not None:
            self._tracker.begin_step()

    def on_step_end(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Note the time."""
        if self._tracker is not None:
            self._tracker.end_step(state.global_step, state.num_input_tokens_seen)

    def on_evaluate(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """The time of an evaluation does not count as a step."""
        if self._tracker is not None:
            self._tracker.pause("evaluation")

    def on_log(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Note what is logged."""
        self._session.correct(state, kwargs.get("logs") or {})
        if self._tracker is not None:
            self._tracker.log(state.global_step, kwargs.get("logs") or {})

    def on_save(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """The time of a save does not count as a step; the records up to it are stored beside the checkpoint."""
        if self._tracker is not None:
            self._tracker.pause("save")
            self._tracker.flush_soon()

    @short_traceback
    def on_train_end(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Wait for the uploads, if there are any, and write the last records."""
        self._session.end()
