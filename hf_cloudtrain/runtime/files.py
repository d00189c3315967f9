"""Files and disks that processes of one machine share: free space, locks, and the names of folders that are being made."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from hf_cloudtrain.runtime.text import size_text
from hf_cloudtrain.runtime.threads import TURN

SPARE_SPACE = 16 * 2**20
"""Bytes that must stay free on a disk after a copy."""
MORE_SPACE = "Free some space, or choose a folder on a larger disk"


def check_free_space(
    folder: Path, size: int, what: str, *, spare: int = SPARE_SPACE, remedy: str = MORE_SPACE
) -> None:
    """Raise OSError (ENOSPC) if the disk of `folder` lacks room for `size` bytes of `what`."""
    free = shutil.disk_usage(folder).free
    if free < size + spare:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {size_text(size)}, and only {size_text(free)} are free. {remedy}",
            str(folder),
        )


@functools.cache
def boot_id() -> str:
    """The boot id of this machine, which changes with every start of it; empty if the system has none.

    https://man7.org/linux/man-pages/man5/proc_sys_kernel.5.html (random)
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


_making: set[str] = set()
"""The suffixes that this process has given out."""


def temp_suffix() -> str:
    """A suffix for the name of a folder that this process is making; `is_left_over` recognises it after its end."""
    token = f"{os.getpid()}-{secrets.token_hex(4)}"
    _making.add(token)
    return token


def is_left_over(name: str) -> bool:
    """Whether the process that was making the folder of this name has ended."""
    match = re.search(r"-((\d+)-[0-9a-f]{8})$", name)
    if match is None:
        return False
    if int(match[2]) == os.getpid():
        return match[1] not in _making  # in a container, every start of the training has the same process id
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # the process of a different user
        return False
    return _has_ended(int(match[2]))


def _has_ended(pid: int) -> bool:
    """Whether a process that still has its number has ended: the first process of a container may never take note of it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except (OSError, IndexError):  # another system, or it is gone since
        return False


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, and nothing in between."""
    beside = path.with_name(f".{path.name}-{temp_suffix()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except BaseException:  # on a full disk, each try would leave one more file
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock that one process of this machine can hold at a time. The system releases it when the process ends.

    Args:
        path: the lock file, which is never deleted, and keeps what is in it.
        patience: seconds to wait for the lock.

    Raises:
        BlockingIOError: another process still holds it.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
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
            # Closing the file is not enough: a forked child (a DataLoader worker) has the same lock open.
            fcntl.flock(file, fcntl.LOCK_UN)
