"""How the processes of a job are stopped: the signals that ask for it, and how long each layer waits before it kills.

command     the grace                  torchrun ends its workers when the grace is over
node        the grace and 1 margin     then it kills its command
gang        the grace and 2 margins    then it kills its nodes
supervisor  the grace and 3 margins    then it kills the gang; so long a new node or supervisor waits for an old one
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGURG),
)
"""Signals that ask a node or a supervisor to stop. SIGURG is for Slurm, which can only signal all processes of a node at
once: processes without a handler for it ignore it."""
MARGIN = 5.0
"""Seconds that each layer gives the one below it to exit by itself."""


@contextlib.contextmanager
def stop_handler(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` on each of `STOP_SIGNALS` inside the block. On the main thread only.

    A SIGHUP that is ignored stays ignored: under nohup, a closed terminal must not end the job.
    """
    before = {
        number: signal.signal(number, handler)
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
