"""Process trees: all processes that a node of a job, or its supervisor, has started, are found and ended."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from hf_cloudtrain.runtime.files import boot_id
from hf_cloudtrain.runtime.threads import TURN

logger = logging.getLogger(__name__)

SHELLS = ("bash", "sh", "dash", "bwrap")
PATIENCE = 60.0
"""Seconds for processes to end after SIGKILL."""


def this_process() -> dict[str, Any]:
    """The identity of this process, for `is_alive` on this machine or on a different one."""
    pid = os.getpid()
    return {"host": platform.node(), "pid": pid, "began": _began(pid), "boot": boot_id()}


def is_alive(known: Mapping[str, Any]) -> bool:
    """Whether the process with this identity still runs on this machine."""
    if known.get("boot") != boot_id():
        return False
    try:
        pid = int(known.get("pid", -1))
        return _began(pid) == known.get("began") and _is_running(psutil.Process(pid))
    except (psutil.Error, OSError, TypeError, ValueError):
        return False


def adopt_orphans() -> None:
    """Become the parent of processes that our children leave behind, so that `kill_children` finds them.

    https://man7.org/linux/man-pages/man2/PR_SET_CHILD_SUBREAPER.2const.html
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0)


def terminate(pid: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to the processes of a tree that have a handler for it, or to all of them if none has.

    Programs such as `tee` have none: they would end at once, and the last output of the training would be lost.
    """
    family = _family(pid)
    listening = [process for process in family if _catches(process.pid, number)]
    # Shells have a handler too, which only acts after their command has ended.
    if all(_name(process) in SHELLS for process in listening):
        listening = family
    for process in listening:
        _send(process, number)


def kill_children(patience: float = PATIENCE) -> None:
    """Kill all processes below this one.

    Args:
        patience: seconds; a process that waits for a broken disk or a driver does not end before these answer.
    """
    deadline = time.monotonic() + patience
    while family := _family(os.getpid())[1:]:
        for process in family:
            _send(process, signal.SIGKILL)
        # No psutil.wait_procs: it would reap a process, and the code that started it would see exit code 0.
        soon = time.monotonic() + 1.0
        while any(map(_is_running, family)) and time.monotonic() < soon:
            time.sleep(0.01)
        if time.monotonic() > deadline:
            left = ", ".join(f"{process.pid} ({_name(process)})" for process in family)
            logger.error("These processes did not end after SIGKILL and keep running: %s.", left)
            return


def await_orphans(mark: str, is_late: Callable[[], bool]) -> None:
    """Wait for processes that our children left behind and that finish something by themselves. See `adopt_orphans`.

    Args:
        mark: part of their command lines.
        is_late: whether to wait no longer.
    """
    while any(
        mark in _command(process) for process in _family(os.getpid())[1:] if _parent(process) == os.getpid()
    ):
        if is_late():
            return
        time.sleep(TURN)


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        pass
    except psutil.Error as error:  # it has changed to a different user
        logger.warning("%s", error)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None


def _family(pid: int) -> list[psutil.Process]:
    """A process and all running processes below it, itself first."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return []
    return [process for process in family if process.pid == os.getpid() or _is_running(process)]


def _began(pid: int) -> float:
    """When a process started: in ticks since boot, because setting the clock changes every other measure.

    https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html (starttime)
    """
    if sys.platform != "linux":
        return psutil.Process(pid).create_time()
    with open(f"/proc/{pid}/stat", "rb") as file:
        return float(file.read().rpartition(b")")[2].split()[19])


def _is_running(process: psutil.Process) -> bool:
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
