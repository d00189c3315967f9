"""A job as it is handed to an engine and to its nodes: `job.json` in the job's home, without the value of any variable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.spec.job import Job
from hf_cloudtrain.jobs.spec.node_plan import Plan

FILE = "job.json"
SUPERVISOR_LOCK = "supervisor.lock"
"""In the home: held by whoever watches over the job on this machine."""


@dataclass(frozen=True)
class Submission:
    """Everything that is decided about a job before its first process starts.

    Example:
        >>> submission = Submission.load("/home/me/.hf_cloudtrain/jobs/mnli-1")
        >>> submission.plan.nodes, submission.run_url
        (2, 's3://bucket/runs/mnli')
    """

    job: Job
    plan: Plan
    id: str
    run_url: str
    store: str
    home: Path
    has_workspace: bool = False
    """Whether a copy of a folder is in `workspace/` of the home."""
    dataset_version: int | None = None
    """Version of `job.data`, decided when the job was submitted: all starts of a job see one."""

    @property
    def workspace(self) -> Path:
        """The folder that the job finds at its workspace's mount path; empty where none was given."""
        return self.home / "workspace"

    @property
    def log(self) -> Path:
        """Folder of what the nodes say."""
        return self.home / "log"

    def node_log(self, node_rank: int) -> Path:
        """What one node says."""
        return self.log / f"node-{node_rank}.log"

    def exit_file(self, node_rank: int, start: int) -> Path:
        """Where the script of one node says how it ended."""
        return self.home / "nodes" / str(node_rank) / f"exit-{start}.json"

    def node_file(self, node_rank: int, start: int) -> Path:
        """Where one node says how its command ended."""
        return self.home / "nodes" / str(node_rank) / f"node-{start}.json"

    def restored_file(self, start: int) -> Path:
        """Which checkpoint the nodes that share this folder take for one start."""
        return self.home / "nodes" / f"restored-{start}"

    def forget_start(self, number: int) -> None:
        """Take away what nodes have left of a start of this number, which no record knows."""
        ranks = range(self.plan.nodes)
        left = [
            *(self.exit_file(rank, number) for rank in ranks),
            *(self.node_file(rank, number) for rank in ranks),
        ]
        for path in (*left, self.restored_file(number)):
            path.unlink(missing_ok=True)

    def save(self) -> None:
        """Write `job.json`."""
        self.home.mkdir(parents=True, exist_ok=True)
        beside = self.home / f".{FILE}"
        beside.write_text(json.dumps(self.encode(), indent=2) + "\n")
        os.replace(beside, self.home / FILE)

    def encode(self) -> dict[str, Any]:
        """What `job.json` holds. Variables have names there, and no values."""
        job = self.job.model_dump(mode="json", exclude_none=True)
        job["env"] = dict.fromkeys(self.job.env)
        return {
            "id": self.id,
            "run_url": self.run_url,
            "store": self.store,
            "nodes": self.plan.nodes,
            "nproc_per_node": self.plan.nproc_per_node,
            "grace": self.plan.grace,
            "has_workspace": self.has_workspace,
            "dataset_version": self.dataset_version,
            "job": job,
        }

    @classmethod
    def load(cls, home: str | os.PathLike[str]) -> Submission:
        """The one in a job's home. Raises OSError, ValueError."""
        return cls.decode(json.loads(Path(home, FILE).read_text()), Path(home))

    @classmethod
    def load_here(cls, home: str | os.PathLike[str]) -> Submission:
        """The same for a person. Raises ConfigurationError where it is not on this machine."""
        try:
            return cls.load(home)
        except FileNotFoundError:
            raise ConfigurationError(
                f"{os.fspath(home)!r} has no {FILE}: the job was submitted on another machine (look from one that shares "
                "its disk), or its submission was broken off (submit it again)."
            ) from None

    @classmethod
    def decode(cls, record: Mapping[str, Any], home: Path) -> Submission:
        """The one that `encode` gave, with its home wherever it is now."""
        job = Job.model_validate(record["job"])
        if env.GRACE in job.env:  # no secret, and known
            job = job.model_copy(update={"env": {**job.env, env.GRACE: f"{record['grace']:g}"}})
        nodes, nproc_per_node = record["nodes"], record["nproc_per_node"]
        plan = Plan(nodes, nproc_per_node, job.checkpoint_dir, job.env, record["grace"])
        return cls(
            job=job,
            plan=plan,
            id=record["id"],
            run_url=record["run_url"],
            store=record["store"],
            home=home,
            has_workspace=record["has_workspace"],
            dataset_version=record["dataset_version"],
        )
