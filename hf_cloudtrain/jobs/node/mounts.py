"""Folders at the paths where a job expects them, without a change to the machine.

    check    refuse mounts that are not possible, before anything is started
    argv     the command in a mount namespace of its own (namespace.py), or in bubblewrap where only that may make one
    link     links, on a machine that belongs to the job: the containers of SageMaker and SkyPilot

docker.py has a fourth way, the container of an image. A target needs a folder to be mounted on. Where the machine has
none, the deepest existing folder above is replaced, for the job alone, by a copy in memory that shows all it holds.
"""

from __future__ import annotations

import functools
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.node import namespace
from hf_cloudtrain.jobs.spec.values import is_below

PROBE_TIMEOUT = 20.0
"""Seconds until a probe of a namespace counts as failed; it usually takes 0.05."""


@dataclass(frozen=True)
class Mount:
    """A folder, and the path at which a job sees it."""

    source: Path
    target: str
    read_only: bool = False


def argv(mounts: Sequence[Mount], command: Sequence[str]) -> list[str]:
    """The command line under which `command` sees each source at its target; `command` itself if nothing is mounted.

    Signals, process group, environment and exit code are those of the command: no process stays in between, except
    bubblewrap, which waits for it. The exit code is 125 if a folder could not be mounted. The targets may be inside one
    another, in any order.

    Raises:
        ConfigurationError: as `check`, but for what the machine allows.
    """
    wanted = _wanted(mounts)
    if not wanted:
        return list(command)
    replaced = _replaced(wanted)
    if _allows_namespaces() or not _allows_bubblewrap():
        rows = [(str(mount.source), mount.target, mount.read_only) for mount in wanted]
        return [*_program({"mounts": rows, "replaced": replaced}), *command]
    return _bubblewrap_argv(wanted, replaced, command)


def check(mounts: Sequence[Mount]) -> None:
    """Refuse mounts that are not possible, with what to do. Changes nothing.

    Raises:
        ConfigurationError: a target would hide something of the machine or of the folder around it, or this machine
            allows no mount namespace.
    """
    wanted = _wanted(mounts)
    _replaced(wanted)
    if wanted and not _allows_namespaces() and not _allows_bubblewrap():
        raise ConfigurationError(
            f"{str(wanted[0].source)!r} cannot be mounted at {wanted[0].target!r}: this machine allows neither mounts "
            f"as root nor user namespaces ({_failure(_NAMESPACE_PROBE)}). Run the job as root, install bubblewrap, or "
            "use docker with an image (job_setting.docker.image). Start a container with --cap-add SYS_ADMIN."
        )


def _wanted(mounts: Iterable[Mount]) -> list[Mount]:
    """The mounts whose source is not at its target already: outer ones first, with absolute paths and without links."""
    found = []
    for mount in mounts:
        source, target = mount.source.resolve(), os.path.realpath(mount.target)
        if str(source) != target:
            found.append(Mount(source, target, mount.read_only))
    return sorted(found, key=lambda mount: mount.target.count("/"))


def _replaced(mounts: Sequence[Mount]) -> list[str]:
    """Existing folders that have no folder for a target. Raises ConfigurationError for a target that hides something."""
    replaced: set[str] = set()
    for number, mount in enumerate(mounts):
        around = [other for other in mounts[:number] if is_below(mount.target, other.target)]
        if around:
            _check_inside(mount, around[-1])
            continue
        _check_hides_nothing(mount.target, mount.target)
        if not os.path.isdir(mount.target):
            folder = _deepest_folder(mount.target)
            _check_replaceable(folder, mount.target)
            replaced.add(folder)
    return sorted(replaced)


def _check_inside(mount: Mount, outer: Mount) -> None:
    folder = outer.source / os.path.relpath(mount.target, outer.target)
    if mount.target == outer.target:
        raise ConfigurationError(
            f"{mount.target!r} is the mount path of two folders. Give each its own path."
        )
    _check_hides_nothing(
        str(folder),
        mount.target,
        f"the folder at {outer.target!r}",
        "or exclude that from the workspace (.cloudtrainignore)",
    )
    if outer.read_only and not folder.is_dir():
        raise ConfigurationError(
            f"{mount.target!r} does not exist in {outer.target!r}, which is read-only. Use a path outside of it."
        )


