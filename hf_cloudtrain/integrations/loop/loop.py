"""The Accelerate loop: the Trainer callback's safety for people who write their own loop.

    epochs()    resume, take an attempt, and hand out the epochs that are left; at the end wait until all is committed
    steps()     hand out the batches that are left, count optimizer steps, save where a save is due
    end_epoch() best, log.json, and a checkpoint of the finished epoch

A save is Accelerate's own `save_state`, into a folder beside that is renamed when every rank has written
(`loop_folder.py`); the Checkpointer freezes it and uploads in the background. Every rank calls everything.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.checkpoints.start import Advice
from hf_cloudtrain.errors import CloudTrainError, ConfigurationError
from hf_cloudtrain.integrations.loop.folder import Cursor, LoopFolder, Resumed
from hf_cloudtrain.integrations.loop.log import number, train_bar
from hf_cloudtrain.integrations.loop.position import position, samples_per_step, total_steps
from hf_cloudtrain.integrations.loop.reporting import LoopReport, as_eval
from hf_cloudtrain.integrations.loop.state import LoopState, storable_args
from hf_cloudtrain.preemption.agreement import StopDecision
from hf_cloudtrain.preemption.preemption import Preemption, check_no_pending_notice
from hf_cloudtrain.resume.data_position import DataPosition
from hf_cloudtrain.resume.dataloaders import batch_size_of, leave, length
from hf_cloudtrain.resume.topology import check_same_topology
from hf_cloudtrain.runtime.tracebacks import short_traceback
from hf_cloudtrain.storage.urls import shown_url
from hf_cloudtrain.tracking.exit_record import Outcome, forget_end, outcome_of, record_end

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_END = object()
_ADVICE = Advice(
    resume="TrainLoop continues a run by itself; TrainLoop(accelerator, url, fresh=True) begins anew.",
    save="Iterate over loop.epochs() and loop.steps(dataloader): every epoch ends with a checkpoint.",
)


class TrainLoop:
    """A training loop on Accelerate that outlives its machine.

    Args:
        accelerator: after `prepare`: its models, optimizers and schedulers are what is saved.
        run_url: any fsspec URL or a folder that names the run; None takes `HF_CLOUDTRAIN_RUN_URL`.
        num_epochs: epochs in all, those of earlier attempts included.
        save_steps: optimizer steps between two checkpoints; besides, every epoch ends with one.
        output_dir: local folder of `last/`, `best/`, `log.json` and the newest checkpoint. Default: the accelerator's
            `project_dir`, else `HF_CLOUDTRAIN_CHECKPOINT_DIR`, else `output/<name of the run>`.
        processing_class: tokenizer, image processor or the like, saved beside the model.
        metric_for_best_model: key of the metrics given to `end_epoch` that decides which checkpoint is the best.
        greater_is_better: None: False where the metric's name ends in `loss`, else True.
        script_args: the script's arguments, as in `vars(args)`, noted in `training_state.json` without secrets.
        logging_steps: optimizer steps between two reports of what was logged.
        grace_seconds: time that this machine has after a notice that names none, such as SIGTERM; None takes
            `HF_CLOUDTRAIN_GRACE`, else 30. Under torchrun a signal never gives more than its `--shutdown-timeout`.
        storage_options: for fsspec; None takes `HF_CLOUDTRAIN_STORAGE_OPTIONS`.
        fresh: start at step 0 although the run has checkpoints. They stay, and rank below those of this attempt.
        save_total_limit: how many checkpoints stay on storage, the newest ones of the run; None keeps all. Beside them the
            best, the pinned, and the one that was resumed from stay.
        keep_every_n_steps: checkpoints of steps that are a multiple of this stay too.

    Raises:
        ConfigurationError: no run URL, or arguments that cannot work.

    Example:
        >>> loop = TrainLoop(accelerator, "s3://bucket/runs/mrpc", num_epochs=3, save_steps=100)
        >>> for epoch in loop.epochs():                       # begins where the last attempt stopped
        ...     for batch in loop.steps(train_dataloader):    # skips what was seen
        ...         with accelerator.accumulate(model):
        ...             loss = model(**batch).loss
        ...             accelerator.backward(loss)
        ...             optimizer.step(); lr_scheduler.step(); optimizer.zero_grad()
        ...         loop.log(loss=loss)
        ...     loop.end_epoch(evaluate(model, eval_dataloader))
    """

    @short_traceback
    def __init__(
        self,
        accelerator: Accelerator,
        run_url: str | None = None,
        *,
        num_epochs: int,
        save_steps: int | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        processing_class: Any = None,
        metric_for_best_model: str | None = None,
        greater_is_better: bool | None = None,
        script_args: dict[str, Any] | None = None,
        logging_steps: int = 10,
        grace_seconds: float | None = None,
        storage_options: dict[str, Any] | None = None,
        fresh: bool = False,
        save_total_limit: int | None = None,
        keep_every_n_steps: int | None = None,
    ) -> None:
        _check_arguments(num_epochs, save_steps, logging_steps)
        policy = Policy(save_total_limit, keep_every_n_steps)
        url = env.run_url(run_url)
        self.accelerator: Any = accelerator
        self.num_epochs = num_epochs
        self.save_steps = save_steps
        self.logging_steps = logging_steps
        folder = output_dir or accelerator.project_dir or env.checkpoint_dir(None) or _folder_of(url)
        self.output_dir = Path(folder).absolute()
        self._metric_for_best_model = metric_for_best_model
        self._greater_is_better = (
            not (metric_for_best_model or "").endswith("loss")
            if greater_is_better is None
            else greater_is_better
        )
        self._state = LoopState(script_args=storable_args(script_args))
        self._checkpointer = _checkpointer_of(url, self.output_dir, storage_options, fresh)
        self._checkpointer.policy = policy
        self._ranks = self._checkpointer.ranks
        self._folder = LoopFolder(accelerator, self._checkpointer, processing_class)
        self._report = LoopReport(accelerator, self._checkpointer, logging_steps)
        self._grace_seconds = grace_seconds
        self._preemption: Preemption | None = None
        self._leaving = False
        """Whether the save to come is the last thing that happens, because the machine goes."""
        self._place: DataPosition | None = None
        self._resumed: Resumed | None = None
        self._here: Cursor | None = None
        """Where a resume goes on, if that is not where the save is made."""
        self._looked_for_checkpoint = False
        self._training = False
        self._stopping = False
        self._save_asked = False
        self._epoch_over = self._inside_batch = self._epoch_saved = False

    @property
    def global_step(self) -> int:
        """Optimizer steps that are complete, those of earlier attempts included; within the body, the one before."""
        return self._state.step

    @property
    def epoch(self) -> int:
        """The epoch that is under way, or comes next; the first is 0."""
        return self._state.epoch

    @property
    def best_metric(self) -> float | None:
        """The best value of `metric_for_best_model` so far, on any machine."""
        return self._state.best_metric

    def resume(self) -> Path | None:
        """Set models, optimizers, schedulers and random states as the newest checkpoint of the run has them.

        `epochs` does it by itself; call it to know the position before.

        Returns:
            The local folder of the checkpoint; None on the first start.

        Raises:
            PositionError: its place cannot be found with the processes, batches and accumulation of today.
            ManifestError: it was not saved by a TrainLoop.
            CorruptCheckpointError: not one checkpoint of the run is whole.
        """
        if not self.accelerator._models:
            raise ConfigurationError(
                "Nothing is prepared yet: call accelerator.prepare(model, …) before the loop."
            )
        self._looked_for_checkpoint = True
        forget_end()
        self._resumed = self._folder.load()
        if self._resumed is None:
            if self.global_step:
                raise ConfigurationError(
                    f"Training was interrupted at step {self.global_step}, before the first checkpoint. Make the model, "
                    "the accelerator and the loop anew."
                )
            return None
        script_args, self._state = self._state.script_args, self._resumed.state
        self._state.script_args = script_args
        self._report.log.load_state_dict(self._state.sums)
        return self._checkpointer.local.folder(self._resumed.manifest)

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, each as its number.

        Raises:
            NotCommittedError: at the end, where the storage did not take the last checkpoint in time.
            PreemptedExit: from `steps` or `end_epoch`, after an emergency save: nothing after the training runs. It is a
                SystemExit with the code 75; in a notebook it is a PreemptedError.
            OvertakenError: a newer attempt of the run has begun, and it alone goes on.
        """
        if not self._looked_for_checkpoint:
            self.resume()
        # Whoever iterates again, after stop() or Ctrl-C in a notebook, goes on from a checkpoint: the middle of a step is none.
        self._looked_for_checkpoint = self._stopping = False
        if self.epoch >= self.num_epochs:
            self._warn(
                "The run is complete: %d of %d epochs. Nothing is trained.", self.epoch, self.num_epochs
            )
            self._ranks.agree(lambda: self._folder.complete(self._state), "bring the best checkpoint")
            return
        self._begin_attempt()
        while self.epoch < self.num_epochs and not self._stopping:
            self._reset_epoch()
            if self._resumed is not None and self._resumed.here.place is None:
                self._resumed.here.now.restore()  # saved between two epochs: goes on from there
            try:
                yield self.epoch
            except GeneratorExit:  # `break`, or an error in the body
                self._listen_no_more()
                self._report.close("stopped")
                raise
            if not self._epoch_saved:
                self._end_epoch({}, better=False)
            self._state.epoch += int(self._epoch_over)
        self._finish()

    def steps(self, dataloader: Any) -> Iterator[Any]:
        """The batches of this epoch that are left. One call an epoch, inside `epochs`.

        Random numbers that a data set draws in loader processes begin anew after a resume within an epoch; the order of the
        samples does not. Let augmentation depend on the sample's index and the epoch.

        Args:
            dataloader: the training loader, as `accelerator.prepare` made it.

        Raises:
            PositionError: the sampler's order or the batch size is not that of the checkpoint.
        """
        self._check_steps_inside_epochs()
        self._check_not_empty(length(dataloader))
        self._place = place = DataPosition(dataloader)
        resumed, self._resumed = self._resumed, None
        self._begin_place(place, resumed)
        self._report.start(
            self.global_step,
            total_steps(self.accelerator, dataloader, self.num_epochs),
            samples_per_step(self.accelerator, dataloader),
        )
        with place.watching(), self._bar("TRAIN", length(dataloader), place.batches) as bar:
            yield from self._batches(place, resumed is not None, bar)

    def eval_batches(self, dataloader: Any) -> Iterator[Any]:
        """The batches of an evaluation, with a bar. Its time is no step time."""
        self._report.pause("evaluation")
        with self._bar("VALID", length(dataloader), 0) as bar:
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
        """Ask for a checkpoint, on all ranks: at the end of this step, or of the next where only that is exact."""
        self._save_asked = True

    def stop(self) -> None:
        """End training after this step, or the next where only that is exact; between steps, after this epoch.

        Call it on all ranks. Another attempt goes on from there.
        """
        self._stopping = True

    def end_epoch(self, metrics: dict[str, Any] | None = None) -> None:
        """Save a checkpoint of the epoch that was just trained, with its metrics.

        Args:
            metrics: what the evaluation found; those of rank 0 count.

        Raises:
            ConfigurationError: `metric_for_best_model` is not among them.

        Example:
            >>> loop.end_epoch({"loss": 0.41, "accuracy": 0.86})
        """
        if not self._training:
            raise ConfigurationError("end_epoch() belongs inside `for epoch in loop.epochs()`.")
        if self._epoch_saved:
            raise ConfigurationError(f"end_epoch() was called twice in epoch {self.epoch}.")
        if self._here is not None and self._place is not None and _is_last(self._place):
            self._epoch_over = True  # stopped at its last step, and evaluated
        found = {name: number(value) for name, value in (metrics or {}).items()}
        found, better, problem = self._ranks.agree(lambda: self._judge(found), "find the best metric")
        self._end_epoch({name: value for name, value in found.items() if math.isfinite(value)}, better)
        if problem is not None:  # now that the epoch is saved
            raise ConfigurationError(problem)
        if self._preemption is not None and self.epoch + 1 < self.num_epochs:
            self._obey(self._preemption.decide_now())
            if self._leaving:
                self._leave()

    # One step

    def _batches(self, place: DataPosition, resumed: bool, bar: Any) -> Iterator[Any]:
        batches = iter(place.dataloader)
        self._read_away(place, batches)
        while True:
            asked = self._save_asked or self._stopping
            place.save_foreseen = asked or self._is_save_step(self.global_step + 1)
            try:
                batch = next(batches, _END)
            except Exception:
                if self._here is not None:
                    self._save({}, best=False)
                raise
            if resumed:
                place.settle()
                self._ranks.each(place.check_same_order, "find its place in the data")
                resumed = False
            place.check_same_order()
            # Accelerate 1.7 hands out one None where nothing is left.
            if batch is _END or (batch is None and place.batches == length(place.dataloader)):
                self._check_not_empty(place.batches)
                self._epoch_over = True
                return
            # Not before it is known that the epoch goes on: else its own checkpoint would be a second one of this step.
            if self._here is not None:
                self._save({}, best=False)
            self._report.begin_step()
            self._inside_batch = True
            try:
                yield batch
            except GeneratorExit:  # `break`, or an error in the body
                leave(place.dataloader)
                raise
            self._inside_batch = False
            place.batches += 1
            bar.update()
            if self.accelerator.sync_gradients:
                self._end_step(place, bar)
                if self._stops_here(place):
                    return

    def _end_step(self, place: DataPosition, bar: Any) -> None:
        self._state.step += 1
        self._report.end_step(self.global_step, bar)
        if self._preemption is not None and not self._leaving:
            # After an epoch's last step comes an evaluation of unknown length, so here the ranks wait for each other.
            ask = self._preemption.decide_now if _is_last(place) else self._preemption.step_ended
            self._obey(ask())
        planned = self._is_save_step(self.global_step)
        if planned or (self._save_asked and self._can_be_saved(place)):
            self._here = self._look(place)

    def _obey(self, order: StopDecision) -> None:
        """Save and leave as soon as that is exact, or quit at once."""
        preemption = self._preemption
        assert preemption is not None
        if order is StopDecision.QUIT:
            preemption.quit(self._report.close)
        if order is StopDecision.SAVE:
            preemption.announce(self.global_step)
            self._stopping = self._leaving = True

    def _leave(self) -> None:
        assert self._preemption is not None
        self._preemption.leave(self.global_step, self._report.close)

    def _can_be_saved(self, place: DataPosition) -> bool:
        """A save that nobody foresaw may lack numpy's state before the next fetch; then it comes a step later."""
        return all(self._ranks.each(place.can_be_saved, "look at its random states"))

    def _is_save_step(self, step: int) -> bool:
        return self.save_steps is not None and step % self.save_steps == 0

    def _stops_here(self, place: DataPosition) -> bool:
        """Whether this was the last step for now. A resume goes on from right here, not from after what may follow."""
        if not self._stopping or not (_is_last(place) or self._can_be_saved(place)):
            return False
        self._here = self._look(place)
        leave(place.dataloader)
        if self._leaving:
            self._save({}, best=False)
            self._leave()
        return True

    def _look(self, place: DataPosition) -> Cursor:
        """Where a resume goes on: right here."""
        here = Cursor.of(place, between_epochs=self._epoch_over)
        if self.accelerator.sync_gradients:
            return here
        reason = "the epoch ended within an accumulation, and its gradients are in no checkpoint"
        return dataclasses.replace(here, inexact_reason=reason)

    def _check_not_empty(self, batches: int | None) -> None:
        if batches == 0:
            raise ConfigurationError(
                f"The loader gives no batch in epoch {self.epoch}. Look at its data set, and at drop_last."
            )

    # The end of an epoch

    def _end_epoch(self, metrics: dict[str, float], better: bool) -> None:
        self._leave_steps()
        if better:
            name = self._best_name(metrics)
            assert name is not None
            self._state.best_metric, self._state.best_step = metrics[name], self.global_step
        self._report.evaluated(self.global_step, metrics)
        if self._epoch_over:  # else it was stopped within the epoch, and another attempt may finish it
            self._here = None
            self._report.close_epoch(self._state, metrics)
        self._save(metrics, best=better)
        self._epoch_saved = True

    def _leave_steps(self) -> None:
        """Count a batch that was left with `break`: whoever leaves the steps early ends the epoch there."""
        place = self._place
        if place is None:
            raise ConfigurationError(
                f"Epoch {self.epoch} took no step. Iterate over loop.steps(train_dataloader) inside the epoch."
            )
        if self._inside_batch:
            self._inside_batch = False
            self._epoch_over = True
            saved = self._checkpointer.last_saved
            again = saved is not None and saved.step == self.global_step  # one step cannot be saved as two
            self._state.step += int(self.accelerator.sync_gradients or again)
        self._report.pause()

    def _judge(self, metrics: dict[str, float]) -> tuple[dict[str, float], bool, str | None]:
        """The metrics, whether they are the best so far, and what is wrong with them."""
        wanted = self._metric_for_best_model
        if wanted is None:
            return metrics, False, None
        name = self._best_name(metrics)
        if name is None:
            near = difflib.get_close_matches(wanted, metrics, n=1, cutoff=0.0)
            hint = f"; the nearest is {near[0]!r}." if near else ", which are none."
            return (
                metrics,
                False,
                f"metric_for_best_model={wanted!r} is not among the metrics given to end_epoch{hint}",
            )
        value, best = metrics[name], self._state.best_metric
        if not math.isfinite(value):
            logger.warning("%s is %s in epoch %d, which is never the best.", name, value, self.epoch)
            return metrics, False, None
        better = best is None or (value > best if self._greater_is_better else value < best)
        return metrics, better, None

    def _best_name(self, metrics: dict[str, float]) -> str | None:
        wanted = str(self._metric_for_best_model)
        names = (wanted, f"eval_{wanted}", wanted.removeprefix("eval_"))
        return next((name for name in names if name in metrics), None)

    def _reset_epoch(self) -> None:
        self._place = None
        self._epoch_over = False
        """Whether all batches are trained on: what is saved now stands between two epochs."""
        self._inside_batch = False
        self._epoch_saved = False
        self._here = None

    def _save(self, metrics: dict[str, float], *, best: bool) -> None:
        import torch

        place, began = self._place, time.monotonic()
        assert place is not None
        self._report.pause("save")
        self._save_asked = False
        here, self._here = self._here or self._look(place), None
        attempt = self._checkpointer.attempt
        assert attempt is not None
        self._state.nonce = f"{attempt.nonce}-{self.global_step}"
        if best:
            self._state.best_nonce = self._state.nonce
        state = dataclasses.replace(
            self._state,
            epoch=self.epoch + int(self._epoch_over),
            batches=0 if self._epoch_over else place.batches,
            seed=torch.initial_seed(),
            sums=self._report.log.state_dict() if self._ranks.is_main else {},
        )
        self._folder.save(
            state,
            here,
            position(self.accelerator, state, place, self.num_epochs),
            metrics=as_eval(metrics),
            best=best,
        )
        self._report.saved()
        if self._preemption is not None:
            self._preemption.save_seconds = time.monotonic() - began

    def _finish(self) -> None:
        try:
            self._checkpointer.finish()
            self._ranks.agree(lambda: self._folder.complete(self._state), "bring the best checkpoint")
        except CloudTrainError as error:
            self._report.close("failed")
            record_end(self._checkpointer, outcome_of(error), str(error))
            raise
        finally:
            self._listen_no_more()  # not before: a signal must not cut off the last upload
        self._training = False
        state: Outcome = "finished" if self.epoch >= self.num_epochs else "stopped"
        self._report.close(state)
        record_end(self._checkpointer, state)

    # The attempt

    def _begin_attempt(self) -> None:
        check_no_pending_notice(self._checkpointer)
        self._checkpointer.begin(self.global_step)
        self._training = True
        self._leaving = False
        self._preemption = Preemption(self._checkpointer, grace=self._grace_seconds)
        self._preemption.start()

    def _listen_no_more(self) -> None:
        if self._preemption is not None:
            self._preemption.close()
            self._preemption = None

    # Position

    def _begin_place(self, place: DataPosition, resumed: Resumed | None) -> None:
        if resumed is None:
            place.begin(self.epoch)
            return
        here, saved = resumed.here, resumed.manifest
        now = Position(global_step=0, per_device_train_batch_size=batch_size_of(place.dataloader))
        check_same_topology(resumed.position, now, saved.folder)
        before, samples = saved.position.dataset_length, length(place.dataloader.dataset)
        if before is not None and before != samples:
            self._warn(
                "%s was saved when the training data had %s samples, and it has %s now.",
                saved.folder,
                before,
                samples,
            )
        place.seed = here.seed
        if here.place is None:
            place.restore_generators(here.now)
            place.begin(self.epoch)
        else:
            self._ranks.here(
                lambda: place.begin(self.epoch, here.place, here.now), "find its place in the data"
            )

    def _read_away(self, place: DataPosition, batches: Iterator[Any]) -> None:
        """Go to the place in a stream that cannot go there by itself."""
        if not place.to_read:
            return
        with self._bar("SKIP", place.to_read, 0) as bar:
            for _ in range(place.to_read):
                next(batches, None)
                bar.update()

    def _check_steps_inside_epochs(self) -> None:
        if not self._training:
            raise ConfigurationError("steps() belongs inside `for epoch in loop.epochs()`.")
        if self._place is not None:
            raise ConfigurationError(
                f"steps() was called twice in epoch {self.epoch}. Put both parts into one loader, or use two epochs."
            )

    def _bar(self, phase: str, total: int | None, done: int) -> Any:
        return train_bar(self.epoch, phase, total, done, hidden=not self._ranks.is_main)

    def _warn(self, text: str, *values: Any) -> None:
        if self._ranks.is_main:
            logger.warning(text, *values)


