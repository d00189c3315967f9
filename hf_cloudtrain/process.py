"""The end of this process, and work that must come before it."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any


def before_exit(method: Callable[[], None]) -> None:
    """Call a bound method when the interpreter ends by itself, an exception, Ctrl-C or sys.exit, while threads still work.

    `atexit` comes too late: by then no thread pool starts a thread. `concurrent.futures` itself uses the same hook.
    The object is not kept alive, and a forked child does not inherit the duty.
    """
    reference: Any = weakref.WeakMethod(method)
    pid = os.getpid()

    def call() -> None:
        found = reference()
        if found is not None and os.getpid() == pid:
            found()

    register = getattr(threading, "_register_atexit", atexit.register)
    register(call)
