"""Which rank this process is, and how the ranks of one job agree.

Each decision is taken once and broadcast, and an error on one rank is raised on all ranks. Work that may wait for the
network or the disk never runs inside a collective, which would time out after `ddp_timeout`: it runs in a thread, and
the ranks exchange its state in short turns until it is done. The group is a gloo group of our own; the user's group is
never used. Before `init_process_group`, ranks communicate through `rendezvous.py`. A single process without a process
group, or without torch, is rank 0 of 1.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, PeerError
from hf_cloudtrain.runtime.patience import told_if_slow
from hf_cloudtrain.runtime.rendezvous import FolderStore, LauncherStore, Rendezvous, Store
from hf_cloudtrain.runtime.threads import at_exit, in_thread

T = TypeVar("T")

QUICK_SECONDS = 0.02
"""Work that ends within this time needs one turn."""
TURN_SECONDS = 0.25
"""Longest time between two turns, and so the longest delay of an answer."""
SETTLE_SECONDS = 0.1
"""Time for the threads of gloo at the end of a process, see `_settle_at_exit`."""
GROUP_TIMEOUT = datetime.timedelta(minutes=10)
"""A rank that takes part in no turn for this long is assumed to have crashed. Turns never wait for uploads."""


class Ranks:
    """The ranks of this job, as this process sees them.

    Example:
        >>> ranks = Ranks.current()
        >>> attempt = ranks.agree(lambda: take_attempt(), "start an attempt")   # rank 0 acts, all get the answer
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self.leaders: list[int] = [0]
        """The lowest rank of each disk, which moves the bytes. Known after `meet_disks`."""
        self.neighbours: list[int] = [rank]
        """The ranks that share the disk of this rank, itself included."""

    @classmethod
    def current(cls, folder: Path | None = None) -> Ranks:
        """The ranks of torch.distributed; one rank without a process group.

        Args:
            folder: where ranks of one host can communicate before a process group exists; None: they need a group.

        Raises:
            ConfigurationError: several ranks that cannot communicate.
        """
        dist = _torch_distributed()
        if dist is not None:
            return cls(dist.get_rank(), dist.get_world_size(), _GlooGroup(dist))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and folder is not None:
            return cls(rank := _rank(size), size, Rendezvous(_rendezvous_store(folder, size), rank, size))
        if size > 1 and "torch" in sys.modules:
            raise ConfigurationError(
                f"WORLD_SIZE is {size}, but no process group exists yet. Create TrainingArguments or Accelerator, or "
                "call torch.distributed.init_process_group, before restore()."
            )
        return cls()

    @property
    def group_size(self) -> int:
        """Number of ranks, by the process group if one exists by now."""
        dist = _torch_distributed()
        return self.size if dist is None else int(dist.get_world_size())

    def with_group(self) -> Ranks:
        """The same ranks over the process group, which is faster, if one exists by now. Call it on all ranks."""
        if isinstance(self._group, Rendezvous) and _torch_distributed() is not None:
            return Ranks.current()
        return self

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the records of the run and the messages for the user."""
        return self.rank == 0

    @property
    def is_leader(self) -> bool:
        """Whether this rank moves the bytes of its disk."""
        return self.rank in self.leaders

    def meet_disks(self, folder: Path) -> None:
        """Set `leaders` and `neighbours`: each rank creates a file in `folder` and lists those that it sees there."""
        if self.size == 1:
            return
        rendezvous = self.agree(lambda: os.urandom(8).hex(), "choose a name")
        mine = folder / f".meet-{rendezvous}-{self.rank}"

        def appear() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch()

        self.each(appear, f"write to {str(folder)!r}")
        prefix = f".meet-{rendezvous}-"
        seen = self.each(
            lambda: [int(name[len(prefix) :]) for name in os.listdir(folder) if name.startswith(prefix)],
            f"list {str(folder)!r}",
        )
        self.barrier()  # no rank removes its file before all have listed the folder
        mine.unlink(missing_ok=True)
        self.neighbours = sorted({self.rank, *seen[self.rank]})
        self.leaders = sorted({min([rank, *ranks]) for rank, ranks in enumerate(seen)})

    def barrier(self) -> None:
        """Wait for all ranks. Takes well under a millisecond on one host."""
        if self.size > 1:
            self._group.barrier()

    def agree(self, work: Callable[[], T], what: str) -> T:
        """Run `work` on rank 0; every rank gets its answer, or raises its error.

        Args:
            work: may take any time; its answer must be picklable.
            what: for the error message on the other ranks, as in "Rank 0 could not <what>".
        """
        return self._turns(work if self.is_main else None, what)[0]  # type: ignore[return-value]

    def each(self, work: Callable[[], T], what: str) -> list[T]:
        """Run `work` on every rank; every rank gets all answers in order of rank, or raises the first error."""
        return self._turns(work, what)  # type: ignore[return-value]

    def each_leader(self, work: Callable[[], T], what: str) -> list[T]:
        """Run `work` once per disk; every rank gets the leaders' answers, or raises the first error."""
        answers = self._turns(work if self.is_leader else None, what)
        return [answers[rank] for rank in self.leaders]  # type: ignore[misc]

    def here(self, work: Callable[[], T], what: str) -> T:
        """Run `work` on every rank, in this thread, as frameworks require; an error on one rank is raised on all."""
        error: Exception | None = None
        try:
            answer = work()
        except Exception as caught:  # noqa: BLE001 - raised again below, on every rank
            error = caught
        # A number takes a third of the time of an object, and errors are rare.
        (failed,) = self.begin_largest([float(error is not None)]).result()

        def raise_error() -> None:
            if error is not None:
                raise error

        if failed:
            self.each(raise_error, what)
        return answer

    def begin_largest(self, values: list[float]) -> Largest:
        """Start to find the largest of each value among all ranks, without waiting for the answer."""
        if self.size == 1:
            known: Future[list[float]] = Future()
            known.set_result(values)
            return known
        found: Largest = self._group.begin_largest(values)
        return found

    def _turns(self, work: Callable[[], T] | None, what: str) -> list[T | None]:
        """Exchange states in short turns until the work of every rank is done; what `agree` and `each` are made of."""
        if work is not None and self.is_main:
            with told_if_slow(what):
                return self._in_turns(work, what)
        return self._in_turns(work, what)

    def _in_turns(self, work: Callable[[], T] | None, what: str) -> list[T | None]:
        if self.size == 1:
            return [work() if work else None]
        task = in_thread(work) if work is not None else None
        if task is not None:
            wait([task], QUICK_SECONDS)
        pause = 0.001  # short at first, so that quick work does not wait
        while True:
            states = self._gather(_state(task))
            if all(done for done, _, _ in states):
                break
            pause = min(TURN_SECONDS, pause * 2)
            if task is not None and not task.done():
                wait([task], pause)
            else:
                time.sleep(pause)
        for rank, (_, _, error) in enumerate(states):
            if error is not None:
                if task is not None and (own := task.exception()) is not None:
                    raise own
                raise _peer_error(error, rank, what)
        return [answer for _, answer, _ in states]

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = self._group.gather(value)
        return found


