"""Whether a resume from a Trainer's checkpoint equals an uninterrupted run, from all that was seen of the training.

    by settings    save_only_model, ignore_data_skip, callbacks that start over      (`position.EpochLength`, arguments)
    the trainer    its class was tested, or not                                      (`known_trainers`)
    the data       random numbers that a fetch draws; passes over a stream           (`resume.fetch_witness`)
    outside        callbacks, data, modules and a loss that keep state               (`outside_state`)

Each finding is an `Exactness`; the strongest of all ranks is recorded.
"""

from __future__ import annotations

import functools
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness
from hf_cloudtrain.integrations.trainer import known_trainers
from hf_cloudtrain.integrations.trainer.outside_state import OutsideState
from hf_cloudtrain.integrations.trainer.position import EpochLength
from hf_cloudtrain.resume.dataloaders import reads_here
from hf_cloudtrain.resume.fetch_witness import FetchWitness
from hf_cloudtrain.runtime.ranks import Ranks

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

_EVENTS_BETWEEN = ("on_step_end", "on_log", "on_evaluate", "on_save")
_USUAL = 0.5
"""Share of fetches that draw random numbers, below which a background thread of another library may have drawn them."""
_SEVERITY = {True: 0.0, None: 1.0, False: 2.0}


class Evidence:
    """What was seen of one training in this process.

    Args:
        live: what Trainer passes to callbacks.
        trainer: None if it was not found.
        ours: the callback that notices the events.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        args: TrainingArguments,
        state: TrainerState,
        epoch: EpochLength,
        live: dict[str, Any],
        *,
        trainer: Any = None,
        ours: Any = None,
    ) -> None:
        self.checkpointer = checkpointer
        """That saves the checkpoints."""
        self._args = args
        self._epoch = epoch
        self._trainer = trainer
        self._live = live
        self._resumed = state.global_step > 0
        self._passes = 0
        self._pass_ended = False
        """Whether the step that is over was the last of its pass."""
        self._uneven: str | None = None
        self._witness: FetchWitness | None = None
        self._outside: OutsideState | None = None
        dataloader = live.get("train_dataloader")
        self._reads = dataloader is not None and reads_here(dataloader)
        base = getattr(dataloader, "base_dataloader", dataloader)
        self._workers = getattr(base, "num_workers", 0)
        self._persistent = bool(getattr(base, "persistent_workers", False))
        if self._reads:
            self._witness = FetchWitness(dataloader)
            if self._resumed and self._persistent:
                _draw_no_seed_for_workers(base)
        self._others = [] if trainer is None else _others_who_may_draw(trainer, ours)

    def epoch_began(self, state: TrainerState) -> None:
        """Count a pass over the data."""
        steps = self._epoch.steps(self._args.gradient_accumulation_steps)
        if self._passes and steps and state.global_step % steps:
            self._uneven = f"an epoch ended at step {state.global_step}, and a resume takes epochs to be {steps} steps long"
        self._passes += 1
        self._pass_ended = False
        if self._witness is not None:
            self._witness.step_began()  # the seed of the workers and the order are drawn next

    def step_began(self) -> None:
        """The batches of the step are fetched."""
        if self._outside is None and self._trainer is not None:
            self._outside = OutsideState(self._trainer, self._live)
        if self._witness is not None:
            self._witness.step_began()

    def step_ended(self) -> None:
        """What follows, until a batch is fetched, is no part of the step."""
        if self._epoch.batches is None:
            self._pass_ended = _stream_ended()
        self.waits_for_data()

    def waits_for_data(self) -> None:
        """A log, an evaluation or a save is over as well."""
        if self._witness is not None:
            self._witness.step_ended()

    def at_save(self, state: TrainerState, known: str | None = None) -> Exactness:
        """What is recorded with the save of this step: the strongest finding of all ranks, which have written their files then.

        Args:
            known: why this save in particular cannot be resumed exactly.
        """
        found = Exactness.no(known) if known else EXACT
        found = found & by_settings(self._args, state, self._epoch)
        if self._trainer is None:
            found = found & Exactness.not_verified("the Trainer that calls the callback was not found")
        else:
            found = found & known_trainers.of_trainer(self._args, self._trainer)
        found = found & self._of_data(state)
        if self._outside is not None:
            found = found & self._outside.at_save()
        self.waits_for_data()  # what a save draws is no concern of the data
        return strongest(found, self.checkpointer.ranks)

    def close(self) -> None:
        """Put back what was replaced to watch the data."""
        if self._witness is not None:
            self._witness.close()

    def _of_data(self, state: TrainerState) -> Exactness:
        is_whole = self._epoch.is_whole(state.global_step, self._args.gradient_accumulation_steps)
        found = EXACT
        if self._uneven:
            found = found & Exactness.no(self._uneven)
        if self._epoch.batches is None:
            is_whole = self._pass_ended
            if self._passes > 1:
                found = found & Exactness.no(
                    f"the stream was read {self._passes - 1} time{'s' * (self._passes > 2)} before, and a resume counts its "
                    "steps from the beginning of the first pass"
                )
        return found if self._witness is None else found & self._of_fetches(self._witness, is_whole=is_whole)

    def _of_fetches(self, witness: FetchWitness, *, is_whole: bool) -> Exactness:
        if is_whole and not (self._workers and self._persistent):
            return EXACT  # a resume begins the next epoch with the random states of the save
        if not witness.can_watch:
            return Exactness.not_verified(
                "the data is not read by a DataLoader of torch, so its random numbers are unseen"
            )
        drawn = witness.drawn
        if not drawn.watched and not is_whole:
            return Exactness.not_verified(
                "no batch was seen while it was fetched, so it may draw random numbers"
            )
        if not drawn.surely and not drawn.perhaps:
            return EXACT
        if self._workers:
            return Exactness.no(
                "workers draw random numbers for the batches, and a resume starts the workers again from new seeds"
            )
        if self._others and not drawn.surely:
            return Exactness.not_verified(
                f"random numbers are drawn between steps, by the data or by the callback {self._others[0]}"
            )
        if max(drawn.surely, drawn.perhaps) < _USUAL:
            return Exactness.not_verified("random numbers were drawn now and then as batches were fetched")
        return Exactness.no(
            "random numbers are drawn as batches are fetched, ahead of the step, so the batches differ after a resume"
        )


def by_settings(args: TrainingArguments, state: TrainerState, epoch: EpochLength) -> Exactness:
    """What arguments and the order of the data decide."""
    steps = epoch.steps(args.gradient_accumulation_steps)
    if args.save_only_model:
        return Exactness.no(
            "save_only_model=True leaves out the optimizer, the scheduler and the random states"
        )
    if args.ignore_data_skip:
        return Exactness.no("ignore_data_skip=True starts the epoch's data again")
    stateful = sorted({str(name) for name in state.stateful_callbacks or ()} - {"TrainerControl"})
    if stateful and not args.restore_callback_states_from_checkpoint:
        return Exactness.no(
            f"{', '.join(stateful)} starts over unless restore_callback_states_from_checkpoint=True"
        )
    if epoch.drawn_each_epoch and steps and state.global_step > steps and state.global_step % steps:
        return Exactness.no(
            "the order of the data is drawn from the random states at the beginning of each epoch, which are not saved, so "
            "some samples of this epoch are repeated and others are skipped"
        )
    return EXACT


def strongest(found: Exactness, ranks: Ranks) -> Exactness:
    """The strongest finding of all ranks, on all ranks; also a barrier."""
    mine = _SEVERITY[found.exact]
    worst, main = ranks.begin_largest([mine, mine if ranks.is_main else -1.0]).result()
    if worst == main:
        return found  # of rank 0, which writes the manifest
    return functools.reduce(Exactness.__and__, ranks.each(lambda: found, "say whether a resume is exact"))


def calling_trainer() -> Any:
    """The transformers.Trainer that calls the callback which calls this: callbacks do not receive it. None without one."""
    from transformers import Trainer

    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    return None


def _others_who_may_draw(trainer: Any, ours: Any) -> list[str]:
    """Callbacks that are called between our look at the random states and the fetch, and that are not known."""
    from transformers import TrainerCallback

    found: list[str] = []
    for callback in reversed(trainer.callback_handler.callbacks):
        if callback is ours or ours in getattr(callback, "_parts", ()):
            break
        kind = type(callback)
        if known_trainers.class_name(callback).startswith(("transformers.", "hf_cloudtrain.")):
            continue
        if any(getattr(kind, event) is not getattr(TrainerCallback, event) for event in _EVENTS_BETWEEN):
            found.append(kind.__name__)
    return found


def _draw_no_seed_for_workers(base: Any) -> None:
    """Leave torch's random state alone when the workers start, as in the run that started them in its first epoch.

    A loader with persistent workers draws a seed for them once. A resumed run starts them again, after the random states
    were restored.
    """
    import torch

    if base.generator is None:
        base.generator = torch.Generator()


def _stream_ended() -> bool:
    from accelerate.state import GradientState

    return bool(GradientState().end_of_dataloader)
