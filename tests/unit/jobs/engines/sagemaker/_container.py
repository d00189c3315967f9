"""A container of SageMaker for the tests: its folders, and a fake in place of its node."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import ClassVar

from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission
from hf_cloudtrain.preemption.sources import RUN_STOP

JOB = """
name: small
job_setting:
  docker: {{command: "true"}}
  workspace: {{mount_path: {mounts}/workspace}}
checkpoint: {{output_checkpoint_dir: {mounts}/workspace/ckpt}}
data: {{name: numbers, mount_path: {mounts}/data}}
max_restarts: 2
num_devices: {nodes}
"""


class FakeNode:
    """In place of `NodeProcess`: each start ends as the test wants, and writes what a node would write.

    An exit code; or an outcome; or "hold", which runs until it is stopped, and then saves; or "stuck", which cannot save
    without the others; or "SIGTERM", which this process receives while the node runs.
    """

    endings: ClassVar[dict[int, list[str | int]]] = {}
    starts: ClassVar[list[tuple[int, int]]] = []
    environment: ClassVar[dict[str, str]] = {}

    def __init__(self, submission: Submission, rank: int, master_addr: str) -> None:
        self.submission, self.rank, self.master_addr = submission, rank, master_addr
        self.code: int | None = None
        self.number = 0

    def start(self, number: int) -> None:
        FakeNode.starts.append((self.rank, number))
        FakeNode.environment = dict(os.environ)
        self.number, self.code, self.stuck = number, None, False
        ending = self.endings[self.rank].pop(0)
        if isinstance(ending, int):
            self.end(ending, None)
        elif ending == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        elif ending == "run stop":
            self.end(75, "preempted", reason=f"{RUN_STOP} by a user")
        elif ending == "stuck":
            self.stuck = True
        elif ending != "hold":
            self.end({"finished": 0, "preempted": 75}.get(ending, 1), ending)

    def end(self, code: int, outcome: str | None, *, stopped: bool = False, reason: str = "SIGUSR1") -> None:
        written = {"node": {"exit_code": code, "problem": None, "stopped": stopped}}
        if outcome is not None:
            written["exit"] = {"outcome": outcome, "reason": reason, "committed": "000001-0000000006"}
        for name, content in written.items():
            path = self.submission.home / "nodes" / str(self.rank) / f"{name}-{self.number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        self.code = code

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        if self.number and self.code is None:
            code, outcome = (1, None) if self.stuck else (75, "preempted")
            self.end(code, outcome, stopped=True)

    def kill(self) -> None:
        if self.code is None:
            self.code = -9


@dataclasses.dataclass
class Image:
    """A container's folders."""

    root: Path
    mounts: Path
    store: JobStore

    def write(self, name: str, text: str) -> None:
        path = self.root / "input" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def failure(self) -> str | None:
        path = self.root / "output/failure"
        return path.read_text() if path.exists() else None


def hosts(image: Image, names: list[str], current: str) -> None:
    resources = {"current_host": current, "hosts": names, "network_interface_name": "eth7"}
    image.write("config/resourceconfig.json", json.dumps(resources))
    channels = {name: {"TrainingInputMode": "File"} for name in ("cloudtrain", "dataset", "train")}
    image.write("config/inputdataconfig.json", json.dumps(channels))
    image.write("config/hyperparameters.json", json.dumps({"lr": "0.1", "name": "x y"}))


def job(image: Image, nodes: int, *, has_workspace: bool = True) -> None:
    read = parse_job(JOB.format(mounts=image.mounts, nodes=nodes).encode())
    plan = dataclasses.replace(read.plan(nodes=nodes, nproc_per_node=1), grace_seconds=105.0)
    run_url = f"{image.mounts}-run"
    submission = Submission(read, plan, "small-1", run_url, image.store.url, image.root, has_workspace)
    image.write("data/cloudtrain/job.json", json.dumps(submission.encode()))
