"""The batch sampler of a DataLoader, observed: torch asks it for indices right before each fetch.

A `WatchedSampler` replaces the DataLoader's batch sampler (or, without one, its sampler) and hands each iteration to the
`DataPosition` that watches. `Fetches` chains the indices into one fingerprint, and `OrderCheck` compares it on a resume.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import xxhash
from torch.utils.data import BatchSampler

from hf_cloudtrain.resume.dataloaders import BY_STATE, drop_first_iterator
from hf_cloudtrain.resume.random_state import RandomState


class Fetch(NamedTuple):
    """What was true right before one fetch."""

    number: int
    fingerprint: int
    """Of all indices before it."""
    random: RandomState | None
    stream: Any
    """State of the stream, if it has one."""


class Fetches:
    """The fetches of one epoch: how many, the fingerprint of their indices, and the state before the latest of them.

    Args:
        recent: how many of the latest to remember.
    """

    def __init__(self, recent: int) -> None:
        self.count = 0
        self.fingerprint = 0
        self._recent: deque[Fetch] = deque(maxlen=recent)

    def clear(self) -> None:
        """Start an epoch."""
        self.count = self.fingerprint = 0
        self._recent.clear()

    def note(self, random: RandomState | None, stream: Any) -> None:
        """Remember the states before the next fetch."""
        self._recent.append(Fetch(self.count, self.fingerprint, random, stream))

    def add(self, indices: Any) -> None:
        """Count a batch of indices."""
        self.fingerprint = chained(self.fingerprint, indices)
        self.count += 1

    def before(self, number: int) -> Fetch | None:
        """The state before one of the latest fetches; None if that fetch has not started."""
        return next((fetch for fetch in self._recent if fetch.number == number), None)


class OrderCheck:
    """Compares the sample order of a resumed epoch with that of the checkpoint.

    Args:
        record: what `DataPosition.state_dict` saved in this epoch; None if the epoch is not resumed.
        epoch: its number, for the message.
    """

    def __init__(self, record: dict[str, Any] | None = None, epoch: int = 0) -> None:
        self.problem: str | None = None
        """What is wrong with the order."""
        self._record = record or {}
        self._epoch = epoch
        self._by_state = self._record.get("way") == BY_STATE
        self._look_ahead: int | None = self._record.get("fetched")

    def fail(self, why: str) -> None:
        """Note that the skipped batches cannot be those of the checkpoint."""
        self.problem = (
            f"The {self._record['batches']} batches that were trained on in epoch {self._epoch} cannot be reproduced: {why}. "
            "Resume with the dataset, the sampler and the batch size of the checkpoint, or start a new run from that model."
        )

    def check_converted(self, sampler: Any) -> None:
        """Cut the order into batches of the old settings, and compare those of process 0."""
        old = self._record["old"]
        step = old["processes"] * old["batch"]
        order = list(islice(sampler, step * old["batches"]))
        fingerprint = 0
        for first in range(0, len(order), step):
            fingerprint = chained(fingerprint, order[first : first + old["batch"]])
        self._compare(old["fingerprint"], fingerprint, "the sample order differs")

    def check_skipped(self, fetches: Fetches) -> None:
        """Compare when all batches before the position are skipped."""
        if self._by_state:  # nothing was skipped here: the stream itself starts at the position
            fetches.fingerprint = int(self._record["fingerprint"], 16)
        elif "old" not in self._record:  # else compared when the order was drawn
            self._compare(self._record["fingerprint"], fetches.fingerprint, "the sample order differs")

    def check_fetched(self, fetches: Fetches) -> None:
        """Compare when as much is fetched as before the save.

        A sampler that draws while it is iterated may repeat the skipped batches, and then return others than the look-ahead
        had.
        """
        if fetches.count != self._look_ahead:
            return
        self._look_ahead = None
        if not self._by_state and self.problem is None:
            self._compare(
                self._record["fingerprint_fetched"], fetches.fingerprint, "the batch after them differs"
            )

    def _compare(self, saved: str, fingerprint: int, why: str) -> None:
        if saved != fingerprint_text(fingerprint):
            self.fail(why)


class WatchedSampler(BatchSampler):
    """Replaces a batch sampler. Behaves like the original, except that a `DataPosition` observes its iteration."""

    def __init__(self, inner: Any) -> None:
        self.__dict__.update(inner=inner, position=None)

    def __iter__(self) -> Iterator[Any]:
        position = self.position
        return iter(self.inner) if position is None else position.iterate(self.inner)

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "position"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "position":
            self.__dict__[name] = value
        else:
            setattr(self.inner, name, value)


def watch(base: Any, position: Any) -> WatchedSampler:
    """Let `position` observe the next iteration of a DataLoader; its `iterate` receives the original sampler."""
    name = "batch_sampler" if base.batch_sampler is not None else "sampler"
    watched = getattr(base, name)
    if not isinstance(watched, WatchedSampler):
        watched = WatchedSampler(watched)
        # Bypasses DataLoader.__setattr__, which forbids a new sampler in the middle of an epoch.
        base.__dict__[name] = watched
        # Persistent workers keep the sampler that they were created with, and so does a first iterator.
        base._iterator = None
        drop_first_iterator(base)
    watched.position = position
    return watched


def chained(before: int, indices: Any) -> int:
    """The fingerprint of all indices so far; takes 1 us for a batch of 32."""
    try:
        data = array("q", indices).tobytes()
    except (TypeError, ValueError, OverflowError):
        data = repr(indices).encode()
    return xxhash.xxh3_64_intdigest(data, seed=before)


def fingerprint_text(fingerprint: int) -> str:
    """As a record has it: 16 hexadecimal digits."""
    return f"{fingerprint:016x}"
