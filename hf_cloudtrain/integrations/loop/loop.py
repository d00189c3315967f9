"""TrainLoop: the safety of the Trainer callbacks for people who write their own loop with Accelerate.

    epochs()    resume, take an attempt, and yield the epochs that are left; at the end wait until all is committed
    steps()     yield the batches that are left, count optimizer steps, save where a save is due (`steps.py`)
    end_epoch() best, log.json, and a checkpoint of the finished epoch

A save is Accelerate's own `save_state`, into a folder beside that is renamed when every rank has written (`folder.py`); the
Checkpointer freezes it and uploads in the background. Every rank calls everything.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.attempt_checks import Advice
from hf_cloudtrain.checkpoints.attempts import Attempt
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.integrations.loop.complete import end_run, is_complete
from hf_cloudtrain.integrations.loop.folder import LoopFolder, Resumed
from hf_cloudtrain.integrations.loop.reporting import LoopReport, number, saves
from hf_cloudtrain.integrations.loop.state import (
    BestMetric,
    LogFormat,
    LoopState,
    check_log_format,
    storable_args,
)
from hf_cloudtrain.integrations.loop.steps import EpochSteps, LoopRun
from hf_cloudtrain.integrations.loop.trackers import TrackedLoop
from hf_cloudtrain.integrations.messages import expect_use
from hf_cloudtrain.preemption.save_clock import SaveClock
from hf_cloudtrain.report import live
from hf_cloudtrain.resume.dataloaders import length
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.storage.urls import shown_url
from hf_cloudtrain.tracking.exit_record import outcome_of

if TYPE_CHECKING:
    from accelerate import Accelerator

_ADVICE = Advice(
    resume="TrainLoop continues a run by itself; TrainLoop(accelerator, url, fresh=True) starts over.",
    save="Iterate over loop.epochs() and loop.steps(dataloader): every epoch ends with a checkpoint.",
)


class TrainLoop(TrackedLoop):
    """A training loop on Accelerate that survives the loss of its machine.

    Args:
        accelerator: after `prepare`: its models, optimizers and schedulers are what is saved.
        run_url: any fsspec URL or a folder that names the run; None takes `HF_CLOUDTRAIN_RUN_URL`.
        num_epochs: epochs in all, including those of earlier attempts.
        save_steps: optimizer steps between two checkpoints; in addition, every epoch ends with one.
        output_dir: local folder of `last/`, `best/`, `log.json` and the newest checkpoint. Default: the accelerator's
            `project_dir`, else `HF_CLOUDTRAIN_CHECKPOINT_DIR`, else `output/<name of the run>`.
        processing_class: tokenizer, image processor or the like, saved beside the model.
        metric_for_best_model: key of the metrics given to `end_epoch` that decides which checkpoint is the best.
        greater_is_better: None: False where the metric's name ends in `loss`, else True.
        script_args: the script's arguments, as in `vars(args)`, recorded in `training_state.json` without secrets.
        logging_steps: optimizer steps between two reports of what was logged.
        log_format: of `log.json` in a new run; a run keeps its own. `records` is a list with one record an epoch, `epochs` is
            `{"Epoch 0": {"train_log": …, "valid_log": …}}`.
        grace_seconds: see `EmergencySaveCallback`.
        save_interval_seconds: see `EmergencySaveCallback`.
        save_overhead: see `EmergencySaveCallback`.
        storage_options: for fsspec; None takes `HF_CLOUDTRAIN_STORAGE_OPTIONS`.
        fresh: start at step 0 although the run has checkpoints. They stay, and rank below those of this attempt.
        save_total_limit: how many checkpoints stay on storage, the newest ones of the run; None keeps all. In addition the
            best, the pinned, and the one that was resumed from stay.
        keep_every_n_steps: checkpoints of steps that are a multiple of this stay too.
        async_save: whether a process of its own writes the files; None takes `HF_CLOUDTRAIN_ASYNC_SAVE`, else where it is worth it.
        page: see `StepTrackerCallback`.

    Raises:
        ConfigurationError: no run URL, or arguments that cannot work.

    Example:
        >>> loop = TrainLoop(accelerator, "s3://bucket/runs/mrpc", num_epochs=3, save_steps=100,
        ...                  processing_class=tokenizer, metric_for_best_model="loss")
        >>> for epoch in loop.epochs():                       # begins where the last attempt stopped
        ...     for batch in loop.steps(train_dataloader):    # skips what was seen
        ...         with accelerator.accumulate(model):
        ...             loss = model(**batch).loss
        ...             accelerator.backward(loss)
        ...             optimizer.step(); lr_scheduler.step(); optimizer.zero_grad()
        ...         loop.log(loss=loss)
        ...     loop.end_epoch(evaluate(model, eval_dataloader))  # keeps best/ and last/
    """

    @short_traceback
    def __init__(
        self,
        accelerator: Accelerator,
        run_url: str | os.PathLike[str] | None = None,
        *,
        num_epochs: int,
        save_steps: int | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        processing_class: Any = None,
        metric_for_best_model: str | None = None,
        greater_is_better: bool | None = None,
        script_args: dict[str, Any] | None = None,
        logging_steps: int = 10,
        log_format: LogFormat = "records",
        grace_seconds: float | None = None,
        storage_options: dict[str, Any] | None = None,
        fresh: bool = False,
        save_total_limit: int | None = None,
        keep_every_n_steps: int | None = None,
        async_save: bool | None = None,
        save_interval_seconds: float | None = None,
        save_overhead: float | None = None,
        page: bool | None = None,
    ) -> None:
        check_log_format(log_format)
        _check_arguments(num_epochs=num_epochs, save_steps=save_steps, logging_steps=logging_steps)
        policy = Policy(save_total_limit, keep_every_n_steps)
        url = env.run_url(run_url)
        expect_use(url, "Iterate over the loop: `for epoch in loop.epochs()`.")
        self.accelerator: Any = accelerator
        self.num_epochs, self.save_steps, self.logging_steps = num_epochs, save_steps, logging_steps
        folder = output_dir or accelerator.project_dir or env.checkpoint_dir(None) or _folder_of(url)
        self.output_dir = Path(folder).absolute()
        self._best = BestMetric.of(metric_for_best_model, greater_is_better=greater_is_better)
        self._lifecycle = AttemptLifecycle.of(
            url, self.output_dir, storage_options=storage_options, fresh=fresh, advice=_ADVICE
        )
        self._checkpointer = self._lifecycle.checkpointer
        self._checkpointer.policy, self._lifecycle.has_page = policy, live.is_wanted(page)
        self._folder = LoopFolder(accelerator, self._lifecycle, processing_class, async_save)
        self._report = LoopReport(accelerator, self._lifecycle, logging_steps)
        state = LoopState(script_args=storable_args(script_args), log_format=log_format)
        self._run = LoopRun(accelerator, self._lifecycle, self._folder, self._report, state, num_epochs)
        self._grace_seconds, self._clock = grace_seconds, SaveClock.of(save_interval_seconds, save_overhead)
        self._resumed: Resumed | None = None
        self._looked_for_checkpoint = self._epoch_saved = False
        self._complete = False
        """Whether the run is over where training was stopped."""
        self._steps: EpochSteps | None = None
        """Of the epoch under way; None before and after training."""

    @property
    def global_step(self) -> int:
        """Optimizer steps that are complete, including those of earlier attempts; within the body, the one before."""
        return self._run.state.step

    @property
    def epoch(self) -> int:
        """The epoch that is under way, or comes next; the first is 0."""
        return self._run.state.epoch

    @property
    def batch_index(self) -> int:
        """The index within the epoch of the batch in the body, or of the next one; the first is 0.

        A resume continues it. Where not every batch ends with an optimizer step, let the step depend on it:

        Example:
            >>> if loop.batch_index % 4 == 3:
            ...     optimizer.step(); optimizer.zero_grad()
        """
        self._run.optimizers.index_is_used = True
        if self._steps is not None and self._steps.position is not None:
            return 0 if self._steps.is_over else self._steps.position.batches
        return 0 if self._resumed is None else self._resumed.state.batches

    @property
    def best_metric(self) -> float | None:
        """The best value of `metric_for_best_model` so far, on any machine."""
        return self._run.state.best_metric

    @short_traceback
    def resume(self) -> Path | None:
        """Set models, optimizers, schedulers and random states as the newest checkpoint of the run has them.

        `epochs` does it by itself; call it to know the position before.

        Returns:
            The local folder of the checkpoint; None on the first start.

        Raises:
            PositionError: its position cannot be converted to the new number of processes, batch size or accumulation.
            ManifestError: it was not saved by a TrainLoop.
            CorruptCheckpointError: all checkpoints of the run are damaged.
        """
        if not self.accelerator._models:
            raise ConfigurationError(
                "Nothing is prepared yet: call accelerator.prepare(model, …) before the loop."
            )
        self._looked_for_checkpoint = True
        self._resumed = self._folder.load()
        if self._resumed is None:
            if self.global_step:
                raise ConfigurationError(
                    f"Training was interrupted at step {self.global_step}, before the first checkpoint. Recreate the model, "
                    "Accelerator and TrainLoop."
                )
            return None
        self._resumed.state.script_args = self._run.state.script_args
        self._run.state = self._resumed.state
        self._report.log.load_state_dict(self._run.state.sums)
        return self._checkpointer.local.folder(self._resumed.manifest)

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, each as its number.

        Raises:
            NotCommittedError: at the end, where the storage did not take the last checkpoint in time.
            PreemptedExit: from `steps` or `end_epoch`, after an emergency save: nothing after the training runs. It is a
                SystemExit with the code 75; in a notebook it is a PreemptedError.
            OvertakenError: a newer attempt of the run has begun, and only that one may write.
        """
        if not self._looked_for_checkpoint:
            self.resume()
        # A second iteration, after stop() or Ctrl-C in a notebook, continues from a checkpoint, not in the middle of a step.
        self._looked_for_checkpoint = self._run.stop_requested = self._complete = False
        if is_complete(self._lifecycle, self.epoch, self.num_epochs):
            self._complete_folder()
            return
        attempt = self._lifecycle.begin(self.global_step, saves=saves(self.save_steps, self._clock))
        with _interrupted(self._run, attempt):
            self._run.begin(self._resumed)
            self._lifecycle.listen(grace=self._grace_seconds, clock=self._clock)
        while self.epoch < self.num_epochs and not self._run.stop_requested:
            with _interrupted(self._run, attempt):
                self._steps = steps = EpochSteps(self._run, save_steps=self.save_steps)
                self._epoch_saved = False
                self._run.optimizers.watch()
                if self._resumed is not None and self._resumed.cursor.position is None:
                    self._resumed.cursor.random_state.restore()  # saved between two epochs: continues from there
                yield self.epoch
            if not self._epoch_saved:
                self._end_epoch(steps, {}, better=False)
            self._run.state.epoch += int(steps.is_over)
        self._run.optimizers.close()
        complete = self._complete and not self._lifecycle.has_notice()
        is_over = complete or self.epoch >= self.num_epochs
        with _interrupted(self._run, attempt):
            self._lifecycle.finish("finished" if is_over else "stopped", then=self._complete_folder)
        if complete:
            end_run(self._checkpointer, self.global_step, self.num_epochs)
        self._steps = None

    def steps(self, dataloader: Any) -> Iterator[Any]:
        """The batches of this epoch that are left. One call an epoch, inside `epochs`.

        Random numbers that a dataset draws in loader processes start over after a resume within an epoch; the order of the
        samples does not. Let augmentation depend on the sample's index and the epoch.

        Args:
            dataloader: the training loader, as returned by `accelerator.prepare`.

        Raises:
            PositionError: the sampler's order or the batch size is not that of the checkpoint.
        """
        if self._steps is None:
            raise ConfigurationError("steps() belongs inside `for epoch in loop.epochs()`.")
        self._steps.check_may_iterate(dataloader)
        resumed, self._resumed = self._resumed, None
        yield from self._steps.iterate(dataloader, resumed)

    def eval_batches(self, dataloader: Any) -> Iterator[Any]:
        """The batches of an evaluation, with a bar. Its time does not count as step time."""
        self._report.pause("evaluation")
        self._run.evaluates(dataloader)
        with self._run.bar("VALID", length(dataloader)) as bar:
            for batch in dataloader:
                yield batch
                bar.update()

    def log(self, **values: Any) -> None:
        """Note numbers or tensors of this step. Tensors stay on their device until the next report.

        Reports are means over `logging_steps`, of the main process: on the bar, in the run's records, and in the
        accelerator's trackers under the step that they belong to; those of an epoch are in `log.json`.

        Example:
            >>> loop.log(loss=loss)
        """
        self._report.log.add(values)

    def save(self) -> None:
        """Request a checkpoint, on all ranks: at the end of this step, or of the next where only that is exact."""
        self._run.save_requested = True

    def stop(self, *, complete: bool = False) -> None:
        """End training after this step, or the next where only that is exact; between steps, after this epoch.

        Call it on all ranks. The next attempt continues from there.

        Args:
            complete: the run is over, as with early stopping: the next attempt trains nothing, unless more epochs are planned.
        """
        self._run.stop_requested, self._complete = True, complete

    @short_traceback
    def end_epoch(self, metrics: dict[str, Any] | None = None) -> None:
        """Save a checkpoint of the epoch that was just trained, with its metrics.

        Args:
            metrics: of the evaluation; those of rank 0 count.

        Raises:
            ConfigurationError: `metric_for_best_model` is not among them.

        Example:
            >>> loop.end_epoch({"loss": 0.41, "accuracy": 0.86})
        """
        steps, state, lifecycle = self._steps, self._run.state, self._lifecycle
        if steps is None:
            raise ConfigurationError("end_epoch() belongs inside `for epoch in loop.epochs()`.")
        if self._epoch_saved:
            raise ConfigurationError(f"end_epoch() was called twice in epoch {self.epoch}.")
        if steps.cursor is not None and steps.is_at_last_batch:
            steps.is_over = True  # stopped at its last step, and evaluated
        given = {name: number(value) for name, value in (metrics or {}).items()}
        found, (better, problem) = self._run.ranks.agree(
            lambda: (given, self._best.judge(given, state)), "find the best metric"
        )
        finite = {name: value for name, value in found.items() if math.isfinite(value)}
        self._end_epoch(steps, finite, better=better)
        if problem is not None:  # now that the epoch is saved
            raise ConfigurationError(problem)
        if self.epoch + 1 < self.num_epochs and lifecycle.must_stop(now=True):
            lifecycle.announce(self.global_step)
            self._run.stop_requested = True
        if self.epoch + 1 < self.num_epochs and lifecycle.is_leaving:
            lifecycle.leave(self.global_step)

    def _end_epoch(self, steps: EpochSteps, metrics: dict[str, float], *, better: bool) -> None:
        steps.leave()
        state = self._run.state
        if better:
            state.best_metric, state.best_step = self._best.value_in(metrics), state.step
        self._report.evaluated(state.step, metrics)
        if steps.is_over:  # else it was stopped within the epoch, and the next attempt may finish it
            steps.cursor = None
            self._report.close_epoch(state, metrics)
        steps.save(metrics, best=better)
        self._epoch_saved = True

    def _complete_folder(self) -> None:
        self._folder.complete(self._run.state)


@contextlib.contextmanager
def _interrupted(run: LoopRun, attempt: Attempt) -> Iterator[None]:
    """Stop what runs in the background after an error, Ctrl-C, or what closes `epochs`: `break`, or an error in the body."""
    try:
        yield
    except (Exception, KeyboardInterrupt, GeneratorExit) as error:
        run.optimizers.close()
        run.lifecycle.interrupt(attempt, outcome_of(error))
        raise


def _folder_of(url: str) -> str:
    name = re.sub(r"[^\w.-]", "_", shown_url(url).rstrip("/").rpartition("/")[2]) or "run"
    return os.path.join("output", name)


def _check_arguments(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigurationError(f"{name}={value!r} must be a positive integer.")
