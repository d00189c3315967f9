"""Folders at the paths where a job expects them, without touching the machine's own.

    refuse         says what cannot be, before anything is started
    argv           the command in a mount namespace of its own (namespace.py), or in bubblewrap where only that may
    docker_words   the command in a container of an image
    link           links, on a machine that is the job's own: the containers of SageMaker and SkyPilot

A target needs a folder to be mounted on. Where the machine lacks it, the deepest folder above that exists is made anew
in memory for the job alone, with all it holds: nothing is ever created on the machine.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.node import namespace

PROBE_SECONDS = 20.0
"""Seconds that the try of a namespace may take; it takes 0.05."""
DOCKER_SECONDS = 5.0
"""Seconds in which a Docker engine has to answer."""

FIRST = """\
trap '[ $$ != 1 ] && kill -TERM $! || kill -TERM -1' TERM
"$@" &
while :; do
    wait $!
    code=$?
    kill -0 $! 2>/dev/null || exit $code
done
"""
"""The first process of a container: the kernel lets it alone hear of signals, and gives it no default for them (pid_namespaces(7)).

-1 is all of the container; where an engine has been told to share the machine's processes, it would be all of those.
"""


@dataclass(frozen=True)
class Mount:
    """A folder, and the path at which a job sees it.

    Example:
        >>> Mount(Path("/home/me/.hf_cloudtrain/jobs/mnli-1/workspace"), "/workspace")
    """

    source: Path
    target: str
    read_only: bool = False


# --- Namespaces --------------------------------------------------------------------------------------------------------


def argv(mounts: Sequence[Mount], command: Sequence[str], *, cwd: str | None = None) -> list[str]:
    """The command line under which `command` sees each source at its target; `command` itself where nothing is mounted.

    Signals, process group, environment and exit code are the command's: nothing stays between, but for bubblewrap, which
    waits for it. 125 is the exit code where a folder could not be put in place.

    Args:
        mounts: in any order; a target may be inside another.
        command: what to run.
        cwd: folder to run in, as the job sees it, such as `/workspace`; None: that of the caller.

    Raises:
        ConfigurationError: as `refuse`, but for what the machine allows.
    """
    wanted = _wanted(mounts)
    remade = _remade(wanted)
    if not wanted:
        return [*_program({"cwd": cwd}), *command] if cwd else list(command)
    if _allows_namespaces() or not _allows_bubblewrap():
        order = {"mounts": [(str(m.source), m.target, m.read_only) for m in wanted], "remade": remade}
        return [*_program({**order, "cwd": cwd} if cwd else order), *command]
    return _bubblewrap_words(wanted, remade, command, cwd)


def check(mounts: Sequence[Mount]) -> None:
    """Raise ConfigurationError where the folders cannot be at their paths, with what to do. Nothing is changed.

    Raises:
        ConfigurationError: a target holds something of the machine's own, or of the folder it is in; or this machine
            allows no namespace.
    """
    wanted = _wanted(mounts)
    _remade(wanted)
    if wanted and not _allows_namespaces() and not _allows_bubblewrap():
        raise ConfigurationError(
            f"This machine lets no process see {str(wanted[0].source)!r} at {wanted[0].target!r}: it allows neither "
            f"root's mounts nor user namespaces ({_problem(_NAMESPACE_PROBE)}). Run the job as root, install "
            "bubblewrap, or use docker with an image (job_setting.docker.image). In a container, start that with "
            "--cap-add SYS_ADMIN."
        )


def _wanted(mounts: Iterable[Mount]) -> list[Mount]:
    """Those that are not where they belong already, parents first, absolute and without links."""
    found = []
    for mount in mounts:
        source, target = mount.source.resolve(), os.path.realpath(mount.target)
        if str(source) != target:
            found.append(Mount(source, target, mount.read_only))
    found.sort(key=lambda mount: mount.target.count("/"))
    return found


def _remade(mounts: Sequence[Mount]) -> list[str]:
    """Existing folders that lack a place for a target. Raises ConfigurationError for what would hide something."""
    remade: set[str] = set()
    for number, mount in enumerate(mounts):
        around = [other for other in mounts[:number] if _is_below(mount.target, other.target)]
        if around:
            _check_not_inside(mount, around[-1])
            continue
        _check_not_hidden(mount.target, mount.target)
        if not os.path.isdir(mount.target):
            folder = _deepest_folder(mount.target)
            _check_not_remade(folder, mount.target)
            remade.add(folder)
    return sorted(remade)


def _check_not_inside(mount: Mount, outer: Mount) -> None:
    place = outer.source / os.path.relpath(mount.target, outer.target)
    if mount.target == outer.target:
        raise ConfigurationError(f"Two folders are to be at {mount.target!r}. Give each a path of its own.")
    _check_not_hidden(
        str(place),
        mount.target,
        f"the folder that is at {outer.target!r}",
        "or leave that out of the workspace (.cloudtrainignore)",
    )
    if outer.read_only and not place.is_dir():
        raise ConfigurationError(
            f"{mount.target!r} is inside {outer.target!r}, which is there to read only, and has no such folder. "
            "Name a path outside of it."
        )


def _check_not_hidden(
    place: str, target: str, owner: str = "this machine", otherwise: str = "or move what is there"
) -> None:
    try:
        mode = os.lstat(place).st_mode
        held = not stat.S_ISDIR(mode) or bool(os.listdir(place))
    except (FileNotFoundError, NotADirectoryError):
        return
    except PermissionError:
        held = True
    if held:
        raise ConfigurationError(
            f"{target!r} would hide what {owner} has there. Set the mount path to one that is free or empty, such as "
            f"'/workspace' or '/workspace/data', {otherwise}."
        )


def _check_not_remade(folder: str, target: str) -> None:
    """A folder that people write to cannot be replaced for a while: new files would be missed, or lost."""
    found = os.stat(folder)
    theirs = found.st_uid != 0 or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if folder != "/" and (theirs or _is_below(folder, os.path.expanduser("~"))):
        raise ConfigurationError(
            f"{target!r} is not there, and {folder!r} is in use. Make an empty folder (mkdir -p {target}), or set the "
            "mount path to one like '/workspace', which needs none."
        )


def _deepest_folder(path: str) -> str:
    folder = path
    while not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise ConfigurationError(
                f"{path!r} cannot be a folder here: {folder!r} is a file. Name another mount path."
            )
        folder = os.path.dirname(folder)
    return folder


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _program(order: dict[str, object]) -> list[str]:
    return [sys.executable, "-I", "-S", namespace.__file__, json.dumps(order)]


def _allows_namespaces() -> bool:
    """Whether this user may do here what `argv` does: tried, because no setting tells."""
    return _problem(_NAMESPACE_PROBE) is None


@functools.cache
def _problem(words: tuple[str, ...]) -> str | None:
    """Why a command cannot be run here: the last line that it says."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"exit code {done.returncode}"


