"""What a callback notices of a training, event by event, so that a save can say whether a resume from it is exact.

on_init_end     which model is made: a restored checkpoint of a different one is refused
on_epoch_begin  a pass over the data begins
on_step_begin   the batches of the step are fetched
on_step_end     from here on until a fetch ends, only the data draws random numbers; the same after a log, an evaluation, a save
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers import TrainerControl as Control
from transformers import TrainerState as State

from hf_cloudtrain.integrations.trainer.exactness import Evidence, calling_trainer
from hf_cloudtrain.integrations.trainer.position import EpochLength
from hf_cloudtrain.integrations.trainer.reports import join_reports
from hf_cloudtrain.integrations.trainer.session import Session
from hf_cloudtrain.runtime.tracebacks import short_traceback


class EvidenceCallback(TrainerCallback):
    """The part of `CheckpointUploadCallback` that watches. It changes nothing that training depends on."""

    _session: Session
    _epoch: EpochLength
    _evidence: Evidence | None = None

    @short_traceback
    def on_init_end(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Note the model that a checkpoint must have, and let trackers go on."""
        trainer = calling_trainer()
        self._session.identity.met(trainer)
        self._let_trackers_go_on(trainer)

    def gather(self, args: TrainingArguments, state: State, live: dict[str, Any]) -> None:
        """Begin to watch a training, whose attempt has begun.

        Args:
            live: what Trainer passes to callbacks.
        """
        trainer = calling_trainer()
        self._session.identity.met(trainer)
        self._let_trackers_go_on(trainer)  # those that were added since
        checkpointer = self._session.checkpointer
        if checkpointer.attempt is not None:
            checkpointer.attempt.trained.update(self._session.identity.facts(args))
        if self._evidence is not None:
            self._evidence.close()
        self._evidence = Evidence(checkpointer, args, state, self._epoch, live, trainer=trainer, ours=self)

    def on_epoch_begin(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Count the passes over the data."""
        if self._evidence is not None:
            self._evidence.epoch_began(state)

    def on_step_begin(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """The fetches are over."""
        if self._evidence is not None:
            self._evidence.step_began()

    def on_step_end(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """The fetches begin, unless something else comes first."""
        if self._evidence is not None:
            self._evidence.step_ended()

    def on_log(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """A log is not part of a fetch."""
        if self._evidence is not None:
            self._evidence.ended("on_log")

    def on_prediction_step(
        self, args: TrainingArguments, state: State, control: Control, **kwargs: Any
    ) -> None:
        """The loader processes of an evaluation have started."""
        if self._evidence is not None:
            self._evidence.predicted(kwargs.get("eval_dataloader"))

    def on_evaluate(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """An evaluation is not part of a fetch."""
        if self._evidence is not None:
            self._evidence.ended("on_evaluate")

    def on_train_end(self, args: TrainingArguments, state: State, control: Control, **kwargs: Any) -> None:
        """Put back what was replaced to watch."""
        if self._evidence is not None:
            self._evidence.close()

    def _let_trackers_go_on(self, trainer: Any) -> None:
        if trainer is not None:
            join_reports(self._session, trainer.callback_handler.callbacks)
