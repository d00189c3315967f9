"""Signals that ask a process to go, heard without ending it, and given back afterwards.

A handler only notes what came: it runs between two lines of anybody's code. Handlers act in the process that
installed them alone; a forked child (a loader worker, a pool) gets back what was there before, and a loader worker leaves
the process group. Under some launchers
one notice arrives as three signals, so a second one is no news, except for Ctrl-C: a second one quits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

logger = logging.getLogger(__name__)

STOPPING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT") if hasattr(signal, name)
)
"""SIGTERM: most schedulers. SIGUSR1 and SIGUSR2: Slurm's `--signal`. SIGINT: Ctrl-C."""


class SignalWatch:
    """Listens to the signals of `STOPPING`, on the main thread; elsewhere Python has no handlers.

    Args:
        tell: hears the number of the first signal, within the handler: it must only note it.
        patience: seconds after the first signal in which others are no news; later ones go to who was there before.
        within: code of a function; while that is not running, signals go to who was there before.

    Example:
        >>> watch = SignalWatch(seen.append, patience=lambda: 30.0)
        >>> watch.start()
        >>> watch.close()          # what was there before is there again
    """

    def __init__(
        self,
        tell: Callable[[int], None],
        *,
        patience: Callable[[], float],
        within: CodeType | None = None,
    ) -> None:
        self._tell = tell
        self._patience = patience
        self._within = within
        self._before: dict[int, Any] = {}
        self._came: dict[int, float] = {}
        self._pid = os.getpid()

    def start(self) -> None:
        """Install the handlers; a signal that is ignored, or handled in C, stays as it is."""
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "Signals are heard on the main thread only, and this is another: no save on SIGTERM."
            )
            return
        for number in STOPPING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._handle)
        _live.add(self)

    def close(self) -> None:
        """Give back what was there before, unless somebody has taken it since."""
        _live.discard(self)
        if os.getpid() != self._pid or threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._before = {}

    def call_others(self) -> None:
        """Let the handlers that were there before hear, after all, what came. Python's own for Ctrl-C is none of them."""
        for number in self._came:
            handler = self._before.get(number)
            if callable(handler) and handler is not signal.default_int_handler:
                handler(number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if os.getpid() != self._pid or not _is_running(self._within, frame):
            self._pass_on(number, frame)
        elif not self._came:
            self._came[number] = now
            self._tell(number)
        elif number == signal.SIGINT and number in self._came:
            raise KeyboardInterrupt
        elif now - min(self._came.values()) > self._patience():
            self._pass_on(number, frame)
        else:
            self._came.setdefault(number, now)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        handler = self._before.get(number, signal.SIG_DFL)
        if callable(handler):
            handler(number, frame)
        else:
            signal.signal(number, handler)
            os.kill(os.getpid(), number)


_live: weakref.WeakSet[SignalWatch] = weakref.WeakSet()


def _give_back_in_child() -> None:
    if _is_loader_worker():
        # torchrun, Slurm and terminals signal a whole process group. A worker that dies of it would end the training
        # before its save; torch's workers notice by themselves when their parent is gone.
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
    for watch in list(_live):
        for number, handler in watch._before.items():
            signal.signal(number, handler)
        _live.discard(watch)


os.register_at_fork(after_in_child=_give_back_in_child)


def _is_loader_worker() -> bool:
    """Whether this process was just forked by torch's DataLoader; asked in the child, whose stack is still its parent's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.data.dataloader":
            return True
        frame = frame.f_back
    return False


def _is_running(code: CodeType | None, frame: FrameType | None) -> bool:
    while code is not None and frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return code is None
