"""Where one epoch over one loader stands, and how to begin there again: batches are skipped by index, not read.

A loader is made of an order (its batch sampler draws it at the start of an epoch, from a random state), of fetches
(which may draw random numbers: augmentation) and of a look-ahead (Accelerate's loaders fetch one batch more than they
have handed out; workers several). So a resume sets the random states three times: the epoch's first before the order
is drawn, those of the fetch before the first batch is fetched, and those of the save where the uninterrupted run had
fetched that far. All three are seen from the batch sampler, which torch asks right before each fetch; ours stands in
its place and looks on.

What a checkpoint keeps is a fingerprint of every index handed out so far. A resume computes it again over what it
skips, and another order is an error, not a quiet repetition of half the data.
"""

from __future__ import annotations

import contextlib
import dataclasses
from array import array
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import xxhash
from torch.utils.data import BatchSampler, IterableDataset

from hf_cloudtrain.errors import ConfigurationError, ManifestError, PositionError
from hf_cloudtrain.resume.dataloaders import (
    fetches_per_batch,
    fills_up,
    innermost_sampler,
    is_dispatcher,
    keeps_state,
    reads_here,
    samplers,
    set_epoch,
    shuffles_in_a_buffer,
)
from hf_cloudtrain.resume.random_state import RandomState, numpy_state, same_numpy_state

BY_INDEX = "index"
"""Skipped by index: map-style data."""
BY_STATE = "state"
"""Set by the stream's or the loader's own `state_dict`."""
BY_READING = "reading"
"""Read and thrown away: a stream without a state of its own."""


class _Fetch(NamedTuple):
    """What was true right before one fetch."""

    number: int
    fingerprint: int
    """Of all indices before it."""
    random: RandomState | None
    stream: Any


