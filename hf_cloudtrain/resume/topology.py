"""A checkpoint's position under a new world size, batch size or gradient accumulation (law 8).

Frameworks compute the position in the dataset from the step number alone: if a step has a different size than before, they
skip or repeat data and still finish "successfully". The number of samples seen stays true. Every sampler draws one order, and
processes, batches and accumulation only cut it into pieces, so the position after the same samples is a different step. If no
new step ends there, the resume stops with an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.errors import PositionError

_WORDS = {
    "world_size": "processes",
    "per_device_train_batch_size": "samples per batch and process",
    "gradient_accumulation_steps": "batches per optimizer step",
}


@dataclass(frozen=True)
class Epoch:
    """One epoch, cut into optimizer steps.

    Example:
        >>> Epoch(samples=22, steps=3, step_samples=8).samples_at(4)       # 22, and 8 of the second epoch
        30
    """

    samples: int
    steps: int
    """Optimizer steps; the last one may be short."""
    step_samples: int
    """Samples of all processes in one optimizer step."""

    @classmethod
    def of(cls, samples: int, batches: int, *, batch: int, accumulation: int, processes: int) -> Epoch:
        """The epoch of a DataLoader with so many batches, of `batch` samples, for each process."""
        # At least one step, as in Trainer.set_initial_training_values.
        return cls(samples, max(math.ceil(batches / accumulation), 1), batch * accumulation * processes)

    def samples_at(self, step: int) -> int:
        """Samples seen after that many optimizer steps."""
        epochs, into = divmod(step, self.steps)
        return epochs * self.samples + min(into * self.step_samples, self.samples)

    def step_at(self, samples_seen: int) -> int | None:
        """The step that ends after so many samples; None if none does."""
        return None if samples_seen % self.samples % self.step_samples else self.step_by(samples_seen)

    def step_by(self, samples_seen: int) -> int:
        """The last step that ends after so many samples or fewer."""
        epochs, into = divmod(samples_seen, self.samples)
        return epochs * self.steps + min(into // self.step_samples, self.steps)

    def step_from(self, samples_seen: int) -> int:
        """The first step that ends after so many samples or more."""
        epochs, into = divmod(samples_seen, self.samples)
        return epochs * self.steps + min(math.ceil(into / self.step_samples), self.steps)


@dataclass(frozen=True)
class Conversion:
    """A position in the dataset and the schedule, in old steps and in new ones.

    Example:
        >>> conversion = convert(manifest.position, now, Epoch(22, 3, 8), "checkpoint-4")
        >>> conversion.global_step
        2
    """

    saved: Position
    now: Position
    """The new settings: what decides how many samples a step has."""
    old: Epoch
    new: Epoch
    global_step: int
    """The position in new steps."""
    what: str
    """The checkpoint, for messages."""

    @property
    def is_renumbered(self) -> bool:
        """Whether step N now corresponds to a different position: then old and new step numbers must not be mixed."""
        return (self.old.steps, self.old.step_samples) != (self.new.steps, self.new.step_samples)

    @property
    def changes(self) -> str:
        """The differences, for messages."""
        return "; ".join(_changes(self.saved, self.now))

    @property
    def samples_into_epoch(self) -> int:
        """Samples of the current epoch that were seen."""
        return (self.saved.samples_seen or 0) % self.new.samples

    @property
    def has_same_batches(self) -> bool:
        """Whether each rank gets the same batches as before, so that only the accumulation differs."""
        return not {"world_size", "per_device_train_batch_size"} & set(_changed(self.saved, self.now))

    def refusal(self, why: str) -> PositionError:
        """The error for a conversion that is found impossible later: the differences, the reason, and what to do."""
        return refusal(self.saved, self.now, self.what, why)

    def story(self, *, derived: bool) -> str:
        """What was converted and what is not exact any more, for the log; `derived`: random states for new ranks."""
        derivation = (
            ", and ranks that the checkpoint does not have start with derived random states"
            if derived
            else ""
        )
        return (
            f"{self.what}: {self.changes}. Step {self.saved.global_step} under the old settings is step {self.global_step} "
            f"under the new ones ({self.saved.samples_seen} samples seen). The resumed run will not equal an uninterrupted "
            f"one: random numbers are drawn for different batches{derivation}."
        )

    def step_of(self, step: int) -> int:
        """The new step that ends where the old one did, or the last one before that."""
        return self.new.step_by(self.old.samples_at(step))

    @property
    def max_steps(self) -> int | None:
        """Length of the schedule in new steps: as many samples as before, rounded up to a whole step."""
        if self.saved.max_steps is None:
            return None
        return self.new.step_from(self.old.samples_at(self.saved.max_steps))


def batches_per_epoch(samples: int, batch: int, processes: int, *, drop_last: bool) -> int:
    """Batches of each process in one epoch, as Accelerate distributes them (`BatchSamplerShard.__len__`)."""
    if drop_last:
        return samples // batch // processes
    return math.ceil(math.ceil(samples / batch) / processes)


def same_topology(saved: Position, now: Position) -> bool:
    """Whether a step has the same size as before, as far as both sides know."""
    return not _changed(saved, now)


def convert(saved: Position, now: Position, new: Epoch | None, what: str) -> Conversion:
    """The position after the same samples, in new steps.

    Args:
        now: the new settings.
        new: an epoch under the new settings; None if its length is unknown.
        what: the checkpoint, for messages.

    Raises:
        PositionError: why there is no such position.
    """
    if new is None or saved.samples_seen is None or saved.dataset_length is None:
        why = "The dataset is streamed, so a position cannot be computed from a sample count."
        raise refusal(saved, now, what, why)
    check_same_length(saved.dataset_length, new.samples, what)
    old = _epoch_of(saved)
    if old is None:
        raise refusal(saved, now, what, "The checkpoint does not record how many samples a step had.")
    if old.step_at(saved.samples_seen) != saved.global_step:
        why = "Not every epoch was trained to its end, so its step number does not follow from its sample count."
        raise refusal(saved, now, what, why)
    step = new.step_at(saved.samples_seen)
    if step is None:
        why = (
            f"It was saved after {saved.samples_seen} samples, {saved.samples_seen % new.samples} of them in this epoch, "
            f"which is not a multiple of the {new.step_samples} samples that a step has now."
        )
        raise refusal(saved, now, what, why)
    return Conversion(saved, now, old, new, step, what)


def check_same_topology(saved: Position, now: Position, what: str) -> None:
    """Raise PositionError with every difference if a step has a different size than before."""
    if not same_topology(saved, now):
        why = f"Step {saved.global_step} now corresponds to a different position in the dataset."
        raise refusal(saved, now, what, why)


def check_same_length(old: int | None, new: int | None, what: str) -> None:
    """Raise PositionError with both lengths if the training dataset has changed; the length of a stream is None."""
    if old != new:
        before = "was streamed" if old is None else f"had {old} samples"
        after = "is streamed" if new is None else f"has {new} samples"
        raise PositionError(
            f"{what} was saved when the training dataset {before}; it {after} now, so the position cannot be found. Use the "
            "same dataset, or start a new run from the model in that checkpoint."
        )


def refusal(saved: Position, now: Position, what: str, why: str) -> PositionError:
    """The error that names the differences, why the position cannot be converted, and what to do."""
    return PositionError(
        f"{what} cannot be resumed here: {'; '.join(_changes(saved, now))}. {why} Use the old settings, or start a new run "
        "from the model in that checkpoint."
    )


def _changes(saved: Position, now: Position) -> list[str]:
    return [
        f"{before} {_WORDS[name]} before, {after} now"
        for name, (before, after) in _changed(saved, now).items()
    ]


def _changed(saved: Position, now: Position) -> dict[str, tuple[int, int]]:
    """The values that both sides know and that differ, by the name of the field."""
    both = {name: (getattr(saved, name), getattr(now, name)) for name in _WORDS}
    return {name: pair for name, pair in both.items() if None not in pair and pair[0] != pair[1]}


def _epoch_of(saved: Position) -> Epoch | None:
    """An epoch under the old settings."""
    samples, processes, batch = saved.dataset_length, saved.world_size, saved.per_device_train_batch_size
    accumulation = saved.gradient_accumulation_steps
    if not (processes and batch and accumulation and samples):
        return None
    if saved.epoch_steps is not None:
        return Epoch(samples, max(saved.epoch_steps, 1), processes * batch * accumulation)
    # Manifests of earlier versions lack the steps of an epoch.
    batches = batches_per_epoch(samples, batch, processes, drop_last=False)
    return Epoch.of(samples, batches, batch=batch, accumulation=accumulation, processes=processes)
