"""How processes meet that have no process group: over the launcher's own store, or over a folder that all of them see.

Neither place is empty: torchrun keeps its store when it restarts its workers, and a folder outlives every launch. So
the ranks introduce themselves first, and what an earlier process left is told apart by what it cannot know:

    every rank    hello-<rank> = a fresh nonce
    rank 0        roster = the nonces of all
    every rank    ack-<rank> = the roster, if its own nonce is in it
    rank 0        go = the roster, once all have acknowledged this one

A process that is gone acknowledges no roster with a fresh nonce in it. What travels afterwards has the roster's name.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib
import os
import pickle
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hf_cloudtrain.errors import PeerError

PATIENCE = 600.0
"""Seconds after which a rank that does not come is dead. Meetings are short, so no upload is ever in one."""
CONNECT_SECONDS = 60
"""Seconds in which the launcher's store must answer."""
LONGEST_PAUSE = 0.01
"""Seconds between two looks: what a meeting may come late."""


class Store(Protocol):
    """Where small values lie under names."""

    def put(self, key: str, value: bytes) -> None:
        """Store a value in one piece, over any other."""

    def get(self, key: str) -> bytes | None:
        """The value, or None where there is none."""

    def drop(self, key: str) -> None:
        """Forget a value, if it is there."""

    def tidy(self, name: str) -> None:
        """Forget what launches before this one, called `name`, have left."""


class Rendezvous:
    """The ranks of one launch, which have found each other.

    Args:
        store: a place that all ranks reach.
        rank: of this process.
        size: number of ranks.

    Raises:
        PeerError: a rank does not come.

    Example:
        >>> meeting = Meeting(FolderStore(Path("out/.cloudtrain/ranks")), rank=1, size=2)
        >>> meeting.gather("what rank 1 says")
        ['what rank 0 says', 'what rank 1 says']
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._count = 0
        self._asked: Asked | None = None
        self._name = hashlib.sha256(self._introduce().encode()).hexdigest()[:16]
        if rank == 0:
            store.tidy(self._name)

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives, in order of rank."""
        self._hear_out()
        self._count += 1
        self._store.put(self._key(self._count, self._rank), pickle.dumps(value))
        found: list[Any] = []
        for rank in range(self._size):
            _wait_for(
                lambda rank=rank: self._store.get(self._key(self._count, rank)) is not None,  # type: ignore[misc]
                lambda rank=rank: [rank],  # type: ignore[misc]
            )
            data = self._store.get(self._key(self._count, rank))
            assert data is not None
            found.append(pickle.loads(data))  # noqa: S301 - from our own ranks; torch.distributed does the same
        # Whoever has come to this meeting has read everything of the last one.
        self._store.drop(self._key(self._count - 1, self._rank))
        return found

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)

    def broadcast(self, value: Any) -> Any:
        """What rank 0 gives."""
        return self.gather(value)[0]

    def begin_largest(self, values: list[float]) -> Asked:
        """The largest of each value among all ranks, once all have said theirs."""
        self._hear_out()
        self._count += 1
        self._store.put(self._key(self._count, self._rank), pickle.dumps(values))
        keys = [self._key(self._count, rank) for rank in range(self._size)]
        self._asked = Asked(self._store, keys, self._key(self._count - 1, self._rank))
        return self._asked

    def _hear_out(self) -> None:
        """Read what was asked before: who comes to the next meeting lets the others forget what they said in the last."""
        if self._asked is not None:
            self._asked.wait()
            self._asked = None

    def _key(self, count: int, rank: int) -> str:
        return f"{self._name}-{count}-{rank}"

    def _introduce(self) -> str:
        """The roster that all ranks of this launch agree on."""
        nonce = secrets.token_hex(8)
        self._store.put(f"hello-{self._rank}", nonce.encode())
        roster = ""

        def invite() -> bool:
            nonlocal roster
            hellos = [self._text(f"hello-{rank}") for rank in range(self._size)]
            if not all(hellos):
                return False
            if (now := ".".join(hellos)) != roster:
                # A rank came whose predecessor had left a nonce.
                roster = now
                self._store.put("roster", roster.encode())
            if any(self._text(f"ack-{rank}") != roster for rank in range(1, self._size)):
                return False
            self._store.put("go", roster.encode())
            return True

        def follow() -> bool:
            nonlocal roster
            now = self._text("roster")
            names = now.split(".")
            if len(names) != self._size or names[self._rank] != nonce:
                return False
            if now != roster:
                roster = now
                self._store.put(f"ack-{self._rank}", roster.encode())
            return self._text("go") == roster

        def missing() -> list[int]:
            if self._rank:
                return [0]
            acks = {rank: self._text(f"ack-{rank}") for rank in range(1, self._size)}
            return [rank for rank, ack in acks.items() if not ack or ack != roster]

        _wait_for(follow if self._rank else invite, missing)
        return roster

    def _text(self, key: str) -> str:
        return (self._store.get(key) or b"").decode()


