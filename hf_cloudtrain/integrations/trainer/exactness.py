"""Whether a resume from a Trainer's checkpoint equals an uninterrupted run, from all that was seen of the training.

    the settings   save_only_model, ignore_data_skip, callbacks that start over      (arguments, `position.EpochLength`)
    the trainer    its class was tested, or not                                      (`known_trainers`)
    the data       random numbers that a fetch draws; passes over a stream           (`resume.fetch_witness`)
    outside        callbacks, data, modules and a loss that keep state               (`outside_state`)

Each finding is an `Exactness`; the strongest of all ranks is recorded.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.exactness import EXACT, Exactness, safely, strongest
from hf_cloudtrain.integrations.trainer import known_trainers
from hf_cloudtrain.integrations.trainer.outside_state import OutsideState
from hf_cloudtrain.integrations.trainer.position import EpochLength
from hf_cloudtrain.integrations.trainer.worker_seeds import WorkerSeeds
from hf_cloudtrain.resume.dataloaders import draw_no_seed, is_seeded, reads_here, tell_epoch
from hf_cloudtrain.resume.fetch_witness import EVENTS, IN_WORKERS, FetchWitness

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

UNSEEN = Exactness.not_verified("no batch was seen while it was fetched, so fetches may draw random numbers")
UNWATCHED = Exactness.not_verified(
    "the data is not read by a DataLoader of torch, so what it draws is unseen"
)
UNSEEDED = Exactness.not_verified(
    "the stream is shuffled or mixed without a seed, so each start has another order"
)
_USUAL = 0.5
"""Share of fetches that draw random numbers, below which a background thread of another library may have drawn them."""


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
        self._evaluated = False
        """Whether an evaluation came after the step that is over."""
        self._uneven: str | None = None
        self._witness: FetchWitness | None = None
        self._outside: OutsideState | None = None
        self._unlooked = EXACT
        """Why there is no `_outside`, if that failed."""
        dataloader = live.get("train_dataloader")
        self._reads = dataloader is not None and reads_here(dataloader)
        base = getattr(dataloader, "base_dataloader", dataloader)
        self._workers = getattr(base, "num_workers", 0)
        self._persistent = bool(getattr(base, "persistent_workers", False))
        if self._reads:
            self._witness = FetchWitness(dataloader)
            if self._resumed and self._persistent:
                draw_no_seed(base)
        self._evaluations = None
        if self._resumed and args.dataloader_persistent_workers and _has_evaluated(state):
            self._evaluations = WorkerSeeds()
        self._is_seeded = is_seeded(getattr(trainer, "train_dataset", None))
        self._exported = self._now_exported()
        """As the script made them, and makes them again."""
        self._others = _others_who_may_draw(trainer, ours)
        self._savers = _savers_before(trainer, ours)

    def epoch_began(self, state: TrainerState) -> None:
        """Count a pass over the data."""
        dataloader = self._live.get("train_dataloader")
        if self._resumed and dataloader is not None:
            tell_epoch(dataloader, int(state.epoch or 0))
        steps = self._epoch.steps(self._args.gradient_accumulation_steps)
        if self._passes and steps and state.global_step % steps:
            self._uneven = f"an epoch ended at step {state.global_step}, and a resume takes epochs to be {steps} steps long"
        self._passes += 1
        self._pass_ended = False
        if self._witness is not None:
            self._witness.step_began()  # the seed of the workers and the order are drawn next

    def step_began(self) -> None:
        """The batches of the step are fetched."""
        if self._outside is None and self._trainer is not None and self._unlooked.exact:
            self._unlooked = safely(self._look_outside)
        if self._witness is not None:
            self._witness.step_began()

    def _look_outside(self) -> Exactness:
        self._outside = OutsideState(self._trainer, self._live)
        return EXACT

    def step_ended(self) -> None:
        """What follows, until a batch is fetched, is not part of the step."""
        if self._epoch.batches is None:
            self._pass_ended, self._evaluated = _stream_ended(), False
        self.ended("on_step_end")

    def ended(self, event: str) -> None:
        """Nothing but the data draws random numbers from here on, or a callback of the same event."""
        self._evaluated |= event == "on_evaluate"
        if self._witness is not None:
            self._witness.ended(event)
        if self._evaluations is not None:
            self._evaluations.note()

    def predicted(self, dataloader: Any) -> None:
        """A batch of an evaluation was fetched."""
        if self._evaluations is not None:
            self._evaluations.undo(dataloader)

    def at_save(
        self, state: TrainerState, known: str | None = None, staged: dict[str, set[str]] | None = None
    ) -> Exactness:
        """What is recorded with the save of this step: the strongest finding of all ranks, which have written their files then.

        Args:
            known: why this save in particular cannot be resumed exactly.
            staged: names of the tensors in files that are not written yet, by path.
        """
        found = Exactness.no(known) if known else EXACT
        found &= safely(lambda: self._seen(state, staged or {}))
        self.ended("on_save")
        return strongest(found, self.checkpointer.ranks)

    def _seen(self, state: TrainerState, staged: dict[str, set[str]]) -> Exactness:
        found = self._of_settings(state)
        if self._trainer is None:
            found &= Exactness.not_verified("the Trainer that calls the callback was not found")
        else:
            found &= known_trainers.of_trainer(self._args, self._trainer)
        found &= self._of_data(state) & self._unlooked
        if self._outside is not None:
            folder = self.checkpointer.output_dir / f"checkpoint-{state.global_step}"
            found &= self._outside.at_save(folder, staged)
        return found

    def close(self) -> None:
        """Put back what was replaced to watch the data."""
        self._evaluations = None
        if self._witness is not None:
            self._witness.close()

    def _of_settings(self, state: TrainerState) -> Exactness:
        args, steps = self._args, self._epoch.steps(self._args.gradient_accumulation_steps)
        if args.save_only_model:
            return Exactness.no(
                "save_only_model=True leaves out the optimizer, the scheduler and the random states"
            )
        if args.ignore_data_skip and not (steps and state.global_step % steps == 0):
            return Exactness.no("ignore_data_skip=True starts the epoch's data again")
        starts_over = [
            name for name, before in self._exported.items() if before != self._now_exported().get(name)
        ]
        if starts_over and not args.restore_callback_states_from_checkpoint:
            return Exactness.no(
                f"{', '.join(starts_over)} starts over unless restore_callback_states_from_checkpoint=True"
            )
        return self._epoch.exactness(state, args.gradient_accumulation_steps)

    def _now_exported(self) -> dict[str, str]:
        """The states of callbacks that say theirs, by class."""
        from transformers.trainer_callback import ExportableState

        callbacks = [] if self._trainer is None else self._trainer.callback_handler.callbacks
        found: dict[str, str] = {}
        for one in callbacks:
            if isinstance(one, ExportableState):
                found[type(one).__name__] = found.get(type(one).__name__, "") + repr(one.state())
        return found

    def _of_data(self, state: TrainerState) -> Exactness:
        is_whole = self._epoch.is_whole(state.global_step, self._args.gradient_accumulation_steps)
        found = EXACT
        if self._uneven:
            found = found & Exactness.no(self._uneven)
        if self._epoch.batches is None:
            is_whole = self._pass_ended
            if is_whole and self._evaluated and self._args.eval_strategy == "epoch":
                found &= Exactness.no(
                    "Trainer evaluates at the end of this pass, and once more after a resume from here"
                )
            if not self._is_seeded:
                found &= UNSEEDED
            if self._passes > 1:
                found = found & Exactness.no(
                    f"the stream was read {self._passes - 1} time{'s' * (self._passes > 2)} before, and a resume counts its "
                    "steps from the beginning of the first pass"
                )
        return found if self._witness is None else found & self._of_fetches(self._witness, is_whole=is_whole)

    def _of_fetches(self, witness: FetchWitness, *, is_whole: bool) -> Exactness:
        found = self._of_callbacks_at_save(witness)
        if not witness.can_watch:
            return found & UNWATCHED
        if is_whole and not (self._workers and self._persistent):
            # A resume begins the next epoch with the random states of the save.
            return found & (EXACT if self._outside is None else self._outside.of_code(at_epoch_end=True))
        seen = self._of_workers(witness, is_whole=is_whole) if self._workers else self._of_draws(witness)
        if seen.exact and self._outside is not None:
            seen = self._outside.of_code(at_epoch_end=False)
        return found & seen

    def _of_callbacks_at_save(self, witness: FetchWitness) -> Exactness:
        """Whether a callback draws random numbers when a save is over, and so after they were saved."""
        names = (
            self._others["on_save"]
            if witness.after("on_save").share and not self._data_draws(witness)
            else []
        )
        alone = not any(self._others[event] for event in EVENTS if event != "on_save")
        if self._savers and alone and witness.has_changed:
            names = self._savers  # called before ours
        if not names:
            return EXACT
        return Exactness.no(
            f"the callback {names[0]} draws random numbers after a save, and a resume does not draw them"
        )

    def _of_workers(self, witness: FetchWitness, *, is_whole: bool) -> Exactness:
        drawn = witness.after(None)
        if drawn.share and self._epoch.batches is None:
            return Exactness.not_verified("the loader processes draw random numbers for the batches")
        if drawn.share:
            return self._unless_seeded(
                "the loader processes draw random numbers for the batches, and a resume starts them again from new seeds"
            )
        if name := witness.changes_in_workers:
            return Exactness.not_verified(IN_WORKERS.format(name=name))
        return EXACT if drawn.watched or is_whole else UNSEEN

    def _of_draws(self, witness: FetchWitness) -> Exactness:
        share = self._data_draws(witness)
        if share is None:
            doubtful = next((event for event in EVENTS if witness.after(event).share), None)
            if doubtful is None:
                return UNSEEN
            return Exactness.not_verified(
                f"random numbers are drawn between steps, by the data or by the callback {self._others[doubtful][0]}"
            )
        if not share:
            return EXACT
        if share < _USUAL and not witness.last_drew:
            return Exactness.not_verified("random numbers were drawn now and then as batches were fetched")
        return self._unless_seeded(
            "random numbers are drawn as batches are fetched, ahead of the step, so the batches differ after a resume"
        )

    def _unless_seeded(self, reason: str) -> Exactness:
        seeds = None if self._outside is None else self._outside.seeds()
        if seeds is None:
            return Exactness.no(reason)
        return Exactness.not_verified(f"{seeds} seeds random numbers as batches are fetched")

    def _data_draws(self, witness: FetchWitness) -> float | None:
        """Share of the fetches that draw, where no callback can have done it; None where there was no such fetch."""
        seen = [witness.after(None), *(witness.after(event) for event in EVENTS if not self._others[event])]
        return max((drawn.share for drawn in seen if drawn.watched), default=None)


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


def _others_who_may_draw(trainer: Any, ours: Any) -> dict[str, list[str]]:
    """Callbacks that are called between our look at the random states and the fetch, and that are not known; by event."""
    from transformers import TrainerCallback

    found: dict[str, list[str]] = {event: [] for event in EVENTS}
    for callback in reversed([] if trainer is None else trainer.callback_handler.callbacks):
        if callback is ours or ours in getattr(callback, "_parts", ()):
            break
        kind = type(callback)
        if known_trainers.class_name(callback).startswith(("transformers.", "hf_cloudtrain.")):
            continue
        for event in EVENTS:
            if getattr(kind, event) is not getattr(TrainerCallback, event):
                found[event].append(kind.__name__)
    return found


def _savers_before(trainer: Any, ours: Any) -> list[str]:
    """Callbacks that are told of a save before ours is, and that are not known."""
    from transformers import TrainerCallback

    found = []
    for callback in [] if trainer is None else trainer.callback_handler.callbacks:
        if callback is ours or ours in getattr(callback, "_parts", ()):
            break
        known = known_trainers.class_name(callback).startswith(("transformers.", "hf_cloudtrain."))
        if not known and type(callback).on_save is not TrainerCallback.on_save:
            found.append(type(callback).__name__)
    return found


def _has_evaluated(state: TrainerState) -> bool:
    return any(name.startswith("eval_") for record in state.log_history for name in record)


def _stream_ended() -> bool:
    from accelerate.state import GradientState

    return bool(GradientState().end_of_dataloader)
