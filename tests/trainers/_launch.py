"""A command, uninterrupted without this package; and under `cloudtrain launch`, killed, and started again in an empty folder."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from safetensors.torch import load_file

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.exactness import Exactness
from hf_cloudtrain.env import RUN_URL
from hf_cloudtrain.storage.client import Storage
from tests.trainers._commands import FETCHED, SAVE_STEPS, Command

PATIENCE = 300.0
"""Seconds for a start of a command: imports of torch, transformers and trl on a loaded machine."""


class CommandError(RuntimeError):
    """A command did not do what it must; the text ends with its last output."""


@dataclass(frozen=True)
class Outcome:
    """What a kill and a resume of a command gave."""

    difference: float
    resumed_from: int
    exact: Exactness

    @property
    def said(self) -> str:
        """In one line."""
        return (
            f"resumed from step {self.resumed_from}, differs by {self.difference:.0e}, recorded {self.exact}"
        )


def measure(command: Command, root: Path, chosen: random.Random) -> Outcome:
    """Run the command three times, and compare the weights at the end."""
    plain, url = root / "plain", (root / "run").as_uri()
    _finish(_start(command, _machine(command, plain)), plain)
    first = _machine(command, root / "first")
    _kill_in_training(_start(command, first, url), first, url, chosen)
    first.rename(root / "gone")  # with its machine: nothing there is found again
    catalog = Catalog(Storage(url))
    newest = catalog.checkpoints()[-1]
    manifest = catalog.read(newest)  # the second start may delete it
    second = _machine(command, root / "second")
    _finish(_start(command, second, url), second)
    resumed = catalog.attempts.read(max(catalog.attempts.numbers())).resumed_from
    if resumed != newest:
        raise CommandError(f"the second start began at {resumed}, not at {newest}\n{_tail(second)}")
    return Outcome(
        difference=difference(
            _weights(plain, command.weights), _weights(second, command.resumed_weights or command.weights)
        ),
        resumed_from=resumed.step,
        exact=Exactness(manifest.exact, manifest.inexact_reason),
    )


def difference(one: Path, other: Path) -> float:
    """The largest difference of the weights of two files."""
    first, second = load_file(one), load_file(other)
    if first.keys() != second.keys():
        raise CommandError(f"{one} and {other} hold tensors of different names")
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


def environment(command: Command, folder: Path) -> dict[str, str]:
    """No hub, no settings of this shell, and the commands of the environment first on the path."""
    return {
        "PATH": f"{command.python.parent}:{os.environ['PATH']}",
        "HOME": str(folder.parent),
        "HF_HOME": str(folder.parent / "hf"),
        "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
        "HF_HUB_OFFLINE": "1",
        "HF_CLOUDTRAIN_CLOUD_NOTICES": "off",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **command.settings,
    }


def _machine(command: Command, folder: Path) -> Path:
    """A working directory as it is on a machine that has never seen the run."""
    folder.mkdir(parents=True)
    command.prepare(folder)
    if command.fetched:
        (folder / command.fetched).write_bytes((Path(os.environ[FETCHED]) / command.fetched).read_bytes())
    return folder


def _start(command: Command, folder: Path, url: str | None = None) -> subprocess.Popen[bytes]:
    words, settings = shlex.split(command.line), environment(command, folder)
    if url is not None and command.plugged is None:
        words = ["cloudtrain", "launch", "--run-url", url, *shlex.split(command.options), "--", *words]
    elif url is not None:
        words, settings[RUN_URL] = shlex.split(command.plugged), url
    with _log(folder).open("wb") as log:
        # fmt: off
        return subprocess.Popen(
            words, cwd=folder, env=settings, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )
        # fmt: on


def _finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    try:
        code = process.wait(PATIENCE)
    finally:
        _kill(process)
    if code:
        raise CommandError(f"ended with {code}: {shlex.join(map(str, process.args))}\n{_tail(folder)}")


def _kill_in_training(
    process: subprocess.Popen[bytes], folder: Path, url: str, chosen: random.Random
) -> None:
    """SIGKILL at a random moment after a random one of the first commits, to all processes of the command at once."""
    catalog, deadline = Catalog(Storage(url)), time.monotonic() + PATIENCE
    step = SAVE_STEPS * chosen.randint(1, 4)  # not their number: the command may keep few
    try:
        while not any(key.step >= step for key in catalog.checkpoints()):
            if process.poll() is not None:
                raise CommandError(f"ended before it was killed: {process.returncode}\n{_tail(folder)}")
            if time.monotonic() > deadline:
                raise CommandError(f"step {step} was not committed within {PATIENCE:.0f} s\n{_tail(folder)}")
            time.sleep(0.02)
        time.sleep(chosen.uniform(0, 0.2))
    finally:
        _kill(process)
    if process.returncode != -signal.SIGKILL:
        raise CommandError(f"ended with {process.returncode} before it was killed\n{_tail(folder)}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The whole tree: torchrun gives each worker a session of its own."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def _weights(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise CommandError(f"no {pattern} in {folder}\n{_tail(folder)}")
    return found[-1]


def _log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def _tail(folder: Path) -> str:
    return _log(folder).read_text(errors="replace")[-3000:]