class Asked:
    """What ranks say one after another."""

    def __init__(self, store: Store, keys: list[str], before: str) -> None:
        self._store = store
        self._missing = keys
        self._before = before
        self._found: list[list[float]] = []

    def is_there(self) -> bool:
        """Whether all have said it."""
        while self._missing and (data := self._store.get(self._missing[0])) is not None:
            self._found.append(pickle.loads(data))  # noqa: S301 - from our own ranks
            del self._missing[0]
            if not self._missing:
                self._store.drop(
                    self._before
                )  # who has come to this meeting has read everything of the last one
        return not self._missing

    def wait(self) -> None:
        """Until all have said it. Raises PeerError where a rank does not come."""
        _wait_for(self.is_there, lambda: [int(key.rpartition("-")[2]) for key in self._missing])

    def get(self) -> list[float]:
        """The largest of each value. Raises PeerError where a rank does not come."""
        self.wait()
        return [max(column) for column in zip(*self._found, strict=True)]


class Met:
    """What is known already."""

    def __init__(self, values: list[float]) -> None:
        self._values = values

    def is_there(self) -> bool:
        """It is."""
        return True

    def get(self) -> list[float]:
        """The values."""
        return self._values


class FolderStore:
    """Values as files of a folder that all ranks see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, value: bytes) -> None:
        """Store a value in one piece, over any other."""
        beside = self._folder / f".{key}-{os.getpid()}"
        beside.write_bytes(value)
        os.replace(beside, self._folder / key)

    def get(self, key: str) -> bytes | None:
        """The value, or None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / key).read_bytes()
        return None

    def drop(self, key: str) -> None:
        """Forget a value, if it is there."""
        (self._folder / key).unlink(missing_ok=True)

    def tidy(self, name: str) -> None:
        """Forget what launches before this one, called `name`, have left."""
        for path in self._folder.iterdir():
            if re.fullmatch(r"\.?[0-9a-f]{16}-\d+-\d+(-\d+)?", path.name) and name not in path.name:
                path.unlink(missing_ok=True)


class LauncherStore:
    """The store that torchrun serves for its workers.

    Raises:
        PeerError: it does not answer.
    """

    def __init__(self, host: str, port: int) -> None:
        dist: Any = importlib.import_module("torch.distributed")

        def connect() -> Any:
            return dist.TCPStore(
                host,
                port,
                is_master=False,
                timeout=datetime.timedelta(seconds=CONNECT_SECONDS),
                wait_for_workers=False,
            )

        self._where = f"{host}:{port}"
        self._store = dist.PrefixStore("cloudtrain", self._ask(connect))

    def put(self, key: str, value: bytes) -> None:
        """Store a value in one piece, over any other."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes | None:
        """The value, or None where there is none."""
        # `get` of a key that is not there would block.
        value: bytes | None = self._ask(lambda: self._store.get(key) if self._store.check([key]) else None)
        return value

    def drop(self, key: str) -> None:
        """Forget a value, if it is there."""
        self._ask(lambda: self._store.delete_key(key))

    def tidy(self, name: str) -> None:
        """Nothing: it ends with the launcher, and each launch leaves one small value a rank."""

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:  # every error of torch's stores is one
            raise PeerError(
                f"The launcher's store at {self._where!r} does not answer ({str(error).splitlines()[0]}). Start the job "
                "again, or call torch.distributed.init_process_group first."
            ) from error


def _wait_for(condition: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
    deadline = time.monotonic() + PATIENCE
    pause = 0.0002
    while not condition():
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing()))
            raise PeerError(
                f"Rank {ranks} did not come to a meeting of the ranks in {PATIENCE:.0f} s. Every rank must call the same "
                "functions. If the ranks share neither a launcher nor a disk, call torch.distributed.init_process_group "
                "first."
            )
        time.sleep(pause)
        pause = min(LONGEST_PAUSE, pause * 2)
