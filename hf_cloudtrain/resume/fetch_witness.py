"""Whether fetching a batch draws random numbers, in this process or in a worker: those no resume can repeat in mid-epoch.

A `WatchedCollate` replaces the collate function of a DataLoader, which ends each fetch. Nothing but the fetch happens between
two fetches of a worker, and between the end of a step and the fetch that follows; so a random state that differs was
used by the data. Reading torch's and numpy's state takes 4 us, Python's 20, so that one is read on a few steps only.

A worker has a copy of the dataset. What that copy keeps is looked at in the worker: this process never sees it.
"""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_cloudtrain.resume.state_look import Look, Looker, accept_opened, changed, script_parts

_ALWAYS = 8
"""Gaps between steps in which Python's state is read too; after that in every eighth."""
_OWN = ("inner", "counts", "last", "after", "drew", "looks")
IN_WORKERS = "the data keeps state ({name!r}) that changes in the loader processes, and no checkpoint has it"
"""The reason, for `FetchWitness.changes_in_workers`."""
RIGHT_AFTER = 0
"""After which event a fetch came: after a fetch of the same step."""
EVENTS = ("on_step_end", "on_log", "on_evaluate", "on_save")
"""The others, by the callback that is called last before the fetch; 1, 2, 3 and 4 in the counts."""
_KINDS = 4
"""Counts: fetches compared, of them drawn from torch or numpy, compared for Python, of them drawn from Python."""
_NAME = 40
"""Bytes of the name of what changes in a worker, behind the counts."""


class Drawn(NamedTuple):
    """What was seen of the fetches so far that came after one kind of event."""

    watched: int
    """Fetches that were compared."""
    share: float
    """Share of those that drew random numbers, or before which a callback did: 0 to 1."""


class HostState(NamedTuple):
    """The random states that are on the host."""

    torch: bytes
    numpy: bytes
    device: bytes
    python: Any
    """None where it was not read."""

    @classmethod
    def read(cls, *, python: bool) -> HostState:
        """The states now."""
        return cls(
            _bytes_of(torch.get_rng_state()), _numpy(), _device(), random.getstate() if python else None
        )


class WatchedCollate:
    """Replaces a collate function. Behaves like the original, except that fetches that draw random numbers are counted.

    Args:
        counts: for fetches that come right after one another, then for those that come after each of `EVENTS`.
    """

    def __init__(self, inner: Any, counts: Any) -> None:
        self.__dict__.update(inner=inner, counts=counts, last=None, after=RIGHT_AFTER, drew=False, looks=None)

    def __call__(self, samples: Any) -> Any:
        """Collate as the original does, and look at the random states."""
        batch = self.inner(samples)
        before = self.last
        now = self.__dict__["last"] = HostState.read(python=before is None or before.python is not None)
        if before is not None:
            counts, first = self.counts, _KINDS * self.after
            counts[first] += 1
            counts[first + 1] += before[:3] != now[:3]
            self.__dict__["drew"] = before[:3] != now[:3]
            if before.python is not None:
                counts[first + 2] += 1
                counts[first + 3] += before.python != now.python
                self.__dict__["drew"] = before != now
        self.__dict__["after"] = RIGHT_AFTER
        if self.looks is not None and (name := self.looks.after_fetch()):
            _write(self.counts, name)
        return batch

    def __getattr__(self, name: str) -> Any:
        if name in _OWN or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            self.__dict__[name] = value
        else:
            setattr(self.inner, name, value)


class _WatchedStart:
    """Replaces the function that starts a worker: notes the random states that the worker begins with."""

    def __init__(self, inner: Any, collate: WatchedCollate) -> None:
        self.inner = inner
        self.collate = collate

    def __call__(self, worker: int) -> None:
        if self.inner is not None:
            self.inner(worker)
        info = get_worker_info()
        if info is not None and not isinstance(
            info.dataset, IterableDataset
        ):  # a resume reads a stream again
            self.collate.looks = _WorkerLooks([info.dataset, self.collate.inner])
        self.collate.last = HostState.read(python=True)