_checkpointers: dict[tuple[Any, ...], Checkpointer] = {}


def _checkpointer_of(
    url: str, output_dir: Path, storage_options: dict[str, Any] | None, fresh: bool
) -> Checkpointer:
    """One Checkpointer a run and process: in a notebook, a second loop finds what the first one has saved."""
    run = (shown_url(url), os.getpid())
    key = (*run, output_dir, fresh)
    if key not in _checkpointers:
        for other, checkpointer in _checkpointers.items():
            if other[:2] == run:
                checkpointer.finish_uploads()
        _checkpointers[key] = Checkpointer(
            url, output_dir, storage_options=storage_options, fresh=fresh, advice=_ADVICE
        )
    return _checkpointers[key]


def _folder_of(url: str) -> str:
    name = re.sub(r"[^\w.-]", "_", shown_url(url).rstrip("/").rpartition("/")[2]) or "run"
    return os.path.join("output", name)


def _check_arguments(num_epochs: int, save_steps: int | None, logging_steps: int) -> None:
    for name, value in (
        ("num_epochs", num_epochs),
        ("save_steps", save_steps),
        ("logging_steps", logging_steps),
    ):
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigurationError(f"{name}={value!r} is not a whole number above 0.")


def _is_last(place: DataPosition) -> bool:
    """Whether the batch that was just trained on is the epoch's last, as far as the loader knows."""
    if getattr(place.dataloader, "end_of_dataloader", False):
        return True
    return place.batches == length(place.dataloader)