_NAMESPACE_PROBE = (*_program({"mounts": [], "remade": ["/"]}), "true")


# --- Bubblewrap --------------------------------------------------------------------------------------------------------


def _allows_bubblewrap() -> bool:
    return _problem(("bwrap", "--dev-bind", "/", "/", "true")) is None


def _bubblewrap_words(
    mounts: Sequence[Mount], remade: Sequence[str], command: Sequence[str], cwd: str | None
) -> list[str]:
    """By https://github.com/containers/bubblewrap (bwrap(1)).

    It stays as the parent, and dies of a signal to the group that the command would heed: signals are held back from it,
    and let through for the command.
    """
    words = [*_program({"block": True}), "bwrap"]
    if "/" not in remade:
        words += ["--dev-bind", "/", "/"]
    for folder in remade:
        if folder != "/":
            words += ["--tmpfs", folder]
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            words += (
                ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--dev-bind", path, path]
            )
    for mount in mounts:
        words += ["--ro-bind" if mount.read_only else "--dev-bind", str(mount.source), mount.target]
    for folder in remade:
        words += ["--remount-ro", folder]
    if cwd:
        words += ["--chdir", cwd]
    return [*words, "--", *_program({"block": False}), *command]


# --- Docker ------------------------------------------------------------------------------------------------------------


def has_docker() -> bool:
    """Whether there is a client, and an engine that answers within 5 seconds."""
    try:
        done = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DOCKER_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def docker_argv(
    image: str,
    mounts: Sequence[Mount],
    command: Sequence[str],
    environment_names: Iterable[str],
    home: Path,
    *,
    cwd: str | None = None,
    name: str | None = None,
) -> list[str]:
    """The command line that runs `command` in a container of an image. It was never run on an engine: written by its docs.

    The client hands SIGTERM to the container, where a shell hands it to all processes; its exit code is the command's. A
    client that is killed leaves the container behind: `docker kill NAME` ends it.

    Values of variables are not in it: the client takes them from its own environment. The network and the shared memory
    are the machine's, as torchrun and its workers need them. See https://docs.docker.com/reference/cli/docker/container/run.

    Args:
        image: name of the image.
        mounts: as for `argv`; the job's home is mounted besides, at its own path.
        command: what to run there.
        environment_names: names of the variables to hand on.
        home: folder of the job.
        cwd: folder to run in, as the job sees it.
        name: of the container.
    """
    words = ["docker", "run", "--rm", "--init=false", "--network", "host", "--ipc", "host"]
    if shutil.which("nvidia-smi"):
        words += ["--gpus", "all"]
    for mount in (Mount(home, str(home)), *sorted(mounts, key=lambda mount: mount.target.count("/"))):
        words += ["--mount", _docker_mount(mount)]
    for variable in sorted(set(environment_names)):
        words += ["--env", variable]
    if cwd:
        words += ["--workdir", cwd]
    if name:
        words += ["--name", name]
    return [*words, "--entrypoint", "sh", image, "-c", FIRST, "sh", *command]


def _docker_mount(mount: Mount) -> str:
    fields = ["type=bind", f"source={mount.source}", f"target={mount.target}"]
    fields += ["readonly"] if mount.read_only else []
    # The value is a line of CSV.
    return ",".join(
        '"' + field.replace('"', '""') + '"' if set(field) & set(',"') else field for field in fields
    )


# --- Links -------------------------------------------------------------------------------------------------------------


def link(mounts: Sequence[Mount]) -> None:
    """Make each target a link to its source, on a machine that is the job's own. `read_only` is not heeded.

    What is linked already stays, so that a restart may call it again.

    Raises:
        ConfigurationError: a target holds something.
    """
    for mount in sorted(mounts, key=lambda mount: mount.target.count("/")):
        source, target = mount.source.resolve(), Path(mount.target)
        if target.resolve() == source:
            continue
        _check_not_hidden(mount.target, mount.target)
        try:
            if target.is_dir():
                target.rmdir()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source, target_is_directory=True)
        except OSError as error:
            raise ConfigurationError(
                f"{mount.target!r} cannot be made a link to {str(source)!r}: {error.strerror}. Set the mount path to one "
                "that is free, such as '/workspace'."
            ) from error
