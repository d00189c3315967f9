"""The program between a node and its command: it makes a mount namespace, puts folders there, and becomes the command.

    python -I -S namespace.py '{"mounts": …}' COMMAND …

It is a file by itself that needs the standard library alone, because it runs in the job's folder, where a `json.py` of
the user may lie. It ends in exec, so no process is between: signals, process group and exit code are the command's. The
namespace is gone with the last process in it, however that ends; the machine's own paths are never written.

The calls are those of mount(2), unshare(2), pivot_root(2) and user_namespaces(7): https://man7.org/linux/man-pages.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import stat
import sys
from collections.abc import Sequence
from typing import Any

FAILED = 125
"""Exit code where the folders could not be put in place; the command was not started."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""What may be sent to a job."""

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_SLAVE, MS_RELATIME = 1024, 2048, 4096, 16384, 1 << 19, 1 << 21
MNT_DETACH = 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
OLD = "/.old"


def main(arguments: Sequence[str]) -> int:
    """Put the folders in place and become the command; returns only where that failed."""
    order, *command = arguments
    try:
        wanted = json.loads(order)
        if "block" in wanted:
            signal.pthread_sigmask(signal.SIG_BLOCK if wanted["block"] else signal.SIG_UNBLOCK, SIGNALS)
        if "mounts" in wanted:
            enter()
            arrange(wanted["mounts"], wanted.get("remade", ()))
        if wanted.get("cwd"):
            os.chdir(wanted["cwd"])
    except OSError as error:
        return _say(f"the folders of the job cannot be put in place: {error}", FAILED)
    # Python ignores these two, and exec would hand that on.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, _given_environment())  # noqa: S606 - no shell
    except FileNotFoundError:
        return _say(f"{command[0]!r} is not found.", 127)
    except OSError as error:
        return _say(f"{command[0]!r} cannot be run: {error}", 126)


def enter() -> None:
    """Give this process a mount namespace of its own, by the right of root or else in a user namespace.

    In a user namespace everybody keeps the user and group that they have outside. The rights there last until exec.
    """
    user, group = os.geteuid(), os.getegid()
    try:
        _call("unshare", CLONE_NEWNS)
    except PermissionError:
        _call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
        _write("/proc/self/setgroups", "deny")  # what gid_map asks for, user_namespaces(7)
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
    # What the machine mounts or unmounts later is seen here; what is mounted here is seen nowhere else.
    _mount(None, "/", None, MS_REC | MS_SLAVE)


def arrange(mounts: Sequence[tuple[str, str, bool]], remade: Sequence[str]) -> None:
    """Put each source at its target, after the folders that lack a place for one were made anew.

    Args:
        mounts: source, target, and whether it is to be read only; a target inside another comes after it.
        remade: folders that are replaced by one in memory with all they hold.
    """
    for folder in remade:
        _remake_root() if folder == "/" else _remake(folder)
    for source, target, read_only in mounts:
        os.makedirs(target, exist_ok=True)
        _mount(source, target, None, MS_BIND | MS_REC)
        if read_only:
            _mount(None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | _kept_flags(target))
    for folder in remade:
        # What a job writes there would be gone with it: better that it hears so.
        _mount(None, folder, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _remake_root() -> None:
    base = "/tmp" if os.path.isdir("/tmp") else "/proc"  # noqa: S108 - a place to mount on, nothing is written there
    _mount("cloudtrain", base, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    os.mkdir(base + OLD)
    _pivot_root(base, base + OLD)
    os.chdir("/")
    _bring(OLD, "/")
    _call("umount2", OLD.encode(), MNT_DETACH)
    os.rmdir(OLD)


def _remake(folder: str) -> None:
    held = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        mode = stat.S_IMODE(os.fstat(held).st_mode)
        _mount("cloudtrain", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode:o}")
        _bring(f"/proc/self/fd/{held}", folder)
    finally:
        os.close(held)


def _bring(source: str, folder: str) -> None:
    """All that one folder holds, in another that is empty."""
    for name in os.listdir(source):
        old, new = os.path.join(source, name), os.path.join(folder, name)
        try:
            mode = os.lstat(old).st_mode
        except OSError:  # a mount whose server is gone: nobody can use it, here or outside
            continue
        if stat.S_ISLNK(mode):
            os.symlink(os.readlink(old), new)
            continue
        if stat.S_ISDIR(mode):
            os.mkdir(new)
        else:
            os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        _mount(old, new, None, MS_BIND | MS_REC)


def _kept_flags(path: str) -> int:
    """Flags of a mount that stay; in a user namespace the kernel refuses to take them away."""
    flags = os.statvfs(path).f_flag
    kept = flags & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME)
    return kept | (MS_RELATIME if flags & 4096 else 0)  # ST_RELATIME of <bits/statvfs.h>


# --- Calls -------------------------------------------------------------------------------------------------------------


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    try:
        _call(
            "mount",
            None if source is None else os.fsencode(source),
            os.fsencode(target),
            None if kind is None else kind.encode(),
            ctypes.c_ulong(flags),
            None if data is None else data.encode(),
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, source or target, None, target) from None


def _pivot_root(new: str, old: str) -> None:
    number = PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"No call is known that changes the root on {os.uname().machine}")
    _call("syscall", ctypes.c_long(number), new.encode(), old.encode())


def _call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _given_environment() -> dict[bytes, bytes]:
    """The environment as it was given: Python itself adds LC_CTYPE where the locale is C."""
    try:
        with open("/proc/self/environ", "rb") as file:
            items = [item.partition(b"=") for item in file.read().split(b"\0") if item]
    except OSError:  # a machine without /proc
        return dict(os.environb)
    return {name: value for name, _, value in items}


def _say(text: str, code: int) -> int:
    print(f"cloudtrain: {text}", file=sys.stderr)  # noqa: T201 - the job's own log, there is no other
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
