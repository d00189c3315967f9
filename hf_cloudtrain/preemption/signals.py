"""Signals that ask a process to stop: noted without ending it, and given back to the previous handlers afterwards.

A handler only takes a note, because it runs between two lines of anybody's code. Handlers act only in the process that
installed them: a forked child (a loader worker, a pool) gets the previous ones back, and a loader worker leaves the process
group. Some launchers send three signals for one preemption, so only the first one counts. The exception is Ctrl-C: a second
one quits.
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
    getattr(signal, name)
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT")
    if hasattr(signal, name)
)
"""SIGTERM: most schedulers. SIGUSR1 and SIGUSR2: Slurm's `--signal`. SIGHUP: a closed terminal. SIGINT: Ctrl-C."""


class SignalWatch:
    """Handlers for the signals of `STOPPING`, on the main thread: Python runs no handler on other threads.

    Args:
        on_signal: receives the number of the first signal, inside the handler: it must only note it.
        patience: seconds after the first signal during which further ones are ignored; later ones go to the previous handler.
        within: code of a function; while it is not running, signals go to the previous handler.

    Example:
        >>> watch = SignalWatch(seen.append, patience=lambda: 30.0)
        >>> watch.start()
        >>> watch.close()          # the previous handlers are back
    """

    def __init__(
        self,
        on_signal: Callable[[int], None],
        *,
        patience: Callable[[], float],
        within: CodeType | None = None,
    ) -> None:
        self._on_signal = on_signal
        self._patience = patience
        self._within = within
        self._previous: dict[int, Any] = {}
        self._received: dict[int, float] = {}
        self._terminals: list[int] = []
        """stdout and stderr, where they are a terminal."""
        self._pid = os.getpid()

    def start(self) -> None:
        """Install the handlers; a signal that is ignored, or handled in C, stays as it is."""
        if threading.current_thread() is not threading.main_thread():
            logger.warning(
                "Signal handlers can only be installed on the main thread, so SIGTERM causes no emergency save."
            )
            return
        for number in STOPPING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, self._handle)
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        _live.add(self)

    def close(self) -> None:
        """Restore the previous handlers, except where other code has replaced ours since."""
        _live.discard(self)
        if os.getpid() != self._pid or threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._previous = {}

    def call_previous(self) -> None:
        """Pass the signals that came to the previous handlers, late; not to Python's own for Ctrl-C."""
        for number in self._received:
            handler = self._previous.get(number)
            if callable(handler) and handler is not signal.default_int_handler:
                handler(number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == getattr(signal, "SIGHUP", None):
            _write_to_nothing(self._terminals)
        if os.getpid() != self._pid or not _is_running(self._within, frame):
            self._pass_on(number, frame)
        elif not self._received:
            self._received[number] = now
            self._on_signal(number)
        elif number == signal.SIGINT and number in self._received:
            raise KeyboardInterrupt
        elif now - min(self._received.values()) > self._patience():
            self._pass_on(number, frame)
        else:
            self._received.setdefault(number, now)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        handler = self._previous.get(number, signal.SIG_DFL)
        if callable(handler):
            handler(number, frame)
        else:
            signal.signal(number, handler)
            os.kill(os.getpid(), number)


def _write_to_nothing(terminals: list[int]) -> None:
    """Replace terminals that are gone: a progress bar that cannot be written would end the training before its save."""
    for number in terminals:
        if not os.isatty(number):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, number)
            os.close(nothing)


_live: weakref.WeakSet[SignalWatch] = weakref.WeakSet()


def _restore_in_child() -> None:
    if _is_loader_worker():
        # torchrun, Slurm and terminals signal a whole process group. A worker that dies of it would end the training
        # before its save; torch's workers end by themselves when their parent is gone.
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
    for watch in list(_live):
        for number, handler in watch._previous.items():
            signal.signal(number, handler)
        _live.discard(watch)


os.register_at_fork(after_in_child=_restore_in_child)


def _is_loader_worker() -> bool:
    """Whether torch's DataLoader has just forked this process: the child's stack is still that of its parent."""
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
