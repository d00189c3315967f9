"""Machines like SageMaker's containers: each with a network, a file system, processes and a name of its own.

    with Instances(folder, ["algo-1", "algo-2"], server.port) as instances:
        process = instances.start("algo-1", ["python", "-m", "…"], env={…}, ml=folder / "ml-1")

They are made of Linux namespaces: the file system is the host's below a layer that receives all writes, `/opt/ml` is a
folder of the test, and the first process has the number 1, so that signals without a handler do nothing. Everything
disappears with the process that made it; the host's own network and files do not change.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.servers import dies_with_us

REPOSITORY = Path(__file__).resolve().parents[2]
HUB = "10.77.0.1"
"""Address of this process, as the machines reach it."""
NEEDED = ("unshare", "nsenter", "ip", "mount", "chroot")

# $1 scratch folder, $2 the folder that is /opt/ml, $3 the name, $4 the lines of /etc/hosts; folders to show as they are; --;
# the command.
ENTER = r"""
set -e
scratch=$1 ml=$2; shift 2
hostname "$1"; shift
names=$1; shift
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch/up" "$scratch/work" "$scratch/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$scratch/up,workdir=$scratch/work" "$scratch/root"
cd "$scratch/root"
mount -t proc proc proc
mount --rbind /dev dev
while [ "$1" != -- ]; do mkdir -p ".$1"; mount --rbind "$1" ".$1"; shift; done; shift
mkdir -p opt/ml
mount --rbind "$ml" opt/ml
rm -f etc/hosts
printf '%s' "$names" > etc/hosts
exec chroot . "$@"
"""


class Instance:
    """One running container."""

    def __init__(self, outer: subprocess.Popen[bytes], log: Path) -> None:
        self._outer = outer
        self._log = log

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text(errors="replace")

    def poll(self) -> int | None:
        return self._outer.poll()

    def wait(self, seconds: float) -> int:
        return self._outer.wait(seconds)

    def terminate(self) -> None:
        """SIGTERM to its first process, as SageMaker does."""
        psutil.Process(self._outer.pid).children()[0].terminate()

    def kill_one(self, *words: str) -> None:
        """SIGKILL to the process in it whose command line ends so."""
        family = psutil.Process(self._outer.pid).children(recursive=True)
        (found,) = [process for process in family if process.cmdline()[-len(words) :] == list(words)]
        found.kill()

    def kill(self) -> None:
        """End of its first process, and so of all."""
        if self._outer.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self._outer.pid).children():
                    child.kill()
            self._outer.kill()
        self._outer.wait()


class Instances:
    """Machines with names, in one network, from which this process' server on a loopback port is reached.

    Args:
        folder: for what they write.
        names: of the machines.
        server_port: on the loopback of the host.
    """

    def __init__(self, folder: Path, names: Sequence[str], server_port: int) -> None:
        self._folder = folder
        self._names = list(names)
        self._server_port = server_port
        self._networks: dict[str, int] = {}
        self._started: list[Instance] = []

    def __enter__(self) -> Instances:  # noqa: PYI034 - typing.Self came with Python 3.11
        with contextlib.ExitStack() as until_stopped:
            hub = until_stopped.enter_context(_network())
            _inside(hub, "ip", "link", "set", "lo", "up")
            _inside(hub, "ip", "link", "add", "name", "hub", "type", "bridge")
            _inside(hub, "ip", "addr", "add", f"{HUB}/24", "dev", "hub")
            _inside(hub, "ip", "link", "set", "hub", "up")
            for number, name in enumerate(self._names):
                self._networks[name] = pid = until_stopped.enter_context(_network())
                port = f"port{number}"
                _inside(
                    hub, "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid)
                )
                _inside(hub, "ip", "link", "set", port, "master", "hub", "up")
                _inside(pid, "ip", "addr", "add", f"{self._address(name)}/24", "dev", "eth0")
                _inside(pid, "ip", "link", "set", "eth0", "up")
                _inside(pid, "ip", "link", "set", "lo", "up")
            listener = until_stopped.enter_context(_listener(hub))
            self.endpoint = f"http://{HUB}:{listener.getsockname()[1]}"
            _Forwarder(listener, self._server_port).start()
            self._until_stopped = until_stopped.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._until_stopped:
            for instance in self._started:
                instance.kill()

    def start(self, name: str, command: Sequence[str], *, env: Mapping[str, str], ml: Path) -> Instance:
        """A new container on a machine."""
        scratch = self._folder / f"scratch-{len(self._started)}"
        scratch.mkdir()
        log = self._folder / f"log-{len(self._started)}"
        hosts = "127.0.0.1 localhost\n" + "".join(
            f"{self._address(other)} {other}\n" for other in self._names
        )
        program = shutil.which(command[0], path=env["PATH"]) or command[0]
        # What a container has of its image: Python, its packages, and this one.
        image = dict.fromkeys(
            map(str, (REPOSITORY, Path(sys.base_prefix).resolve(), sys.prefix, REPOSITORY / ".venv"))
        )
        image = {os.path.realpath(path): None for path in image if os.path.isdir(path)}
        words = [
            *(*dies_with_us(), "nsenter", "-t", str(self._networks[name]), "-n"),
            *("unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"),
            *("bash", "-c", ENTER, "enter", str(scratch), str(ml), name, hosts, *image, "--"),
            *(program, *command[1:]),
        ]
        with open(log, "wb") as output:
            outer = subprocess.Popen(
                words, env=dict(env), stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/"
            )
        self._started.append(Instance(outer, log))
        return self._started[-1]

    def _address(self, name: str) -> str:
        return f"10.77.0.{10 + self._names.index(name)}"


def not_possible() -> str | None:
    """Why this machine cannot make them; None if it can."""
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found (apt-get install util-linux iproute2)"
    script = (
        "mount -t tmpfs tmpfs /mnt && mkdir /mnt/up /mnt/work /mnt/root && "
        "mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/up,workdir=/mnt/work /mnt/root && "
        "ip link add name near type veth peer name far"
    )
    words = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "bash", "-c", script]
    tried = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"no namespaces here: {tried.stderr.strip()[-300:]}" if tried.returncode else None


@contextlib.contextmanager
def _network() -> Iterator[int]:
    """The pid of a process that keeps a network namespace alive."""
    words = [*dies_with_us(), "unshare", "--net", "sh", "-c", "echo ready && exec sleep infinity"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as keeper:
        try:
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == b"ready\n"
            yield keeper.pid
        finally:
            keeper.kill()


def _inside(pid: int, *words: str) -> None:
    done = subprocess.run(
        ["nsenter", "-t", str(pid), "-n", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (words, done.stderr)


@contextlib.contextmanager
def _listener(pid: int) -> Iterator[socket.socket]:
    """A listening socket in a different network: a socket stays in the namespace of the thread that made it."""
    made: list[Any] = []

    def make() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{pid}/ns/net") as there:
            if libc.setns(there.fileno(), 0) != 0:
                made.append(OSError(ctypes.get_errno(), "setns"))
                return
        made.append(socket.create_server((HUB, 0)))

    thread = threading.Thread(target=make, name="listener")
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    with made[0] as listener:
        yield listener


class _Forwarder(threading.Thread):
    """Takes connections, and passes each on to a port of the loopback, until the listener is closed."""

    def __init__(self, listener: socket.socket, port: int) -> None:
        super().__init__(name="forwarder", daemon=True)
        self._listener = listener
        self._port = port

    def run(self) -> None:
        self._listener.settimeout(0.2)
        while self._listener.fileno() != -1:
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            near.settimeout(None)
            thread = threading.Thread(target=_forward, args=(near, self._port), name="forward", daemon=True)
            thread.start()


def _forward(near: socket.socket, port: int) -> None:
    with near, socket.create_connection(("127.0.0.1", port)) as far:
        back = threading.Thread(target=_pump, args=(far, near), name="pump", daemon=True)
        back.start()
        _pump(near, far)
        back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while block := source.recv(65536):
            target.sendall(block)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
