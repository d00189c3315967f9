"""Communication of ranks without a process group: through the launcher's store, or a folder that all of them see.

Both may hold values of earlier processes: torchrun keeps its store when it restarts its workers, and a folder outlives
every launch. So the ranks of a launch first agree on a roster:

    every rank    hello-<rank> = a fresh nonce
    rank 0        roster = the nonces of all
    every rank    ack-<rank> = the roster, if its own nonce is in it
    rank 0        go = the roster, once all have acknowledged this one

A process that has ended cannot acknowledge a roster with a fresh nonce in it. All later keys contain the roster's name.
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
"""Seconds after which a silent rank is assumed to have crashed. Ranks never exchange values while they upload."""
CONNECT_SECONDS = 60
"""Seconds in which the launcher's store must answer."""
LONGEST_PAUSE = 0.01
"""Most seconds between two reads of the store, and so the longest delay of an answer."""


class Store(Protocol):
    """Small values by key, shared by all ranks."""

    def put(self, key: str, value: bytes) -> None:
        """Store a value, replacing any other. Readers see all of it or none."""

    def get(self, key: str) -> bytes | None:
        """The value, or None if there is none."""

    def drop(self, key: str) -> None:
        """Delete a value, if there is one."""

    def tidy(self, name: str) -> None:
        """Delete what earlier launches left; the keys of this one contain `name`."""


class Rendezvous:
    """The ranks of one launch, connected through a store. Raises PeerError if a rank does not answer.

    Example:
        >>> rendezvous = Rendezvous(FolderStore(Path("out/_cloudtrain/ranks")), rank=1, size=2)
        >>> rendezvous.gather("value of rank 1")
        ['value of rank 0', 'value of rank 1']
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._count = 0
        self._pending: Round | None = None
        self._name = hashlib.sha256(self._agree_on_roster().encode()).hexdigest()[:16]
        if rank == 0:
            store.tidy(self._name)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank."""
        return self._begin(value).values()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)

    def begin_largest(self, values: list[float]) -> Round:
        """Start to find the largest of each value among all ranks."""
        self._pending = self._begin(values)
        return self._pending

    def _begin(self, value: Any) -> Round:
        if self._pending is not None:
            # Read it before the next round, in which the other ranks delete their values of it.
            self._pending.values()
            self._pending = None
        self._count += 1
        self._store.put(self._key(self._count, self._rank), pickle.dumps(value))
        keys = [self._key(self._count, rank) for rank in range(self._size)]
        return Round(self._store, keys, self._key(self._count - 1, self._rank))

    def _key(self, count: int, rank: int) -> str:
        return f"{self._name}-{count}-{rank}"

    def _agree_on_roster(self) -> str:
        """The roster: the nonces of all ranks of this launch."""
        nonce = secrets.token_hex(8)
        self._store.put(f"hello-{self._rank}", nonce.encode())
        roster = ""

        def invite() -> bool:
            nonlocal roster
            hellos = [self._text(f"hello-{rank}") for rank in range(self._size)]
            if not all(hellos):
                return False
            if (now := ".".join(hellos)) != roster:
                # The nonce of an ended process was replaced by that of its successor.
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


class Round:
    """One round, in which every rank sends one value."""

    def __init__(self, store: Store, keys: list[str], last: str) -> None:
        self._store = store
        self._missing = keys
        self._last = last
        self._found: list[Any] = []

    def done(self) -> bool:
        """Whether the values of all ranks have arrived."""
        while self._missing and (data := self._store.get(self._missing[0])) is not None:
            self._found.append(pickle.loads(data))  # noqa: S301 - from our own ranks; torch.distributed does the same
            del self._missing[0]
            if not self._missing:
                # Every rank is in this round, so every rank has read all values of the last one.
                self._store.drop(self._last)
        return not self._missing

    def values(self) -> list[Any]:
        """The values, in order of rank. Raises PeerError if a rank does not answer."""
        _wait_for(self.done, self._silent)
        return self._found

    def result(self) -> list[float]:
        """The largest of each value. Raises PeerError if a rank does not answer."""
        return [max(column) for column in zip(*self.values(), strict=True)]

    def _silent(self) -> list[int]:
        missing = [key for key in self._missing if self._store.get(key) is None]
        return [int(key.rpartition("-")[2]) for key in missing]


class FolderStore:
    """Values as files in a folder that all ranks see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, value: bytes) -> None:
        beside = self._folder / f".{key}-{os.getpid()}"
        beside.write_bytes(value)
        os.replace(beside, self._folder / key)

    def get(self, key: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / key).read_bytes()
        return None

    def drop(self, key: str) -> None:
        (self._folder / key).unlink(missing_ok=True)

    def tidy(self, name: str) -> None:
        for path in self._folder.iterdir():
            if re.fullmatch(r"\.?[0-9a-f]{16}-\d+-\d+(-\d+)?", path.name) and name not in path.name:
                path.unlink(missing_ok=True)


class LauncherStore:
    """The store that torchrun serves to its workers.

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
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes | None:
        # `get` of a missing key would block.
        value: bytes | None = self._ask(lambda: self._store.get(key) if self._store.check([key]) else None)
        return value

    def drop(self, key: str) -> None:
        self._ask(lambda: self._store.delete_key(key))

    def tidy(self, name: str) -> None:
        """Do nothing: each launch leaves one small value per rank, and the store ends with the launcher."""

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:  # the type of all errors of torch's stores
            raise PeerError(
                f"The launcher's store at {self._where!r} does not answer ({str(error).splitlines()[0]}). Restart the "
                "job, or call torch.distributed.init_process_group first."
            ) from error


def _wait_for(condition: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
    deadline = time.monotonic() + PATIENCE
    pause = 0.0002
    while not condition():
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing()))
            raise PeerError(
                f"Rank {ranks} did not answer within {PATIENCE:.0f} s. Every rank must call the same "
                "functions. If the ranks share neither a launcher nor a disk, call "
                "torch.distributed.init_process_group first."
            )
        time.sleep(pause)
        pause = min(LONGEST_PAUSE, pause * 2)
