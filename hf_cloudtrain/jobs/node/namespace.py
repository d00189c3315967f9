"""The program between a node and its command: it enters a new mount namespace, mounts folders, and becomes the command.

    python -I -S namespace.py '{"mounts": …}' COMMAND …

It imports only the standard library, because it runs in the job's folder, where the user may have a `json.py`. It ends in
exec, so that no process stays in between: signals, process group and exit code are the command's. The kernel removes the
namespace with its last process; nothing is ever written to the machine's own paths.

The calls are described in mount(2), unshare(2), pivot_root(2) and user_namespaces(7): https://man7.org/linux/man-pages.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import stat
import sys
import warnings  # noqa: F401 - os.execvpe needs it, and cannot import it where the namespace hides root's files
from collections.abc import Sequence

FAILED = 125
"""Exit code if the folders could not be mounted; the command was not started."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a job may receive."""

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_SLAVE, MS_RELATIME = 1024, 2048, 4096, 16384, 1 << 19, 1 << 21
MNT_DETACH = 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
OLD = "/.old"


def main(arguments: Sequence[str]) -> int:
    """Mount the folders and become the command; returns only if that fails."""
    request, *command = arguments
    try:
        wanted = json.loads(request)
        if "block" in wanted:
            signal.pthread_sigmask(signal.SIG_BLOCK if wanted["block"] else signal.SIG_UNBLOCK, SIGNALS)
        if "mounts" in wanted:
            enter()
            mount_all(wanted["mounts"], wanted["replaced"])
    except OSError as error:
        return _report(f"the folders of the job cannot be mounted: {error}", FAILED)
    # Python ignores these two, and the command would inherit that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, _original_environment())  # noqa: S606 - no shell
    except FileNotFoundError:
        return _report(f"{command[0]!r} was not found.", 127)
    except OSError as error:
        return _report(f"{command[0]!r} cannot be run: {error}", 126)


def enter() -> None:
    """Give this process a mount namespace of its own: as root, or else in a user namespace.

    In a user namespace the user and group stay as they are outside; the capabilities there end with exec.
    """
    user, group = os.geteuid(), os.getegid()
    try:
        _call("unshare", CLONE_NEWNS)
    except PermissionError:
        _call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
        # gid_map requires setgroups to be denied first, user_namespaces(7).
        ids = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, text in ids.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    # Later mounts of the machine appear here too; mounts made here appear nowhere else.
    _mount(None, "/", None, MS_REC | MS_SLAVE)


def mount_all(mounts: Sequence[tuple[str, str, bool]], replaced: Sequence[str]) -> None:
    """Mount each source at its target.

    Args:
        mounts: source, target, and whether it is read-only; a target inside another comes after it.
        replaced: folders to replace first by a folder in memory with all they hold, where targets can be made.
    """
    for folder in replaced:
        _replace_root() if folder == "/" else _replace(folder)
    for source, target, read_only in mounts:
        os.makedirs(target, exist_ok=True)
        _mount(source, target, None, MS_BIND | MS_REC)
        if read_only:
            _mount(None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | _kept_flags(target))
    for folder in replaced:
        # Files that a job writes there would be lost with the namespace: an error is better.
        _mount(None, folder, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _replace_root() -> None:
    number = PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"pivot_root is not supported on {os.uname().machine}")
    base = "/tmp" if os.path.isdir("/tmp") else "/proc"  # noqa: S108 - only a folder to mount on, nothing is written there
    _mount("cloudtrain", base, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    os.mkdir(base + OLD)
    _call("syscall", number, base, base + OLD)
    os.chdir("/")
    _bind_all(OLD, "/")
    _call("umount2", OLD, MNT_DETACH)
    os.rmdir(OLD)


def _replace(folder: str) -> None:
    held = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        mode = stat.S_IMODE(os.fstat(held).st_mode)
        _mount("cloudtrain", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"mode={mode:o}")
        _bind_all(f"/proc/self/fd/{held}", folder)
    finally:
        os.close(held)


def _bind_all(source: str, folder: str) -> None:
    """Show the content of one folder in an empty one."""
    for name in os.listdir(source):
        old, new = os.path.join(source, name), os.path.join(folder, name)
        try:
            mode = os.lstat(old).st_mode
        except OSError:  # a mount whose server is gone: it does not work outside either
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
    """Flags that a mount must keep: in a user namespace the kernel refuses to remove them."""
    flags = os.statvfs(path).f_flag
    kept = flags & (MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_NOATIME | MS_NODIRATIME)
    return kept | (MS_RELATIME if flags & 4096 else 0)  # ST_RELATIME of <bits/statvfs.h>


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    try:
        _call("mount", source, target, kind, flags, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, source or target, None, target) from None


def _call(name: str, *arguments: str | int | None) -> None:
    """Call a function of the C library. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    converted = [
        os.fsencode(value) if isinstance(value, str) else value if value is None else ctypes.c_long(value)
        for value in arguments
    ]
    if getattr(libc, name)(*converted) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def _original_environment() -> dict[bytes, bytes]:
    """The environment before Python started: it adds LC_CTYPE where the locale is C."""
    try:
        with open("/proc/self/environ", "rb") as file:
            items = [item.partition(b"=") for item in file.read().split(b"\0") if item]
    except OSError:  # a machine without /proc
        return dict(os.environb)
    return {name: value for name, _, value in items}


def _report(text: str, code: int) -> int:
    print(f"cloudtrain: {text}", file=sys.stderr)  # noqa: T201 - into the log of the job, there is no other
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
