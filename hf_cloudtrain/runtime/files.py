"""TODO docstring."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from hf_cloudtrain.runtime.threads import TURN


@functools.cache
def boot_id() -> str:
    """Which life of the machine this is: another one after a power cut; empty where the system does not tell.

    https://man7.org/linux/man-pages/man5/proc_sys_kernel.5.html (random)
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


_making: set[str] = set()


def temp_suffix() -> str:
    """The end of the name of a folder that this process is making: says whose it is, if it is left behind."""
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    _making.add(token)
    return token


def is_left_over(name: str) -> bool:
    """Whether the process that was making the folder of this name is no more."""
    match = re.search(r"-((\d+)-[0-9a-f]{8})$", name)
    if match is None:
        return False
    if int(match[2]) == os.getpid():
        return match[1] not in _making  # in a container every life of a training has the same number
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's
        return False
    return False


@contextlib.contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock that one process of this machine has at a time; it ends with its holder, however that ends.

    Args:
        path: the lock's file, which stays.
        patience: seconds to wait for another one.

    Raises:
        BlockingIOError: another process has it still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(TURN)
        try:
            yield
        finally:
            # Said aloud, because a forked child (a loader worker) holds the same lock open.
            fcntl.flock(file, fcntl.LOCK_UN)
