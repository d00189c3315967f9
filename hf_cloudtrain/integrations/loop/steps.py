"""The steps of one epoch: they hand out batches, count optimizer steps, and save where a save is due.

A save is exact only where the random states before the next fetch are known. One that was not planned (`save`, `stop`, a notice)
may therefore come a step later than it was requested.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness, safely, strongest
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations.lifecycle import AttemptLifecycle
from hf_cloudtrain.integrations.loop.data_evidence import DataEvidence
from hf_cloudtrain.integrations.loop.folder import Cursor, LoopFolder, Resumed
from hf_cloudtrain.integrations.loop.reporting import LoopReport, as_eval
from hf_cloudtrain.integrations.loop.state import LoopState
from hf_cloudtrain.integrations.loop.topology import position, samples_per_step, total_steps
from hf_cloudtrain.resume.data_position import DataPosition
from hf_cloudtrain.resume.dataloaders import (
    batch_size_of,
    draw_no_seed,
    drop_first_iterator,
    leave,
    length,
)
from hf_cloudtrain.resume.optimizer_steps import OptimizerSteps
from hf_cloudtrain.resume.outside_state import OutsideState
from hf_cloudtrain.resume.topology import check_same_topology
from hf_cloudtrain.runtime.ranks import Ranks

logger = logging.getLogger(__name__)

_END = object()


@dataclass
class LoopRun:
    """What the parts of a loop share."""

    accelerator: Any
    lifecycle: AttemptLifecycle
    folder: LoopFolder
    report: LoopReport
    state: LoopState
    num_epochs: int
    save_requested: bool = False
    stop_requested: bool = False
    total_steps: int | None = None
    """Optimizer steps of the whole training, as far as it is known."""

    def __post_init__(self) -> None:
        self.optimizers = OptimizerSteps(self.accelerator)
        self.outside = OutsideState(self.accelerator)
        self.data = DataEvidence(self.accelerator)
        self.unseen = EXACT
        """Why something was not looked at, if that failed."""

    def begin_to_look(self, dataloader: Any) -> Exactness:
        """An epoch begins to iterate this DataLoader, and what may change from here on is looked at."""
        self.outside.begin()
        self.data.begin(dataloader)
        return EXACT

    @property
    def ranks(self) -> Ranks:
        """The processes of this training."""
        return self.lifecycle.checkpointer.ranks

    def begin(self, resumed: Resumed | None) -> None:
        """An attempt begins: set what `load_state` of Accelerate does not."""
        self.folder.begin()
        if resumed is not None:
            self.optimizers.load_gradients(resumed.cursor.gradients)
        for loader in self.accelerator._dataloaders:
            drop_first_iterator(getattr(loader, "base_dataloader", loader))

    def evaluates(self, loader: Any) -> None:
        """A loader of evaluations is about to be read: it draws nothing from the random states of the training."""
        base = getattr(loader, "base_dataloader", loader)
        if getattr(base, "persistent_workers", False) and base._iterator is None:
            draw_no_seed(base)

    def bar(self, phase: str, total: int | None, done: int = 0) -> Any:
        """A progress bar of this epoch, on the main process."""
        return self.report.bar(self.state.epoch, phase, total, done)


class EpochSteps:
    """The steps of one epoch."""

    def __init__(self, run: LoopRun, *, save_steps: int | None) -> None:
        self.position: DataPosition | None = None
        """In the loader; None until `iterate`."""
        self.cursor: Cursor | None = None
        """Where a resume continues, if that is not where the save is made."""
        self.is_over = False
        """Whether all batches are trained on: what is saved now is between two epochs."""
        self._run = run
        self._save_steps = save_steps
        self._length: int | None = None
        """Of the loader, where it is known. Through Accelerate and torch it takes 1.5 us to ask, at each step."""
        self._inside_batch = False
        self._postponed = False
        """Whether a save was due at a step that may turn out to be the epoch's last."""

    def check_may_iterate(self, dataloader: Any) -> None:
        """Raise ConfigurationError for a second iteration in this epoch, and for a DataLoader without batches."""
        if self.position is not None:
            epoch = self._run.state.epoch
            raise ConfigurationError(
                f"steps() was called twice in epoch {epoch}. Use one DataLoader for both parts, or two epochs."
            )
        self._check_not_empty(length(dataloader))

    def iterate(self, dataloader: Any, resumed: Resumed | None) -> Iterator[Any]:
        """The batches that are left, as `TrainLoop.steps` has them."""
        run = self._run
        self.position = position = DataPosition(dataloader)
        self._begin(position, resumed)
        self._length = length(dataloader)
        run.optimizers.begin_epoch(position.batches, resumed=position.batches > 0)
        run.total_steps = total_steps(run.accelerator, dataloader, run.num_epochs)
        run.report.expect(run.total_steps, samples_per_step(run.accelerator, dataloader))
        run.unseen &= safely(lambda: run.begin_to_look(dataloader))
        for loader in run.accelerator._dataloaders:
            if loader is not dataloader:
                run.evaluates(loader)
        with position.watching(), run.bar("TRAIN", self._length, position.batches) as bar:
            yield from self._batches(position, resumed is not None, bar)

    def leave(self) -> None:
        """Count a batch that was left with `break`: a script that leaves the steps early ends the epoch there."""
        run = self._run
        if self.position is None:
            raise ConfigurationError(
                f"Epoch {run.state.epoch} took no step. Iterate over loop.steps(train_dataloader) inside the epoch."
            )
        is_new_step = run.optimizers.take_late_step()
        self.is_over |= self._inside_batch
        self._inside_batch = False
        saved = run.lifecycle.checkpointer.last_saved
        again = saved is not None and saved.step == run.state.step  # one step cannot be saved as two
        run.state.step += int(is_new_step or (again and self.is_over and self.cursor is None))
        run.report.pause()

    @property
    def is_at_last_batch(self) -> bool:
        """Whether the batch that was just trained on is the epoch's last, as far as the loader knows."""
        position = self.position
        if position is None:
            return False
        if getattr(position.dataloader, "end_of_dataloader", False):
            return True
        return position.batches == self._length

    def save(self, metrics: dict[str, float] | None = None, *, best: bool = False) -> None:
        """Save a checkpoint of where `cursor` points, else of where the training is now."""
        import torch

        run, attempt, began = self._run, self._run.lifecycle.checkpointer.attempt, time.monotonic()
        assert self.position is not None
        assert attempt is not None
        run.report.pause("save")
        run.save_requested = False
        cursor, self.cursor = self.cursor or self._here(), None
        run.state.nonce = f"{attempt.nonce}-{run.state.step}"
        if best:
            run.state.best_nonce = run.state.nonce
        state = dataclasses.replace(
            run.state,
            epoch=run.state.epoch + int(self.is_over),
            batches=0 if self.is_over else self.position.batches,
            seed=torch.initial_seed(),
            sums=run.report.log.state_dict() if run.ranks.is_main else {},
        )
        where = position(run.accelerator, state, self.position, run.num_epochs, run.total_steps)
        found = cursor.exactness & run.unseen & safely(run.outside.look)
        found &= safely(lambda: run.data.look(between_epochs=self.is_over))
        cursor = dataclasses.replace(cursor, exactness=strongest(found, run.ranks))
        last = run.stop_requested or state.epoch >= run.num_epochs
        run.folder.save(state, cursor, where, metrics=as_eval(metrics or {}), best=best, last=last)
        run.report.saved()
        run.lifecycle.saved(time.monotonic() - began)

    def _here(self) -> Cursor:
        assert self.position is not None
        cursor, optimizers = Cursor.of(self.position, between_epochs=self.is_over), self._run.optimizers
        gradients, exactness = optimizers.pending_gradients()
        exactness &= optimizers.exactness(between_epochs=self.is_over, batches=self._length)
        return dataclasses.replace(cursor, exactness=cursor.exactness & exactness, gradients=gradients)

    def _batches(self, position: DataPosition, resumed: bool, bar: Any) -> Iterator[Any]:
        run = self._run
        batches = iter(position.dataloader)
        self._discard(position, batches)
        while True:
            requested = run.save_requested or run.stop_requested
            position.save_foreseen = requested or self._is_save_step(run.state.step + 1)
            try:
                batch = next(batches, _END)
            except Exception:
                self._save_pending()
                raise
            if resumed:
                position.settle()
                run.ranks.each(position.check_same_order, "find its position in the data")
                resumed = False
            position.check_same_order()
            # Accelerate 1.7 yields one None where nothing is left.
            if batch is _END or (batch is None and position.batches == self._length):
                self._check_not_empty(position.batches)
                self.is_over = True
                return
            # Not before it is known that the epoch continues: else its own checkpoint would be a second one of this step.
            self._save_pending()
            run.report.begin_step()
            self._inside_batch = True
            run.optimizers.begin_batch()
            try:
                yield batch
            except GeneratorExit:  # `break`, or an error in the body
                leave(position.dataloader)
                raise
            self._inside_batch = False
            position.batches += 1
            bar.update()
            if run.optimizers.end_batch():
                self._end_step(position, bar)
                if self._stops_here(position):
                    return

    def _end_step(self, position: DataPosition, bar: Any) -> None:
        run = self._run
        run.state.step += 1
        self._count_ahead(position)
        run.report.end_step(run.state.step, bar)
        # After an epoch's last step comes an evaluation of unknown length, so there the ranks wait for each other.
        if run.lifecycle.must_stop(now=self.is_at_last_batch):
            run.lifecycle.announce(run.state.step)
            run.stop_requested = True
        run.save_requested |= run.lifecycle.save_is_due
        requested = run.save_requested and self._can_be_saved(position)
        due = requested or self._postponed or self._is_save_step(run.state.step)
        # Where it is the epoch's last step, the epoch's own checkpoint would be a second one of this step.
        self._postponed = due and run.optimizers.ends_with_epoch(position.batches, self._length)
        if due and not self._postponed:
            self.cursor = self._here()

    def _count_ahead(self, position: DataPosition) -> None:
        """Correct the number of steps in all, where the script accumulates gradients itself."""
        run = self._run
        epochs_left = run.num_epochs - 1 - run.state.epoch
        found = run.optimizers.total(run.state.step, position.batches, self._length, epochs_left)
        if found is None or found == run.total_steps:
            return
        run.total_steps = found
        samples = samples_per_step(run.accelerator, position.dataloader)
        run.report.expect(found, samples and samples * run.optimizers.batches_per_step)

    def _stops_here(self, position: DataPosition) -> bool:
        """Whether this was the last step for now. A resume continues from this step, not from what follows it."""
        if not self._run.stop_requested or not (self.is_at_last_batch or self._can_be_saved(position)):
            return False
        self.cursor = self._here()
        leave(position.dataloader)
        if self._run.lifecycle.is_leaving:
            self.save()
            self._run.lifecycle.leave(self._run.state.step)
        return True

    def _is_save_step(self, step: int) -> bool:
        return self._save_steps is not None and step % self._save_steps == 0

    def _can_be_saved(self, position: DataPosition) -> bool:
        """An unplanned save may lack the host's random states before the next fetch; then it comes a step later."""
        return all(self._run.ranks.each(position.can_be_saved, "look at its random states"))

    def _save_pending(self) -> None:
        if self.cursor is not None:
            self.save()

    def _begin(self, position: DataPosition, resumed: Resumed | None) -> None:
        epoch = self._run.state.epoch
        if resumed is None:
            position.begin(epoch)
            return
        cursor, saved = resumed.cursor, resumed.manifest
        now = Position(global_step=0, per_device_train_batch_size=batch_size_of(position.dataloader))
        check_same_topology(resumed.topology, now, saved.folder)
        before, samples = saved.position.dataset_length, length(position.dataloader.dataset)
        if before is not None and before != samples and self._run.ranks.is_main:
            logger.warning(
                "%s was saved when the training dataset had %s samples; it has %s samples now.",
                saved.folder,
                before,
                samples,
            )
        position.seed = cursor.seed
        if cursor.position is None:
            position.restore_generators(cursor.random_state)
            position.begin(epoch)
        else:
            self._run.ranks.here(
                lambda: position.begin(epoch, cursor.position, cursor.random_state),
                "find its position in the data",
            )

    def _discard(self, position: DataPosition, batches: Iterator[Any]) -> None:
        """Read the batches of a stream that were seen, where it cannot be set to a position."""
        if not position.to_read:
            return
        with self._run.bar("SKIP", position.to_read) as bar:
            for _ in range(position.to_read):
                next(batches, None)
                bar.update()

    def _check_not_empty(self, batches: int | None) -> None:
        if batches == 0:
            raise ConfigurationError(
                f"The DataLoader yielded no batches in epoch {self._run.state.epoch}. Check the dataset size and drop_last."
            )
