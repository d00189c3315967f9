"""Which process this is, and how the processes of one job agree.

A decision is taken once and broadcast, and an error anywhere is an error everywhere. Work that may wait for the
network or the disk never runs inside a collective (those die at `ddp_timeout`): it runs in a thread, and the ranks
meet in short turns until it is over. The group is our own gloo group; the user's is never touched. Where there is no
process group yet, ranks may meet elsewhere (`meeting.py`). Without torch, or before `init_process_group` in a single
process, the world has one rank.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, PeerError
from hf_cloudtrain.runtime.rendezvous import FolderStore, LauncherStore, Met, Rendezvous, Store
from hf_cloudtrain.runtime.threads import at_exit

T = TypeVar("T")

QUICK_SECONDS = 0.02
"""Work that is over by then needs one meeting of the ranks."""
TURN_SECONDS = 0.25
"""Longest time between two meetings of the ranks while one of them works: what they may answer late."""

SETTLE_SECONDS = 0.1
"""What the threads of gloo get at the end of a process, see `_let_gloo_settle`."""

GROUP_TIMEOUT = datetime.timedelta(minutes=10)
"""A rank that does not come to a meeting for this long is dead. Turns are short, so no upload is ever in it."""


class Ranks:
    """The processes of this job, as this process sees them.

    Example:
        >>> ranks = Ranks.current()
        >>> attempt = world.agree(lambda: take_attempt(), "start an attempt")   # rank 0 acts, all get the answer
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self.leaders: list[int] = [0]
        """The lowest rank of each disk: those that move bytes. Known after `meet_disks`."""
        self.neighbours: list[int] = [rank]
        """The ranks that share this one's disk, itself included."""

    @classmethod
    def current(cls, folder: Path | None = None) -> Ranks:
        """The world as torch.distributed has it now; one rank where there is no process group.

        Args:
            folder: where ranks of one host that have no process group yet may meet; None: they must have one.

        Raises:
            ConfigurationError: several processes that cannot meet.
        """
        dist = _torch_distributed()
        if dist is not None:
            return cls(dist.get_rank(), dist.get_world_size(), _GlooGroup(dist))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and folder is not None:
            return cls(rank := _rank(size), size, Rendezvous(_rendezvous_store(folder, size), rank, size))
        if size > 1 and "torch" in sys.modules:
            raise ConfigurationError(
                f"WORLD_SIZE is {size}, but no process group exists yet. Make TrainingArguments (or Accelerator, or "
                "torch.distributed.init_process_group) before restore()."
            )
        return cls()

    @property
    def group_size(self) -> int:
        """Ranks of the process group, where one has appeared since; else of this world."""
        dist = _torch_distributed()
        return self.size if dist is None else int(dist.get_world_size())

    def with_group(self) -> Ranks:
        """This world, by way of the process group where one has appeared since: it is quicker. On all ranks."""
        if isinstance(self._group, Rendezvous) and _torch_distributed() is not None:
            return Ranks.current()
        return self

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which talks to the catalog and to the person."""
        return self.rank == 0

    @property
    def is_leader(self) -> bool:
        """Whether this rank moves the bytes of its disk."""
        return self.rank in self.leaders

    def meet_disks(self, folder: Path) -> None:
        """Find out which ranks share the disk of `folder`, by what each sees there: `leaders` and `neighbours`."""
        if self.size == 1:
            return
        rendezvous = self._broadcast(os.urandom(8).hex())
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
        self.barrier()  # nobody removes its mark before all have looked
        mine.unlink(missing_ok=True)
        self.neighbours = sorted({self.rank, *seen[self.rank]})
        self.leaders = sorted({min([rank, *ranks]) for rank, ranks in enumerate(seen)})

    def barrier(self) -> None:
        """Wait until all ranks are here. Takes well under a millisecond on one host."""
        if self.size > 1:
            self._group.barrier()

    def agree(self, work: Callable[[], T], what: str) -> T:
        """Run `work` on rank 0 and give every rank its answer, or raise its error on every rank.

        Args:
            work: may take as long as it likes; must return something picklable.
            what: the words of the error message on the other ranks, as in "rank 0 could not <what>".
        """
        return self._turns(work if self.is_main else None, what)[0]  # type: ignore[return-value]

    def each(self, work: Callable[[], T], what: str) -> list[T]:
        """Run `work` on every rank; every rank gets all answers in order of rank, or the first error."""
        return self._turns(work, what)  # type: ignore[return-value]

    def each_leader(self, work: Callable[[], T], what: str) -> list[T]:
        """Run `work` once a disk; every rank gets the leaders' answers, or the first error."""
        answers = self._turns(work if self.is_leader else None, what)
        return [answers[rank] for rank in self.leaders]  # type: ignore[misc]

    def here(self, work: Callable[[], T], what: str) -> T:
        """Run `work` on every rank in this thread, where frameworks expect their calls; an error of one is one of all."""
        error: Exception | None = None
        try:
            answer = work()
        except Exception as caught:  # noqa: BLE001 - raised again below, on every rank
            error = caught
        # A number travels in a third of the time of an object, and errors are rare.
        (failed,) = self.begin_largest([float(error is not None)]).get()

        def tell() -> None:
            if error is not None:
                raise error

        if failed:
            self.each(tell, what)
        return answer

    def begin_largest(self, values: list[float]) -> Largest:
        """Ask for the largest of each value among all ranks, and go on: the answer comes while they work."""
        if self.size == 1:
            return Met(values)
        found: Largest = self._group.begin_largest(values)
        return found

    def _turns(self, work: Callable[[], T] | None, what: str) -> list[T | None]:
        """Meet in short turns until every rank's work is over; the core of all three above."""
        if self.size == 1:
            return [work() if work else None]
        task = _Task(work)
        task.settle(QUICK_SECONDS)
        pause = 0.001
        while True:
            states = self._gather(task.state())
            if all(done for done, _, _ in states):
                break
            # Short at first, so that quick work is answered quickly.
            pause = min(TURN_SECONDS, pause * 2)
            task.wait(pause)
        for rank, (_, _, error) in enumerate(states):
            if error is not None:
                if task.error is not None:
                    raise task.error
                raise _peer_error(error, rank, what)
        return [answer for _, answer, _ in states]

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = self._group.gather(value)
        return found

    def _broadcast(self, value: T) -> T:
        answer: T = self._group.broadcast(value)
        return answer


