"""Jobs for tests: a project folder whose training needs no torch, and a store of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from typer.testing import CliRunner, Result

from hf_cloudtrain.cli import app
from hf_cloudtrain.jobs.records import JobRecord, JobStore

PATIENCE = 120.0
REPOSITORY = Path(__file__).resolve().parents[2]

TRAIN = """
import os, sys, time
from pathlib import Path
import hf_cloudtrain as ct

total, pause = int(sys.argv[1]), float(sys.argv[2])
folder = Path(os.environ["HF_CLOUDTRAIN_CHECKPOINT_DIR"])
state = folder / "state.txt"
value = float(state.read_text()) if state.exists() else 0.0
pause *= not state.exists()
ct.init(total_train_steps=total)
print("begins at", ct.processed_steps(), "with", value, flush=True)
while ct.processed_steps() < total:
    with ct.train_step():
        value = 0.9 * value + ct.processed_steps()
        time.sleep(pause)
    ct.metric({"loss": value})
    if ct.processed_steps() % 5 == 0 or ct.is_emergency_save():
        folder.mkdir(exist_ok=True)
        state.write_text(repr(value))
        ct.upload_checkpoint()
print("ends with", repr(value), flush=True)
"""
"""Saves every 5 steps; its checkpoint folder is that of the job. Only a first start pauses after each step, to be stopped."""


def value_after(steps: int) -> float:
    """The last value of TRAIN without an interruption."""
    value = 0.0
    for step in range(steps):
        value = 0.9 * value + step
    return value


class Desk:
    """What a user of `cloudtrain job …` has: a project folder, and a store.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = folder / "project"
        self.project.mkdir()
        (self.project / "train.py").write_text(TRAIN)
        self.file = folder / "job.yml"
        self.store = JobStore(str(folder / "store"))

    def write(self, command: str, more: str = "", *, name: str = "toy") -> None:
        """Write the job file; the checkpoint folder is `ckpt` in the workspace."""
        indented = "\n".join(f"        {line}" for line in command.splitlines())
        self.file.write_text(
            f"name: {name}\njob_setting:\n  docker:\n    command:\n      run: |\n{indented}\n"
            f"checkpoint: {{output_checkpoint_dir: ckpt}}\n{more}\n"
        )

    def call(self, *argv: str, code: int = 0) -> Result:
        """Call `cloudtrain …`."""
        result = CliRunner().invoke(app, list(argv))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    def run(self, *options: str, code: int = 0) -> Result:
        """`cloudtrain job run` of the file and the project."""
        return self.call("job", "run", "-f", str(self.file), "-d", str(self.project), *options, code=code)

    def record(self, job_id: str = "toy") -> JobRecord:
        """The record in the store."""
        return self.store.read(job_id)

    def status(self, job_id: str = "toy") -> dict[str, Any]:
        """The output of `job status --json`."""
        found: dict[str, Any] = json.loads(self.call("job", "status", job_id, "--json").stdout)
        return found

    def log(self, job_id: str = "toy", node: int = 0) -> str:
        """The output of a node so far."""
        path = Path(self.record(job_id).home, "log", f"node-{node}.log")
        return path.read_text() if path.exists() else ""

    def wait_until(self, is_so: Callable[[], object]) -> None:
        """Wait for a condition; at the deadline it shows the logs of the job."""
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text() for path in self.store_path.glob("jobs/*/log/*"))
                raise TimeoutError(f"{self.store.records()}\n{logs}")
            time.sleep(0.05)

    def wait_until_over(self, job_id: str = "toy") -> JobRecord:
        """The record once the job is over."""
        self.wait_until(lambda: self.record(job_id).is_over)
        return self.record(job_id)

    def wait_for_step(self, step: int, job_id: str = "toy") -> None:
        """Wait until a step is committed."""
        from hf_cloudtrain.checkpoints.catalog import Catalog
        from hf_cloudtrain.storage.client import Storage

        catalog = Catalog(Storage(self.record(job_id).run_url))
        self.wait_until(lambda: any(key.step >= step for key in catalog.checkpoints()))

    @property
    def store_path(self) -> Path:
        """The store's folder."""
        return Path(self.store.url)

    def processes(self) -> list[psutil.Process]:
        """The processes of this machine that belong to a job of this store, by environment or command line."""
        found = []
        for process in psutil.process_iter():
            try:
                command = " ".join(process.cmdline())
                # Not by the store alone: a server that a test has started inherits its name.
                belongs = any(
                    str(self.folder) in text
                    for text in (command, process.environ().get("HF_CLOUDTRAIN_EXIT_FILE", ""))
                )
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if belongs and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def one_of(self, part: str) -> psutil.Process:
        """The process of a job whose command line has this part."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = [process for process in self.processes() if part in " ".join(_cmdline(process))]
            return bool(found)

        self.wait_until(is_there)
        return found[0]

    def close(self) -> None:
        """Kill what a failed test has left running."""
        for process in self.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue


def python(*arguments: str) -> str:
    """A command for this interpreter."""
    return " ".join((sys.executable, *arguments))


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