class _WorkerLooks:
    """What the objects of the script in one worker look like, as it fetches."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = [part for one in parts for part in script_parts(one)]
        self._looker = Looker()
        self._before = self._look()
        self._fetches = 0

    def after_fetch(self) -> str | None:
        """The attribute that has changed. What the first fetch opens does not count."""
        self._fetches += 1
        if self._fetches & (
            self._fetches - 1
        ):  # the first, second, fourth … one: a look may take milliseconds
            return None
        now = self._look()
        if self._fetches == 1:
            for before, after in zip(self._before, now, strict=True):
                accept_opened(before, after)
        found = (changed(before, after) for before, after in zip(self._before, now, strict=True))
        return next((name for name in found if name), None)

    def _look(self) -> list[Look]:
        try:
            return [self._looker.look(part) for part in self._parts]
        except Exception as error:  # noqa: BLE001 - an object of the script must not end its training
            return [{type(error).__name__: object()}]  # unlike any other look


class FetchWitness:
    """Watches the fetches of one training DataLoader until `close`.

    Example:
        >>> witness = FetchWitness(dataloader)
        >>> for batch in dataloader: witness.step_began(); train(batch); witness.ended("on_step_end")
        >>> witness.after("on_step_end")
        Drawn(watched=12, share=0.0)
    """

    def __init__(self, dataloader: Any) -> None:
        self._base = getattr(dataloader, "base_dataloader", dataloader)
        self.can_watch = type(self._base) is DataLoader and self._base._iterator is None
        self._gaps = 0
        self._in_workers = self.can_watch and self._base.num_workers > 0
        empty = [0] * (_KINDS * (1 + len(EVENTS)) + _NAME)
        self._counts: Any = _shared(empty) if self._in_workers else empty
        self._collate: WatchedCollate | None = None
        if self.can_watch:
            self._inner = self._base.collate_fn, self._base.worker_init_fn
            self._collate = self._base.collate_fn = WatchedCollate(self._base.collate_fn, self._counts)
            if self._in_workers:
                self._base.worker_init_fn = _WatchedStart(self._base.worker_init_fn, self._collate)

    def after(self, event: str | None) -> Drawn:
        """What was seen of fetches after one of `EVENTS`; None: right after another fetch."""
        first = _KINDS * (RIGHT_AFTER if event is None else EVENTS.index(event) + 1)
        compared, drawn, python_compared, python_drawn = map(int, self._counts[first : first + _KINDS])
        return Drawn(compared, max(drawn / max(compared, 1), python_drawn / max(python_compared, 1)))

    @property
    def changes_in_workers(self) -> str | None:
        """The attribute of a worker's copy of the data that changes as it fetches; None without one."""
        name = bytes(map(int, self._counts[-_NAME:])).rstrip(b"\0")
        return name.decode(errors="replace") or None

    @property
    def last_drew(self) -> bool:
        """Whether the fetch of the next step's batch, which comes ahead of it, drew random numbers in this process."""
        return self._collate is not None and not self._in_workers and self._collate.drew

    @property
    def has_changed(self) -> bool:
        """Whether random numbers were drawn in this process since the event that was noted last."""
        last = None if self._collate is None or self._in_workers else self._collate.last
        return last is not None and last != HostState.read(python=last.python is not None)

    def ended(self, event: str) -> None:
        """Note the random states: what changes them until the next fetch ends is that fetch, or a callback of that event."""
        if self._collate is not None and not self._in_workers:
            python = self._gaps < _ALWAYS or self._gaps % _ALWAYS == 0
            self._collate.last, self._collate.after = HostState.read(python=python), EVENTS.index(event) + 1

    def step_began(self) -> None:
        """What a step draws, or the begin of an epoch, is not drawn by the data."""
        self._gaps += 1
        if self._collate is not None and not self._in_workers:
            self._collate.last, self._collate.after = None, RIGHT_AFTER

    def close(self) -> None:
        """Put the original functions back."""
        if self._collate is not None and self._base.collate_fn is self._collate:
            self._base.collate_fn, self._base.worker_init_fn = self._inner
        self._collate = None


def _shared(counts: list[int]) -> Any:
    """The same counts, for this process and its workers."""
    shared: Any = torch.tensor(counts)
    return shared.share_memory_()


def _write(counts: Any, name: str) -> None:
    text = name.encode()[:_NAME]
    counts[-_NAME : len(counts) - _NAME + len(text)] = torch.tensor(list(text))


def _bytes_of(state: torch.Tensor) -> bytes:
    return ctypes.string_at(state.data_ptr(), state.numel())


def _numpy() -> bytes:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return b""
    generator = numpy.random.mtrand._rand._bit_generator
    if (
        type(generator).__name__ == "MT19937"
    ):  # 624 words and the position in them: numpy/random/src/mt19937.h
        return ctypes.string_at(generator.ctypes.state_address, 2500)
    return repr(generator.state).encode()


def _device() -> bytes:
    """CUDA's seed and offset, which are kept on the host; nothing in a worker, which must not start CUDA."""
    cuda: Any = torch.cuda
    if not cuda.is_initialized():
        return b""
    return _bytes_of(cuda.default_generators[cuda.current_device()].get_state())
