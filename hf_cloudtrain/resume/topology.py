"""What a checkpoint's place in data and schedule is with another number of processes, batch or accumulation (law 8).

Frameworks compute the place in the data from the number of steps alone, and finish "successfully" at half the data
when a step means something else than before. The samples that were seen are the truth: every sampler hands out one
order, and processes, batches and accumulation only cut it into pieces, so the place after the same samples is another
step. Where no step of today ends there, nothing is resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.errors import PositionError

_WORDS = {
    "world_size": "processes",
    "per_device_train_batch_size": "samples a batch and process",
    "gradient_accumulation_steps": "batches an optimizer step",
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
        """The epoch of a loader.

        Args:
            batches: that each process gets in one epoch.
            batch: samples in one of them.
            accumulation: batches of each process in one optimizer step.
        """
        # At least one step, as Trainer.set_initial_training_values has it.
        return cls(samples, max(math.ceil(batches / accumulation), 1), batch * accumulation * processes)

    def samples_at(self, step: int) -> int:
        """Samples seen after that many optimizer steps from the beginning."""
        epochs, into = divmod(step, self.steps)
        return epochs * self.samples + min(into * self.step_samples, self.samples)

    def step_at(self, samples_seen: int) -> int | None:
        """Optimizer steps after which so many samples were seen; None where that is within a step."""
        epochs, into = divmod(samples_seen, self.samples)
        if into % self.step_samples:
            return None
        return epochs * self.steps + min(into // self.step_samples, self.steps)

    def step_by(self, samples_seen: int) -> int:
        """The last step that ends with so many samples, or before."""
        epochs, into = divmod(samples_seen, self.samples)
        return epochs * self.steps + min(into // self.step_samples, self.steps)

    def step_from(self, samples_seen: int) -> int:
        """The first step that ends with so many samples, or after."""
        epochs, into = divmod(samples_seen, self.samples)
        return epochs * self.steps + min(math.ceil(into / self.step_samples), self.steps)


@dataclass(frozen=True)
class Conversion:
    """A place in data and schedule, in the steps of then and in those of today.

    Example:
        >>> conversion = convert(manifest.position, now, Epoch(22, 3, 8), "checkpoint-4")
        >>> conversion.global_step
        2
    """

    saved: Position
    now: Position
    """What decides the meaning of a step today."""
    old: Epoch
    new: Epoch
    global_step: int
    """Where it stands, in steps of today."""
    what: str
    """The checkpoint, for messages."""

    @property
    def is_renumbered(self) -> bool:
        """Whether the same step is another place: then numbers of then must not mix with those of today."""
        return (self.old.steps, self.old.step_samples) != (self.new.steps, self.new.step_samples)

    @property
    def changes(self) -> str:
        """What is different, in words."""
        return "; ".join(_changes(self.saved, self.now))

    @property
    def samples_into_epoch(self) -> int:
        """Samples of the epoch under way that were seen."""
        return (self.saved.samples_seen or 0) % self.new.samples

    @property
    def has_same_batches(self) -> bool:
        """Whether each process gets the same batches as before, so that accumulation alone is different."""
        return not {"world_size", "per_device_train_batch_size"} & set(_changed(self.saved, self.now))

    def refusal(self, why: str) -> PositionError:
        """The error that says what is different, why the conversion stops here after all, and what to do."""
        return refusal(self.saved, self.now, self.what, why)

    def story(self, *, derived: bool) -> str:
        """What was converted and what is no longer exact, for the log.

        Args:
            derived: whether random states of processes that did not exist were derived.
        """
        begin = ", and processes that did not exist begin with numbers of their own" if derived else ""
        return (
            f"{self.what}: {self.changes}. Step {self.saved.global_step} of then is step {self.global_step} here, after the same "
            f"{self.saved.samples_seen} samples. The resumed run will not equal an uninterrupted one: random numbers are "
            f"drawn for other batches{begin}."
        )

    def step_of(self, step: int) -> int:
        """A step of then as one of today: the one that ends there, or the last one before."""
        return self.new.step_by(self.old.samples_at(step))

    @property
    def max_steps(self) -> int | None:
        """Length of the schedule in steps of today: as many samples as it had then, or the rest of a step more."""
        if self.saved.max_steps is None:
            return None
        return self.new.step_from(self.old.samples_at(self.saved.max_steps))


def batches_per_epoch(samples: int, batch: int, processes: int, *, drop_last: bool) -> int:
    """Batches that each process gets in one epoch, as Accelerate deals them out (`BatchSamplerShard.__len__`)."""
    if drop_last:
        return samples // batch // processes
    return math.ceil(math.ceil(samples / batch) / processes)


def same_topology(saved: Position, now: Position) -> bool:
    """Whether a step means the same as then, as far as both sides know."""
    return not _changes(saved, now)


def convert(saved: Position, now: Position, new: Epoch | None, what: str) -> Conversion:
    """The same place, after the same samples, in steps of today.

    Args:
        now: what decides the meaning of a step today.
        today: an epoch of today; None where its length is not known.
        what: the checkpoint, for messages.

    Raises:
        PositionError: why that cannot be.
    """
    if new is None or saved.samples_seen is None or saved.dataset_length is None:
        raise refusal(
            saved, now, what, "The data is a stream, which has no place to go to by a number of samples."
        )
    check_same_length(saved.dataset_length, new.samples, what)
    step = new.step_at(saved.samples_seen)
    old = _epoch_of(saved)
    if old is None:
        raise refusal(saved, now, what, "It does not say how many samples a step had.")
    if old.step_at(saved.samples_seen) != saved.global_step:
        raise refusal(
            saved,
            now,
            what,
            "Not every epoch was trained to its end, so its steps are not those of its data.",
        )
    if step is None:
        raise refusal(
            saved,
            now,
            what,
            f"It stands at {saved.samples_seen} samples, {saved.samples_seen % new.samples} of them in this epoch, "
            f"which is no multiple of the {new.step_samples} samples that a step has now.",
        )
    return Conversion(saved, now, old, new, step, what)


def check_same_topology(saved: Position, now: Position, what: str) -> None:
    """Stop where a step means something else than then, and nothing can be converted.

    Raises:
        PositionError: names every difference.
    """
    if not same_topology(saved, now):
        raise refusal(saved, now, what, "The same step would mean another place in the data.")


def check_same_length(old: int | None, now: int | None, what: str) -> None:
    """Stop where the training data is another.

    Args:
        then, now: samples; None for a stream.

    Raises:
        PositionError: names both lengths.
    """
    if old != now:
        before = "was a stream" if old is None else f"had {old} samples"
        after = "is a stream" if now is None else f"has {now}"
        raise PositionError(
            f"{what} was saved when the training data {before}, and it {after} now, so its place in the data is no longer "
            "there. Use the same data, or start a run of its own from the model in that checkpoint."
        )


def refusal(saved: Position, now: Position, what: str, why: str) -> PositionError:
    """The error that says what is different, why that cannot be converted, and what to do."""
    changes = "; ".join(_changes(saved, now))
    return PositionError(
        f"{what} cannot be resumed here: {changes}. {why} Use the same numbers, or start a run of its own from the model "
        "in that checkpoint."
    )


def _changes(saved: Position, now: Position) -> list[str]:
    return [
        f"{before} {_WORDS[name]} before, {after} now"
        for name, (before, after) in _changed(saved, now).items()
    ]


def _changed(saved: Position, now: Position) -> dict[str, tuple[int, int]]:
    """What both sides know and is different, by the name of the field."""
    both = {name: (getattr(saved, name), getattr(now, name)) for name in _WORDS}
    return {name: pair for name, pair in both.items() if None not in pair and pair[0] != pair[1]}


def _epoch_of(saved: Position) -> Epoch | None:
    """An epoch as it was then."""
    processes, batch, accumulation = (
        saved.world_size,
        saved.per_device_train_batch_size,
        saved.gradient_accumulation_steps,
    )
    if not (processes and batch and accumulation and saved.dataset_length):
        return None
    steps = saved.epoch_steps
    if steps is None:  # saved before this was noted
        batches = batches_per_epoch(saved.dataset_length, batch, processes, drop_last=False)
        return Epoch.of(
            saved.dataset_length, batches, batch=batch, accumulation=accumulation, processes=processes
        )
    return Epoch(saved.dataset_length, max(steps, 1), processes * batch * accumulation)
