"""A real, small disk: a tmpfs in a mount namespace of this process alone. It needs no privileges."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
"""<linux/sched.h>"""
MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x1, 0x20, 0x4000, 0x40000
"""<linux/mount.h>"""


def why_impossible() -> str:
    """Why this machine cannot mount a small disk (containers may forbid it), or an empty string if it can."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", folder]
        try:
            tried = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return "`unshare` was not found"
        return tried.stderr.strip() if tried.returncode else ""


def mount_small_disk(folder: Path, size: int) -> None:
    """Mount an empty disk of `size` bytes for this process and its children only. The process must have one thread."""
    folder.mkdir(parents=True, exist_ok=True)
    user, group = os.getuid(), os.getgid()
    _call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())


def make_read_only(folder: Path) -> None:
    """Remount the disk read-only, as a kernel does when a disk fails."""
    _call("mount", b"none", os.fsencode(folder), None, MS_REMOUNT | MS_RDONLY, None)


def fill(folder: Path, left: int = 0) -> Path:
    """Use up all space but `left` bytes; remove the returned file to free it again."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        found = os.statvfs(folder)
        file.write(bytes(max(0, found.f_bavail * found.f_frsize - left)))
        while not left:
            file.write(bytes(4096))
    return ballast


@contextlib.contextmanager
def full(folder: Path, left: int = 0) -> Iterator[None]:
    """Within this block at most `left` bytes are free."""
    ballast = fill(folder, left)
    yield
    ballast.unlink()


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