class Largest(Protocol):
    """An answer in progress."""

    def done(self) -> bool:
        """Whether `result` returns at once."""

    def result(self) -> list[float]:
        """The answer. Raises PeerError if a rank has crashed."""


def rank_and_size() -> tuple[int, int]:
    """Rank and number of ranks, from the process group, else from the launcher's variables, else (0, 1)."""
    dist = _torch_distributed()
    if dist is not None:
        return int(dist.get_rank()), int(dist.get_world_size())
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (_rank(size), size) if size > 1 else (0, 1)


class _GlooGroup:
    """A group of our own: gloo works beside nccl, and a failure in it does not affect the user's group."""

    def __init__(self, dist: Any) -> None:
        self._dist = dist
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        _settle_at_exit()

    def barrier(self) -> None:
        with _peers():
            self._dist.barrier(group=self._group)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._dist.get_world_size()
        with _peers():
            self._dist.all_gather_object(values, value, group=self._group)
        return values

    def begin_largest(self, values: list[float]) -> Largest:
        import torch

        box = torch.tensor(values, dtype=torch.float64, device="cpu")
        work = self._dist.all_reduce(box, op=self._dist.ReduceOp.MAX, group=self._group, async_op=True)
        return _Reduced(box, work)


class _Reduced:
    """An all-reduce in progress."""

    def __init__(self, box: Any, work: Any) -> None:
        self._box = box
        self._work = work

    def done(self) -> bool:
        return bool(self._work.is_completed())

    def result(self) -> list[float]:
        with _peers():
            self._work.wait()
        values: list[float] = self._box.tolist()
        return values


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """Raise PeerError instead of gloo's error."""
    try:
        yield
    except RuntimeError as error:  # the type of all errors of gloo
        raise PeerError(
            f"Lost the connection to another rank ({(str(error).splitlines() or [''])[0]}). See its log."
        ) from error


def _state(task: Future[Any] | None) -> tuple[bool, Any, BaseException | None]:
    """(done, answer, error), as sent to the other ranks."""
    if task is None or not task.done():
        return task is None, None, None
    error = task.exception()
    if error is None:
        return True, task.result(), None
    # Other classes, a user's own included, may not be picklable, or not importable on the other ranks.
    is_ours = isinstance(error, CloudTrainError) and type(error).__module__.startswith("hf_cloudtrain.")
    return True, None, type(error)(str(error)) if is_ours else PeerError(repr(error))


def _torch_distributed() -> Any:
    """torch.distributed if a process group exists. Never imports torch: a process with a group has imported it."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist
    return None


@functools.cache
def _settle_at_exit() -> None:
    """At the end of the process, let gloo's threads release the objects of the last collectives; registered once.

    They do it some time after the collective has ended, and need the GIL for it. A thread that asks for the GIL while
    the interpreter shuts down aborts the process: "terminate called without an active exception" (PyTorch 2.13,
    `ProcessGroupGloo::runLoop`). Sleeping releases the GIL and the core.
    """
    at_exit(lambda: time.sleep(SETTLE_SECONDS))


def _rank(size: int) -> int:
    text = os.environ.get("RANK", "")
    if not text.isdecimal() or int(text) >= size:
        raise ConfigurationError(
            f"RANK={text!r} is out of range: WORLD_SIZE is {size}. Start the script with torchrun, or call "
            "torch.distributed.init_process_group first."
        )
    return int(text)


def _rendezvous_store(folder: Path, size: int) -> Store:
    """The store through which the ranks of this launch communicate without a process group."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return LauncherStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        raise ConfigurationError(
            f"The {size} ranks run on several hosts, and no process group exists yet. Call "
            "torch.distributed.init_process_group first."
        )
    return FolderStore(folder)


def _peer_error(error: BaseException, rank: int, what: str) -> CloudTrainError:
    # Errors of ours keep their class, so that `except RunHasCheckpointsError` works on every rank.
    if isinstance(error, CloudTrainError) and not isinstance(error, PeerError):
        return error
    return PeerError(f"Rank {rank} could not {what}: {error}")
