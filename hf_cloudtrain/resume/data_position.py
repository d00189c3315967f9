"""The position in one epoch over one DataLoader, and how to resume there: batches are skipped by index, not read.

A DataLoader consists of an order (its batch sampler draws it when the epoch starts, from a random state), of fetches
(which may draw random numbers: augmentation) and of a look-ahead (Accelerate's DataLoaders fetch one batch more than they
have handed out; workers fetch several). So a resume sets the random states three times: those of the epoch's start before
the order is drawn, those of the fetch before the first batch is fetched, and those of the save where the uninterrupted run
had fetched as much. All three moments are observed through the batch sampler (`watched_sampler`).

A checkpoint holds a fingerprint of every index that was handed out. A resume computes it again over what it skips; a
different order is an error, not a silent repetition of half the data.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from hf_cloudtrain.errors import ConfigurationError, PositionError
from hf_cloudtrain.resume.dataloaders import (
    BY_INDEX,
    BY_READING,
    BY_STATE,
    fetches_per_batch,
    generators_of,
    innermost_sampler,
    reads_here,
    seed_of,
    set_epoch,
    share_generator,
)
from hf_cloudtrain.resume.loader_state import LoaderState
from hf_cloudtrain.resume.random_state import HostRandom, RandomState
from hf_cloudtrain.resume.watched_sampler import Fetch, Fetches, OrderCheck, fingerprint_text, watch


class DataPosition:
    """The position in one DataLoader, epoch by epoch.

    Args:
        dataloader: a torch DataLoader, prepared by Accelerate or not.

    Example:
        >>> position = DataPosition(dataloader)
        >>> position.begin(epoch=0)
        >>> with position.watching():
        ...     for batch in dataloader:
        ...         train(batch)
        ...         position.batches += 1
        >>> record = position.state_dict()                # with torch.save, in a file of this process
        >>> position.begin(epoch=0, record=record)        # in another process; then iterate as usual
    """

    def __init__(self, dataloader: Any) -> None:
        self.dataloader = dataloader
        self.batches = 0
        """Batches of this epoch that this process has trained on."""
        self.to_read = 0
        """Batches that the caller has to read and discard first."""
        self.save_foreseen = False
        """Whether a save follows the next step: then the host's states are noted before the fetches of that step, too."""
        self._base = getattr(dataloader, "base_dataloader", dataloader)
        self._loader_state = LoaderState(dataloader)
        self._way = self._loader_state.way
        self._fetches_per_batch = fetches_per_batch(dataloader)
        ahead = 3 + self._base.num_workers * (self._base.prefetch_factor or 0)
        self._fetches = Fetches(recent=self._fetches_per_batch * ahead + 1)
        self._epoch = 0
        self._started = False
        self._begun: RandomState | None = None
        """Before the iteration started."""
        self._drawn: RandomState | None = None
        """Before the order was drawn: between the two, torch draws the seed of the workers."""
        self._drawn_as_begun = False
        self._host: HostRandom | None = None
        """Python's and numpy's states when they were last read; None requests a read before the next fetch."""
        self._resumed: dict[str, Any] | None = None
        """The record of the checkpoint, until the first batch of the resumed epoch."""
        self._order = OrderCheck()
        self._saved: RandomState | None = None
        """The random states of the save, until they are set."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Observe one iteration of the DataLoader. Further iterations in the meantime are not observed."""
        watched = watch(self._base, self)
        try:
            yield
        finally:
            # Otherwise DataLoader and position refer to each other, and worker processes outlive both until a collection.
            watched.position = None

    @property
    def seed(self) -> int | None:
        """The seed of Accelerate's seedable sampler, which draws each epoch's order from it; None for all others."""
        return seed_of(self.dataloader)

    @seed.setter
    def seed(self, seed: int | None) -> None:
        if seed is not None and self.seed is not None:
            innermost_sampler(self._base).initial_seed = seed

    @property
    def inexact_reason(self) -> str | None:
        """Why a resume from here, within an epoch, cannot be exact; None if it can."""
        return self._loader_state.inexact_reason

    @property
    def fingerprint(self) -> str:
        """Of all indices of this epoch that were trained on, 16 hexadecimal digits."""
        fetch = self._next_fetch()
        return fingerprint_text(fetch.fingerprint if fetch else self._fetches.fingerprint)

    def begin(self, epoch: int, record: Any = None, saved: RandomState | None = None) -> None:
        """Prepare the next iteration of the DataLoader.

        Args:
            record: the dict that `state_dict` returned within this epoch; None at its start.
            saved: the random states of the save, which apply from the first batch on.

        Raises:
            PositionError: the record is of a different kind of data or DataLoader.
            ManifestError: the record is damaged.
        """
        set_epoch(self.dataloader, epoch)
        self._epoch, self.batches, self.to_read, self._started = epoch, 0, 0, False
        self._fetches.clear()
        self._resumed, self._saved = record, saved
        self._order = OrderCheck(record, epoch)
        if record is not None:
            self._go_to(record)
            begun = RandomState.from_record(record["begun"])
            share_generator(self._base, begun.generators)
            begun.restore(generators_of(self._base))
        self._begun = RandomState.capture(generators_of(self._base))
        # A persistent pool of workers draws its seed once; a pool that is new in a later epoch must not move the states.
        self._drawn_as_begun = record is None and epoch > 0 and bool(self._base.persistent_workers)
        self._host = None

    def settle(self) -> None:
        """Call it when a resumed epoch has returned its first batch: from now on the random states are those of the save."""
        if self._resumed is not None and not self._started and reads_here(self.dataloader):
            self._order.fail("the DataLoader does not use its sampler")
        if self._saved is not None:
            self._saved.restore()
        self._saved = self._resumed = None

    def check_same_order(self) -> None:
        """Raise PositionError if what was skipped is not what was trained on."""
        if self._order.problem:
            raise PositionError(self._order.problem)

    def can_be_saved(self) -> bool:
        """Whether `state_dict` knows every random state before the next fetch."""
        fetch = self._next_fetch()
        if fetch is None or fetch.random is None or fetch.random.host is not None:
            return True
        return self._host is not None and self._host.is_now()

    def state_dict(self) -> dict[str, Any]:
        """The position after `batches`, as numbers, texts and tensors. Raises ConfigurationError before `begin`."""
        if self._begun is None:
            raise ConfigurationError("The position is unknown. Call begin() before state_dict().")
        fetch = self._next_fetch()
        before = fetch.random if fetch else None
        if before is not None and before.host is None:
            before = dataclasses.replace(before, host=HostRandom.capture())
        return {
            "way": self._way,
            "epoch": self._epoch,
            "batches": self.batches,
            "fetched": self._fetches.count,
            "fingerprint": self.fingerprint,
            "fingerprint_fetched": fingerprint_text(self._fetches.fingerprint),
            "begun": self._begun.to_record(),
            "drawn": (self._drawn or self._begun).to_record(),
            "before_fetch": before.to_record() if before else None,
            "state": self._loader_state.capture(fetch),
        }

    def random_state(self) -> RandomState:
        """All random states now, including those of the DataLoader's generators."""
        return RandomState.capture(generators_of(self._base), device=True)

    def restore_generators(self, state: RandomState) -> None:
        """Set the DataLoader's generators as `random_state` captured them."""
        share_generator(self._base, state.generators)
        state.restore_generators(generators_of(self._base))

    def iterate(self, inner: Any) -> Iterator[Any]:
        """What a batch sampler yields; `WatchedSampler` calls it."""
        if self._started:
            yield from inner
            return
        self._started = True
        self._draw_order()
        skipped = 0 if self._resumed is None else self._resumed["batches"] * self._fetches_per_batch
        if self._loader_state.observed_stream is not None:
            self._fetches.count = skipped  # the stream itself starts there
        for indices in inner:
            if self._fetches.count < skipped and self._way == BY_INDEX:
                self._fetches.add(indices)
                continue
            self._before_fetch(skipped)
            self._fetches.add(indices)
            self._order.check_fetched(self._fetches)
            yield indices
        if self._resumed is not None and self._fetches.count < skipped:
            self._order.fail(f"the epoch has only {self._fetches.count} batches")

    def _go_to(self, record: dict[str, Any]) -> None:
        if record["way"] != self._way:
            raise PositionError(
                f"The position in the dataset was saved as {record['way']!r}, but this DataLoader resumes by {self._way!r}. "
                "Use the same kind of dataset and DataLoader, or start a new run from that model."
            )
        self.batches = record["batches"]
        if self._way == BY_READING:
            self.to_read = self.batches
        elif self._way == BY_STATE:
            self._loader_state.restore(record["state"])

    def _next_fetch(self) -> Fetch | None:
        """What was noted before the first fetch of the next batch; None if that fetch has not started."""
        return self._fetches.before(self.batches * self._fetches_per_batch)

    def _draw_order(self) -> None:
        """Set the random states from which the batch sampler draws the order right after this."""
        if self._resumed is not None:
            drawn = RandomState.from_record(self._resumed["drawn"])
            drawn.restore()
            if "old" in self._resumed:
                self._draw_converted(self._resumed, drawn)
        elif self._drawn_as_begun and self._begun is not None:
            self._begun.restore(generators_of(self._base))
        self._drawn = RandomState.capture()
        self._host = self._drawn.host

    def _draw_converted(self, resumed: dict[str, Any], drawn: RandomState) -> None:
        """Compare the order that follows with that of the old settings, and leave all random states as they were."""
        generators = generators_of(self._base)
        if generators and not resumed["begun"]["generators"]:
            # One process draws the sampler's seed from torch (RandomSampler.__iter__); several share a generator.
            generators[0].manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
            if self._begun is not None:  # a save must contain it from now on
                states = tuple(generator.get_state() for generator in generators)
                self._begun = dataclasses.replace(self._begun, generators=states)
        before = RandomState.capture(generators)
        self._order.check_converted(innermost_sampler(self._base))
        drawn.restore()
        before.restore_generators(generators)

    def _before_fetch(self, skipped: int) -> None:
        if self._resumed is not None:
            self._restore_random(self._resumed, skipped)
        random = stream = None
        if self._base.num_workers == 0:
            random = RandomState.capture(host=self.save_foreseen or self._host is None)
            self._host = self._host if random.host is None else random.host
            observed = self._loader_state.observed_stream
            stream = observed.state_dict() if observed is not None else None
        self._fetches.note(random, stream)

    def _restore_random(self, resumed: dict[str, Any], skipped: int) -> None:
        if self._fetches.count == skipped:
            self._order.check_skipped(self._fetches)
            if resumed["before_fetch"] is not None:
                RandomState.from_record(resumed["before_fetch"]).restore()
                self._host = None
        # As much was fetched before the save. Workers draw from states of their own: `settle` is soon enough.
        reached = self._fetches.count >= resumed["fetched"] and self._base.num_workers == 0
        if self._saved is not None and reached:
            self._saved.restore()
            self._saved = self._host = None


def converted(record: dict[str, Any], *, batches: int, old: tuple[int, int]) -> dict[str, Any]:
    """The same position under new settings, from what rank 0 saved with `state_dict`.

    Args:
        batches: that each rank has trained on, under the new settings.
        old: ranks, and samples in a batch of one rank, when it was saved.
    """
    kept = {name: record[name] for name in ("batches", "fingerprint")}
    before = {"processes": old[0], "batch": old[1], **kept}
    # The random states of the save apply from the first fetch on.
    return {**record, "batches": batches, "fetched": 0, "before_fetch": None, "old": before}
