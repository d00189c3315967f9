"""SIGKILL to this process or its whole job at a chosen point; a file records the phases that the process is in."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Phases = Mapping[str, tuple[Any, str]]
"""Phases by name: the class or module, and the method or function of it."""
STATE_BYTES = 128


@dataclass(frozen=True)
class Aim:
    """Where to kill: at the n-th Python call or return in one visit of a phase, or at the end of the visit."""

    phase: str
    visit: int
    event: int
    whole_job: bool = True
    """The whole process group, as when a machine is lost; False: this process only."""

    def given(self) -> dict[str, Any]:
        """As an argument for a child process."""
        return asdict(self)

    def hit(self) -> None:
        """Kill now."""
        (os.killpg if self.whole_job else os.kill)(
            os.getpgrp() if self.whole_job else os.getpid(), signal.SIGKILL
        )


class Watch:
    """Records the phases of this process, from `begin` on.

    Args:
        state: file that always names the current phases; it is still there after a kill.
    """

    def __init__(self, phases: Phases, state: str, aim: Aim | None) -> None:
        self.events: dict[str, int] = {}
        """The most Python calls and returns in one visit of each phase."""
        self.visits: Counter[str] = Counter()
        self._phases = phases
        self._aim = aim
        self._file = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._active: Counter[str] = Counter()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Patch the methods, for the rest of the process."""
        for phase, (owner, method) in self._phases.items():
            setattr(owner, method, self._watched(phase, getattr(owner, method)))

    def _watched(self, phase: str, plain: Any) -> Any:
        @functools.wraps(plain)
        def watched(*args: Any, **kwargs: Any) -> Any:
            visit = self._enter(phase)
            aim = self._aim if self._aim and (self._aim.phase, self._aim.visit) == (phase, visit) else None
            counter = Counting(aim)
            try:
                with counter:
                    return plain(*args, **kwargs)
            finally:
                self.events[phase] = max(self.events.get(phase, 0), counter.seen)
                self._change(phase, -1)

        return watched

    def _enter(self, phase: str) -> int:
        with self._lock:
            self.visits[phase] += 1
            visit = self.visits[phase]
        self._change(phase, 1)
        return visit

    def _change(self, phase: str, count: int) -> None:
        with self._lock:
            self._active[phase] += count
            active = "+".join(name for name in self._phases if self._active[name])
            os.pwrite(self._file, active.encode().ljust(STATE_BYTES), 0)


class Counting:
    """Counts the Python calls and returns of this thread, and kills at the n-th, or at the end if there are fewer."""

    def __init__(self, aim: Aim | None) -> None:
        self.seen = 0
        self._aim = aim
        self._at = aim.event if aim else -1

    def __enter__(self) -> None:
        self._outer = sys.getprofile()
        sys.setprofile(self._count)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._outer)
        if self._aim is not None:
            self._aim.hit()

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        self.seen += 1
        if self.seen == self._at and self._aim is not None:
            self._aim.hit()
        if self._outer is not None:
            self._outer(frame, event, argument)
