"""A training process that is killed at a chosen point, and says on a file in which phases it is."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections import Counter
from typing import Any

from transformers import Trainer

from hf_cloudtrain.checkpointer import Checkpointer
from hf_cloudtrain.storage import Storage
from hf_cloudtrain.uploader import _Sender
from tests.integration._attempts import train

PHASES: dict[str, tuple[type, str]] = {
    "flush": (Checkpointer, "_finish_left_overs"),
    "restore": (Checkpointer, "restore"),
    "download": (Storage, "download"),
    "begin": (Checkpointer, "begin"),
    "Trainer's save": (Trainer, "_save_checkpoint"),
    "save": (Checkpointer, "save"),
    "upload": (Storage, "upload"),
    "commit": (_Sender, "_commit"),
    "end": (Checkpointer, "wait"),
}
STATE_BYTES = 128
EVENTS: dict[str, int] = {}
"""The most calls and returns of Python that a visit of each phase took."""


def attempt(*, state: str, aim: str | None = None, visit: int = 1, event: int = 0, **arguments: Any) -> Any:
    """Train; with `aim`, SIGKILL at the n-th call or return of Python within, or at the end of, that visit of a phase.

    Args:
        state: file that always names the phases this process is in.
    """
    where = State(state)
    for name, (owner, method) in PHASES.items():
        watch(owner, method, name, where, kill=(visit, event) if name == aim else None)
    return {**train(**arguments), "events": EVENTS}


class State:
    """The phases that any thread is in, on a file that outlives the process."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._active: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, phase: str, count: int) -> None:
        with self._lock:
            self._active[phase] += count
            active = "+".join(name for name in PHASES if self._active[name])
            os.pwrite(self._file, active.encode().ljust(STATE_BYTES), 0)


def watch(owner: type, method: str, phase: str, where: State, kill: tuple[int, int] | None) -> None:
    plain = getattr(owner, method)
    visits = iter(range(1, sys.maxsize))

    @functools.wraps(plain)
    def watched(*args: Any, **kwargs: Any) -> Any:
        where.add(phase, 1)
        visit = next(visits)
        counter = Counting(kill[1] if kill and kill[0] == visit else None)
        try:
            with counter:
                return plain(*args, **kwargs)
        finally:
            EVENTS[phase] = max(EVENTS.get(phase, 0), counter.seen)
            where.add(phase, -1)

    setattr(owner, method, watched)


class Counting:
    """Counts the calls and returns of this thread; SIGKILL at the n-th, or at the end where there are fewer."""

    def __init__(self, at: int | None) -> None:
        self.seen = 0
        self._at = at

    def __enter__(self) -> None:
        self._outer = sys.getprofile()
        sys.setprofile(self._hear)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._outer)
        if self._at is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    def _hear(self, frame: Any, event: str, argument: Any) -> None:
        self.seen += 1
        if self.seen == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._outer is not None:
            self._outer(frame, event, argument)