class DataPosition:
    """The position in one loader, epoch by epoch.

    Args:
        dataloader: a torch DataLoader, as `accelerator.prepare` made it or not.

    Example:
        >>> place = DataPosition(dataloader)
        >>> place.begin(epoch=0)
        >>> with place.watching():
        ...     for batch in dataloader:
        ...         train(batch)
        ...         place.batches += 1
        >>> record = place.state_dict()                # with torch.save, in a file of this process
        >>> place.begin(epoch=0, record=record)        # in another process; then iterate as usual
    """

    def __init__(self, dataloader: Any) -> None:
        self.dataloader = dataloader
        self.batches = 0
        """Batches of this epoch that this process has trained on."""
        self.mismatch: str | None = None
        """What is wrong with the order that was skipped, once the first batch is here."""
        self.to_read = 0
        """Batches that whoever iterates has to read and throw away first."""
        self.save_foreseen = False
        """Whether a save will come at the end of the next step: then numpy's state is noted before its fetches, too."""
        self._base = getattr(dataloader, "base_dataloader", dataloader)
        self._fetches_per_batch = fetches_per_batch(dataloader)
        self._epoch = 0
        self._begun: RandomState | None = None
        """Before the iteration began."""
        self._drawn: RandomState | None = None
        """Before its order was drawn: between the two, torch draws the seed of the workers."""
        self._drawn_as_begun = False
        self._numpy: Any = None
        """The state of numpy when it was last looked at; None asks for a look before the next fetch."""
        self._resumed: dict[str, Any] | None = None
        self._now: RandomState | None = None
        self._fetched = 0
        self._fingerprint = 0
        self._fetched_before: tuple[int, str] | None = None
        """How far a resumed epoch had been fetched, and the fingerprint of all that."""
        ahead = 3 + self._base.num_workers * (self._base.prefetch_factor or 0)
        self._recent: deque[_Fetch] = deque(maxlen=self._fetches_per_batch * ahead + 1)
        self._started = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look on while the loader is iterated, once: another iteration meanwhile is none of our business."""
        watched = self._watch()
        try:
            yield
        finally:
            # Else loader and position hold each other, and worker processes outlive both until somebody collects.
            watched.position = None

    @property
    def seed(self) -> int | None:
        """The seed of Accelerate's seedable sampler, which draws each epoch's order from it; None for all others."""
        found: int | None = getattr(innermost_sampler(self._base), "initial_seed", None)
        return found

    @seed.setter
    def seed(self, seed: int | None) -> None:
        if seed is not None and self.seed is not None:
            innermost_sampler(self._base).initial_seed = seed

    @property
    def way(self) -> str:
        """How a resume gets to a batch of this loader: `BY_INDEX`, `BY_STATE` or `BY_READING`."""
        if not isinstance(self._base.dataset, IterableDataset):
            # A dispatcher fills the last batch up with the first one it has read.
            return BY_READING if is_dispatcher(self.dataloader) else BY_INDEX
        if keeps_state(self.dataloader) or (self._stream() is not None and self._base.num_workers == 0):
            return BY_STATE
        return BY_READING

    @property
    def inexact_reason(self) -> str | None:
        """Why a resume from here, within an epoch, cannot be exact; None where it is."""
        if self.way == BY_STATE and fills_up(self.dataloader):
            return "the last batch of a dispatched stream is filled up with its first one, which a resume does not read"
        return None

    @property
    def fingerprint(self) -> str:
        """Of all indices of this epoch that were trained on, 16 hexadecimal digits."""
        fetch = self._next_fetch()
        return f"{fetch.fingerprint if fetch else self._fingerprint:016x}"

    def begin(self, epoch: int, record: dict[str, Any] | None = None, now: RandomState | None = None) -> None:
        """Prepare the next iteration of the loader.

        Args:
            record: what `state_dict` gave within this epoch; None at its start.
            now: the random states of the save, which hold from the first batch on.

        Raises:
            ManifestError: the record is not one of this loader's kind.
        """
        set_epoch(self.dataloader, epoch)
        self._epoch, self._fetched, self._fingerprint, self.batches = epoch, 0, 0, 0
        self._started = False
        self._fetched_before = None if record is None else (record["fetched"], record["fingerprint_fetched"])
        self._recent.clear()
        self._resumed, self._now, self.mismatch, self.to_read = record, now, None, 0
        if record is not None:
            self._go_to(record)
            begun = RandomState.from_record(record["begun"])
            self._adopt(begun)
            begun.restore(self._generators())
        self._begun = RandomState.capture(self._generators())
        # A persistent worker pool draws its seed once; a pool that is new in a later epoch must not move the others' states.
        self._drawn_as_begun = record is None and epoch > 0 and bool(self._base.persistent_workers)
        self._numpy = None

    def settle(self) -> None:
        """The first batch of a resumed epoch is here: from now on the random states are those of the save."""
        if self._resumed is not None and not self._started and reads_here(self.dataloader):
            self.mismatch = self._other_order("the loader does not ask its sampler")
        if self._now is not None:
            self._now.restore()
            self._now = None
        self._resumed = None

    def check_same_order(self) -> None:
        """Raise PositionError where what was skipped is not what was trained on."""
        if self.mismatch:
            raise PositionError(self.mismatch)

    def can_be_saved(self) -> bool:
        """Whether `state_dict` can tell the random state of the next fetch, whoever draws numbers there."""
        fetch = self._next_fetch()
        if fetch is None or fetch.random is None or fetch.random.numpy is not None:
            return True
        return same_numpy_state(numpy_state(), self._numpy)

    def state_dict(self) -> dict[str, Any]:
        """The position after `batches`, as numbers, texts and tensors."""
        fetch = self._next_fetch()
        before = fetch.random if fetch else None
        if before is not None and before.numpy is None:
            before = RandomState(before.python, before.torch, numpy_state())
        assert self._begun is not None, "begin() first"
        way = self.way
        return {
            "way": way,
            "epoch": self._epoch,
            "batches": self.batches,
            "fetched": self._fetched,
            "fingerprint": self.fingerprint,
            "fingerprint_fetched": f"{self._fingerprint:016x}",
            "begun": self._begun.to_record(),
            "drawn": (self._drawn or self._begun).to_record(),
            "before_fetch": before.to_record() if before else None,
            "state": self._own_state(fetch) if way == BY_STATE else None,
        }

    def random_state(self) -> RandomState:
        """All random states now, those of the loader's generators included."""
        return RandomState.capture(self._generators(), device=True)

    def restore_generators(self, state: RandomState) -> None:
        """Set the loader's generators as `random_state` found them."""
        self._adopt(state)
        for generator, one in zip(self._generators(), state.generators, strict=False):
            generator.set_state(one)

    def _go_to(self, record: dict[str, Any]) -> None:
        if record["way"] != self.way:
            raise PositionError(
                f"The position in the data was kept by {record['way']!r}, and this loader goes by {self.way!r}: "
                "it is another kind of data or of loader. Use the same, or start a run of its own from that model."
            )
        self.batches = record["batches"]
        if self.way == BY_READING:
            self.to_read = self.batches
        elif self.way == BY_STATE:
            self._set_own_state(record["state"])

    def _next_fetch(self) -> _Fetch | None:
        """What was noted before the first fetch of the batch that comes next; None where that has not happened."""
        number = self.batches * self._fetches_per_batch
        return next((fetch for fetch in self._recent if fetch.number == number), None)

    # The look on the batch sampler

    def _watch(self) -> _Watched:
        name = "batch_sampler" if self._base.batch_sampler is not None else "sampler"
        watched = getattr(self._base, name)
        if not isinstance(watched, _Watched):
            watched = _Watched(watched)
            # Set past DataLoader.__setattr__, which guards against exchanging the order in the middle of an epoch.
            self._base.__dict__[name] = watched
            # A pool of lasting workers keeps the sampler that it was made with, and so does the first iterator of a
            # StatefulDataLoader that was asked for its state.
            self._base._iterator = None
            if getattr(self._base, "_initial_iter_for_state_dict", False):
                self._base._initial_iter_for_state_dict = False
        watched.position = self
        return watched

    def iterate(self, inner: Any) -> Iterator[Any]:
        """What a batch sampler gives, with everything noted and set that belongs between its batches."""
        if self._started:
            yield from inner
            return
        self._started = True
        self._order_is_drawn_now()
        skipped = self._fetches_to_skip()
        if self._watched_stream() is not None:
            self._fetched = skipped  # the stream itself begins there
        for indices in inner:
            if self._fetched < skipped and self.way == BY_INDEX:
                self._count(indices)
                continue
            self._before_fetch(skipped)
            self._count(indices)
            self._compare_fetched()
            yield indices
        if self._resumed is not None and self._fetched < skipped:
            self.mismatch = self._other_order(f"the epoch has only {self._fetched} batches")

    def _order_is_drawn_now(self) -> None:
        if self._resumed is not None:
            self._set_order(self._resumed)
        elif self._drawn_as_begun and self._begun is not None:
            self._begun.restore(self._generators())
        self._drawn = RandomState.capture()
        self._numpy = self._drawn.numpy

    def _set_order(self, resumed: dict[str, Any]) -> None:
        """All random states are those from which the order was drawn."""
        drawn = RandomState.from_record(resumed["drawn"])
        drawn.restore()
        if resumed.get("then") is None:
            return
        generators = self._generators()
        if generators and not resumed["begun"]["generators"]:
            # One process draws the sampler's seed from torch (RandomSampler.__iter__); several share a generator.
            generators[0].manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
            if self._begun is not None:  # what a save must say from now on
                states = tuple(generator.get_state() for generator in generators)
                self._begun = dataclasses.replace(self._begun, generators=states)
        states = tuple(generator.get_state() for generator in generators)
        self._compare_order_of_then(resumed["then"])
        drawn.restore()
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    def _compare_order_of_then(self, old: dict[str, Any]) -> None:
        """Cut the order into the batches of then, and compare those that process 0 was handed out."""
        processes, batch, batches = old["processes"], old["batch"], old["batches"]
        order = list(islice(innermost_sampler(self._base), processes * batch * batches))
        fingerprint = 0
        for first in range(0, len(order), processes * batch):
            fingerprint = _chained(fingerprint, order[first : first + batch])
        if old["fingerprint"] != f"{fingerprint:016x}":
            self.mismatch = self._other_order("their order is another one")

    def _fetches_to_skip(self) -> int:
        return 0 if self._resumed is None else self._resumed["batches"] * self._fetches_per_batch

    def _before_fetch(self, skipped: int) -> None:
        if self._resumed is not None:
            self._restore_random(self._resumed, skipped)
        random = state = None
        if self._base.num_workers == 0:
            random = RandomState.capture(numpy=self.save_foreseen or self._numpy is None)
            self._numpy = self._numpy if random.numpy is None else random.numpy
            stream = self._watched_stream()
            state = stream.state_dict() if stream is not None else None
        self._recent.append(_Fetch(self._fetched, self._fingerprint, random, state))

    def _restore_random(self, resumed: dict[str, Any], skipped: int) -> None:
        if self._fetched == skipped:
            self._compare_order(resumed)
            if resumed["before_fetch"] is not None:
                RandomState.from_record(resumed["before_fetch"]).restore()
                self._numpy = None
        # The save came when this many had been fetched. Workers draw from states of their own: `settle` is soon enough.
        if self._now is not None and self._fetched >= resumed["fetched"] and self._base.num_workers == 0:
            self._now.restore()
            self._now = None
            self._numpy = None

    def _count(self, indices: Any) -> None:
        self._fingerprint = _chained(self._fingerprint, indices)
        self._fetched += 1

    def _compare_order(self, resumed: dict[str, Any]) -> None:
        if resumed.get("then") is not None and self.way != BY_STATE:
            return  # compared when it was drawn
        if self.way != BY_STATE and resumed["fingerprint"] != f"{self._fingerprint:016x}":
            self.mismatch = self._other_order("their order is another one")
        if self.way == BY_STATE:
            self._fingerprint = int(resumed["fingerprint"], 16)

    def _compare_fetched(self) -> None:
        """A sampler that draws as it goes may give the same batches again, and then others than were in the look-ahead."""
        if self._fetched_before is None or self._fetched != self._fetched_before[0]:
            return
        if self.way != BY_STATE and self._fetched_before[1] != f"{self._fingerprint:016x}":
            self.mismatch = self.mismatch or self._other_order("the batch after them is another one")
        self._fetched_before = None

    def _other_order(self, how: str) -> str:
        return (
            f"The {self.batches} batches that were trained on in epoch {self._epoch} cannot be found again: {how}. "
            "Resume with the data, the sampler and the batch size of the checkpoint, or start a run of its own from that model."
        )

    # States of their own

    def _stream(self) -> Any:
        """The data set that can tell and set where it stands, exactly; None where there is none."""
        dataset = self._base.dataset
        if type(dataset).__name__ == "IterableDatasetShard":
            if not dataset.drop_last:
                return (
                    None  # its last batch is filled up with its first one, which a resume would not have read
                )
            dataset = dataset.dataset
        if not (hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")):
            return None
        return None if shuffles_in_a_buffer(dataset) else dataset

    def _watched_stream(self) -> Any:
        """The data set whose state is noted before each fetch."""
        return self._stream() if self.way == BY_STATE and not keeps_state(self.dataloader) else None

    def _own_state(self, fetch: _Fetch | None) -> Any:
        if not reads_here(self.dataloader):
            return None
        if keeps_state(self.dataloader):
            return _plain(self.dataloader.state_dict())
        # Without a look-ahead the next fetch has not begun, and the stream stands right before it.
        return _plain(self._stream().state_dict() if fetch is None else fetch.stream)

    def _set_own_state(self, state: Any) -> None:
        if not reads_here(self.dataloader):
            return
        if state is None:
            raise ManifestError("The position in the stream is missing from the checkpoint.")
        if keeps_state(self.dataloader):
            self.dataloader.load_state_dict(state)
        else:
            self._stream().load_state_dict(state)

    def _adopt(self, state: RandomState) -> None:
        """Accelerate gives a sampler that several processes share a generator, which one process has not."""
        sampler = innermost_sampler(self._base)
        if state.generators and not self._generators() and getattr(sampler, "generator", state) is None:
            sampler.generator = torch.Generator()

    def _generators(self) -> list[Any]:
        """Generators that the order is drawn from, each once."""
        found: list[Any] = []
        for owner in (self._base, *samplers(self._base), self._base.dataset):
            generator = getattr(owner, "generator", None)
            if hasattr(generator, "get_state") and not any(generator is other for other in found):
                found.append(generator)
        return found


class _Watched(BatchSampler):
    """Stands in a batch sampler's place and lets a DataPosition look on. In all else it is the one it stands for."""

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


def moved(record: dict[str, Any], *, batches: int, old: tuple[int, int]) -> dict[str, Any]:
    """The same place for other processes or batches, of what process 0 has saved with `state_dict`.

    Args:
        batches: of today that each process has trained on.
        then: processes, and samples in a batch of one, when it was saved.
    """
    processes, batch = old
    return {
        **record,
        "batches": batches,
        "fetched": 0,  # the random states of the save hold from the first fetch on
        "before_fetch": None,
        "then": {
            "processes": processes,
            "batch": batch,
            "batches": record["batches"],
            "fingerprint": record["fingerprint"],
        },
    }


def _chained(before: int, indices: Any) -> int:
    """Fingerprint of all indices so far: 1 us for a batch of 32."""
    try:
        data = array("q", indices).tobytes()
    except (TypeError, ValueError, OverflowError):
        data = repr(indices).encode()
    return xxhash.xxh3_64_intdigest(data, seed=before)


def _plain(value: Any) -> Any:
    """The same of numbers, texts, tensors and what holds them; raises ConfigurationError for anything else."""
    import numpy
    import torch

    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.Tensor)):
        return value
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, numpy.ndarray):
        return torch.from_numpy(value.copy())
    raise ConfigurationError(
        f"The position of a stream holds {type(value).__name__!r}, which cannot be stored. Let its state_dict return "
        "numbers, texts, lists, dicts and tensors."
    )
