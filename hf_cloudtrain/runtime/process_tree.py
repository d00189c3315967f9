"""The processes that a node of a job, or its supervisor, has started, and what those have started: none is left behind."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil

from hf_cloudtrain.runtime.files import boot_id

logger = logging.getLogger(__name__)

SHELLS = ("bash", "sh", "dash", "bwrap")
PATIENCE = 60.0
"""Seconds for processes to end after SIGKILL."""


def this_process() -> dict[str, Any]:
    """What this process is known by later, on this machine or another: see `is_alive`."""
    pid = os.getpid()
    return {"host": platform.node(), "pid": pid, "began": _began(pid), "boot": boot_id()}


def is_alive(known: Mapping[str, Any]) -> bool:
    """Whether a process of this machine, as `this_process` described it, is still there."""
    if known.get("boot") != boot_id():
        return False
    try:
        pid = int(known.get("pid", -1))
        return _began(pid) == known.get("began") and _lives(psutil.Process(pid))
    except (psutil.Error, OSError, TypeError, ValueError):
        return False


def adopt_orphans() -> None:
    """Become the parent of whatever our children leave behind, so that `kill_children` finds it.

    https://man7.org/linux/man-pages/man2/PR_SET_CHILD_SUBREAPER.2const.html
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)


def terminate(pid: int) -> None:
    """SIGTERM to those processes of a family that act on it, or to all of it where none does.

    `tee` and its like would end at once, and take the output of the training with them.
    """
    family = _family(pid)
    listening = [process for process in family if _catches(process.pid, signal.SIGTERM)]
    # Shells listen, too, for what comes after their command.
    if all(_name(process) in SHELLS for process in listening):
        listening = family
    for process in listening:
        _send(process, signal.SIGTERM)


def kill_children(patience: float = PATIENCE) -> None:
    """End everything that this process has started, and what that has started.

    Args:
        patience: seconds; a process that waits for a dead disk or a driver does not end before that answers.
    """
    deadline = time.monotonic() + patience
    while family := _family(os.getpid())[1:]:
        for process in family:
            _send(process, signal.SIGKILL)
        # Not waited for: psutil would take the exit code from whoever has started a process, who then sees 0.
        soon = time.monotonic() + 1.0
        while any(map(_lives, family)) and time.monotonic() < soon:
            time.sleep(0.01)
        if time.monotonic() > deadline:
            left = ", ".join(f"{process.pid} ({_name(process)})" for process in family)
            logger.error("These processes do not end, and are left behind: %s.", left)
            return


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass
    except psutil.Error as error:  # one that became another user's
        logger.warning("%s", error)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _family(pid: int) -> list[psutil.Process]:
    """A process and all below it that live, itself first."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
    return [process for process in family if process.pid == os.getpid() or _lives(process)]


def _began(pid: int) -> float:
    """When a process began: in ticks since the machine did, as a clock that is set moves every other time.

    https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html (starttime)
    """
    if sys.platform != "linux":
        return psutil.Process(pid).create_time()
    with open(f"/proc/{pid}/stat", "rb") as file:
        return float(file.read().rpartition(b")")[2].split()[19])


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: https://man7.org/linux/man-pages/man5/proc_pid_status.5.html."""
    try:
        with open(f"/proc/{pid}/status") as file:
            caught = next((line for line in file if line.startswith("SigCgt:")), "SigCgt: 0")
    except OSError:
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
