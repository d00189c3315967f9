"""Which process this is, and how the processes of one job agree.

A decision is taken once and broadcast, and an error anywhere is an error everywhere. Work that may wait for the
network or the disk never runs inside a collective (those die at `ddp_timeout`): it runs in a thread, and the ranks
meet in short turns until it is over. The group is our own gloo group; the user's is never touched. Without torch,
or before `init_process_group` in a single process, the world has one rank.
"""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, PeerError

T = TypeVar("T")

TURN_SECONDS = 0.25
"""Longest time between two meetings of the ranks while one of them works: what they may answer late."""

GROUP_TIMEOUT = datetime.timedelta(minutes=10)
"""A rank that does not come to a meeting for this long is dead. Turns are short, so no upload is ever in it."""


class World:
    """The processes of this job, as this process sees them.

    Example:
        >>> world = World.current()
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
    def current(cls) -> World:
        """The world as torch.distributed has it now; one rank where there is no process group."""
        dist = _torch_distributed()
        if dist is not None:
            # A gloo group works beside nccl, and a failed member cannot poison the user's own group.
            return cls(
                dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
            )
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1 and "torch" in sys.modules:
            raise ConfigurationError(
                f"WORLD_SIZE is {size}, but no process group exists yet. Make TrainingArguments (or Accelerator, or "
                "torch.distributed.init_process_group) before restore()."
            )
        return cls()

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
        meeting = self._broadcast(os.urandom(8).hex())
        mine = folder / f".meet-{meeting}-{self.rank}"

        def appear() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch()

        self.each(appear, f"write to {str(folder)!r}")
        prefix = f".meet-{meeting}-"
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
            dist = _torch_distributed()
            assert dist is not None
            dist.barrier(group=self._group)

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

    def _turns(self, work: Callable[[], T] | None, what: str) -> list[T | None]:
        """Meet in short turns until every rank's work is over; the core of all three above."""
        if self.size == 1:
            return [work() if work else None]
        task = _Task(work)
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
        dist = _torch_distributed()
        assert dist is not None
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _broadcast(self, value: T) -> T:
        dist = _torch_distributed()
        assert dist is not None
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


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

    def wait(self, seconds: float) -> None:
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
