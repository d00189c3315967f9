"""The processes that a node of a job, or its supervisor, has started, and what those have started: none is left behind."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil

from hf_cloudtrain.process import boot_id


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
    except (psutil.NoSuchProcess, OSError, TypeError, ValueError):
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
    # The shell itself listens, for what comes after its command.
    if all(process.pid == pid for process in listening):
        listening = family
    for process in listening:
        try:
            process.send_signal(signal.SIGTERM)
        except psutil.NoSuchProcess:
            continue


def kill_children() -> None:
    """End everything that this process has started, and what that has started."""
    while family := _family(os.getpid())[1:]:
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        # Not waited for: psutil would take the exit code from whoever has started a process, who then sees 0.
        deadline = time.monotonic() + 1.0
        while any(map(_lives, family)) and time.monotonic() < deadline:
            time.sleep(0.01)


def _family(pid: int) -> list[psutil.Process]:
    """A process and all below it that live, itself first."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
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
    except psutil.NoSuchProcess:
        return False


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: https://man7.org/linux/man-pages/man5/proc_pid_status.5.html."""
    try:
        with open(f"/proc/{pid}/status") as file:
            caught = next((line for line in file if line.startswith("SigCgt:")), "SigCgt: 0")
    except OSError:
        return False
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
