"""Processes under a launcher, and a SIGKILL for all of them at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.integration._zygote import PATIENCE, REPOSITORY

PATHS = os.pathsep.join([str(Path(__file__).parent / "_site"), os.environ.get("PYTHONPATH", "")]).rstrip(
    os.pathsep
)


@contextmanager
def torchrun(*arguments: str, log: Path, env: dict[str, str] | None = None) -> Iterator[psutil.Popen]:
    """The launcher of two workers; what is left of it at the end gets SIGKILL. `arguments` name the script."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with _started(*command, *arguments, log=log, env=env) as launcher:
        yield launcher


@contextmanager
def accelerate_launch(
    *arguments: str, processes: int, log: Path, env: dict[str, str] | None = None
) -> Iterator[psutil.Popen]:
    """The same by `accelerate launch`, which starts no second process on a CPU without `--multi_gpu`."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    command = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), *several]
    with _started(*command, *arguments, log=log, env=env) as launcher:
        yield launcher


def kill_family(launcher: psutil.Popen) -> None:
    """SIGKILL to the launcher and its workers, which are in sessions of their own."""
    if launcher.poll() is not None:
        return
    launcher.suspend()  # it must not start anything while we look
    family = [*launcher.children(recursive=True), launcher]
    for process in family:
        process.kill()
    launcher.wait(PATIENCE)
    psutil.wait_procs(family, PATIENCE)


@contextmanager
def _started(*arguments: str, log: Path, env: dict[str, str] | None) -> Iterator[psutil.Popen]:
    with open(log, "w") as output:
        launcher = psutil.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, **(env or {})},
            cwd=REPOSITORY,
            stdout=output,
            stderr=output,
        )
    try:
        yield launcher
    finally:
        kill_family(launcher)