def _check_hides_nothing(
    folder: str, target: str, owner: str = "this machine", otherwise: str = "or move what is there"
) -> None:
    try:
        mode = os.lstat(folder).st_mode
        is_in_use = not stat.S_ISDIR(mode) or bool(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError:
        is_in_use = True
    if is_in_use:
        raise ConfigurationError(
            f"{target!r} would hide what {owner} has there. Set the mount path to one that is free or empty, such as "
            f"'/workspace' or '/workspace/data', {otherwise}."
        )


def _check_replaceable(folder: str, target: str) -> None:
    """A folder that users write to cannot be replaced: the job would miss new files, or lose its own."""
    found = os.stat(folder)
    is_writable = found.st_uid != 0 or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if folder != "/" and (is_writable or is_below(folder, os.path.expanduser("~"))):
        raise ConfigurationError(
            f"{target!r} does not exist, and {folder!r} is in use. Make an empty folder (mkdir -p {target}), or set the "
            "mount path to one like '/workspace', which needs none."
        )


def _deepest_folder(path: str) -> str:
    folder = path
    while not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise ConfigurationError(
                f"{path!r} cannot be a folder: {folder!r} is a file. Use a different mount path."
            )
        folder = os.path.dirname(folder)
    return folder


def _program(request: dict[str, object]) -> list[str]:
    return [sys.executable, "-I", "-S", namespace.__file__, json.dumps(request)]


def _allows_namespaces() -> bool:
    """Whether this user may make a mount namespace here: probed, because no setting says so."""
    return _failure(_NAMESPACE_PROBE) is None


def _allows_bubblewrap() -> bool:
    return _failure(("bwrap", "--dev-bind", "/", "/", "true")) is None


@functools.cache
def _failure(command: tuple[str, ...]) -> str | None:
    """Why a command fails here: the last line of its errors; None if it works."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    errors = done.stderr.decode(errors="replace").strip().splitlines()
    return errors[-1] if errors else f"exit code {done.returncode}"


_NAMESPACE_PROBE = (*_program({"mounts": [], "replaced": ["/"]}), "true")


def _bubblewrap_argv(mounts: Sequence[Mount], replaced: Sequence[str], command: Sequence[str]) -> list[str]:
    """See https://github.com/containers/bubblewrap (bwrap(1)).

    bubblewrap stays as the parent, and a stop signal to the process group would kill it: signals are blocked before it
    starts, and unblocked again for the command.
    """
    found = [*_program({"block": True}), "bwrap"]
    if "/" not in replaced:
        found += ["--dev-bind", "/", "/"]
    for folder in replaced:
        if folder != "/":
            found += ["--tmpfs", folder]
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            is_link = os.path.islink(path)
            found += ["--symlink", os.readlink(path), path] if is_link else ["--dev-bind", path, path]
    for mount in mounts:
        found += ["--ro-bind" if mount.read_only else "--dev-bind", str(mount.source), mount.target]
    for folder in replaced:
        found += ["--remount-ro", folder]
    return [*found, "--", *_program({"block": False}), *command]


def link(mounts: Sequence[Mount]) -> None:
    """Make each target a link to its source, on a machine that belongs to the job. Ignores `read_only`.

    Existing links to the right source stay, so that a restart may call it again.

    Raises:
        ConfigurationError: a target is in use, or cannot be made.
    """
    for mount in sorted(mounts, key=lambda mount: mount.target.count("/")):
        source, target = mount.source.resolve(), Path(mount.target)
        if target.resolve() == source:
            continue
        _check_hides_nothing(mount.target, mount.target)
        if not os.access(next(folder for folder in target.parents if folder.exists()), os.W_OK):
            _link_as_root(source, target)
            continue
        try:
            if target.is_dir():
                target.rmdir()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source, target_is_directory=True)
        except OSError as error:
            raise _not_linked(source, target, error.strerror) from error


def _link_as_root(source: Path, target: Path) -> None:
    """By `sudo`: an ordinary user of a machine that was made for a job, such as SkyPilot's, may do everything with it."""
    steps = [["mkdir", "-p", "--", str(target.parent)], ["ln", "-sT", "--", str(source), str(target)]]
    if target.exists():
        steps.insert(1, ["rmdir", "--", str(target)])
    for step in steps:
        try:
            subprocess.run(
                ["sudo", "-n", *step], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
            )
        except FileNotFoundError as error:
            raise _not_linked(source, target, "Permission denied, and 'sudo' is not installed") from error
        except subprocess.CalledProcessError as error:
            raise _not_linked(source, target, error.stderr.strip()) from error


def _not_linked(source: Path, target: Path, reason: str | None) -> ConfigurationError:
    return ConfigurationError(
        f"{str(target)!r} cannot be made a link to {str(source)!r}: {reason}. Set the mount path to a free one, such as "
        "'/workspace'."
    )