class Largest(Protocol):
    """An answer under way."""

    def is_there(self) -> bool:
        """Whether `get` answers at once."""

    def get(self) -> list[float]:
        """The answer. Raises PeerError where a rank is gone."""


def rank_and_size() -> tuple[int, int]:
    """This process among its like: as the process group says, else as the launcher does; (0, 1) where it is alone."""
    dist = _torch_distributed()
    if dist is not None:
        return int(dist.get_rank()), int(dist.get_world_size())
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return (_rank(size), size) if size > 1 else (0, 1)


class _GlooGroup:
    """A group of our own: gloo works beside nccl, and a failed member cannot poison the user's."""

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

    def broadcast(self, value: Any) -> Any:
        box = [value]
        with _peers():
            self._dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def begin_largest(self, values: list[float]) -> Largest:
        import torch

        box = torch.tensor(values, dtype=torch.float64, device="cpu")
        work = self._dist.all_reduce(box, op=self._dist.ReduceOp.MAX, group=self._group, async_op=True)
        return _Reduced(box, work)


class _Reduced:
    """An all-reduce under way."""

    def __init__(self, box: Any, work: Any) -> None:
        self._box = box
        self._work = work

    def is_there(self) -> bool:
        return bool(self._work.is_completed())

    def get(self) -> list[float]:
        with _peers():
            self._work.wait()
        values: list[float] = self._box.tolist()
        return values


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """A rank that has gone is told in our words."""
    try:
        yield
    except RuntimeError as error:  # every error of gloo is one
        raise PeerError(f"Another rank is gone ({(str(error).splitlines() or [''])[0]}).") from error


class _Task:
    """Work in a thread of its own, and what the other ranks may know of it."""

    def __init__(self, work: Callable[[], Any] | None) -> None:
        self.error: BaseException | None = None
        self._answer: Any = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="cloudtrain-turn", daemon=True)
        if work is not None:
            self._thread.start()

    def state(self) -> tuple[bool, Any, BaseException | None]:
        """(over, answer, error), as it travels to the other ranks."""
        if self._thread.is_alive():
            return False, None, None
        return True, self._answer, _picklable(self.error)

    def settle(self, seconds: float) -> None:
        """Wait for the work, where there is any."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def wait(self, seconds: float) -> None:
        """Wait for the work, or as long for that of other ranks."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        else:
            time.sleep(seconds)

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._answer = work()
        except BaseException as error:  # noqa: BLE001 - it must reach every rank, whatever it is
            self.error = error


def _torch_distributed() -> Any:
    """torch.distributed if a process group exists. Never imports torch: who has a group has it imported."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist
    return None


@functools.cache
def _settle_at_exit() -> None:
    """Register `_let_gloo_settle`, once."""
    at_exit(_let_gloo_settle)


def _let_gloo_settle() -> None:
    """Let gloo's threads drop what the last collectives have left, while the interpreter still runs.

    They do it some time after the collective is over, and need the interpreter's lock for it. One that asks for the
    lock when the interpreter is ending aborts the process: "terminate called without an active exception" (PyTorch
    2.13, `ProcessGroupGloo::runLoop`). Sleeping gives the lock, and the core, away.
    """
    time.sleep(SETTLE_SECONDS)


def _rank(size: int) -> int:
    text = os.environ.get("RANK", "")
    if not text.isdecimal() or int(text) >= size:
        raise ConfigurationError(
            f"WORLD_SIZE is {size}, and RANK={text!r} is none of its ranks. Start the script with torchrun, or call "
            "torch.distributed.init_process_group first."
        )
    return int(text)


def _rendezvous_store(folder: Path, size: int) -> Store:
    """Where the ranks of this launch meet while they have no process group."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return LauncherStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        raise ConfigurationError(
            f"WORLD_SIZE is {size}, on several hosts, and there is no process group yet by which they could agree. Call "
            "torch.distributed.init_process_group first."
        )
    return FolderStore(folder)


def _picklable(error: BaseException | None) -> BaseException | None:
    if error is None:
        return None
    return (
        type(error)(str(error))
        if type(error).__module__ == "hf_cloudtrain.errors"
        else PeerError(repr(error))
    )


def _peer_error(error: BaseException, rank: int, what: str) -> CloudTrainError:
    # Our own kinds keep their kind, so that `except RunHasCheckpointsError` works on every rank.
    if isinstance(error, CloudTrainError) and not isinstance(error, PeerError):
        return error
    return PeerError(f"Rank {rank} could not {what}: {error}")
