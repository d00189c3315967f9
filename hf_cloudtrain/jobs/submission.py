"""A job as its engine and its nodes receive it: `job.json` in the job's home, without the values of variables."""

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
from hf_cloudtrain.runtime.values import number

FILE = "job.json"
SUPERVISOR_LOCK = "supervisor.lock"
"""In the home: the lock of the job's supervisor on this machine."""

_PLAIN = ("id", "run_url", "store", "has_workspace", "dataset_version")
"""Fields that `job.json` has as they are."""


@dataclass(frozen=True)
class Submission:
    """All decisions about a job before its first process starts."""

    job: Job
    plan: Plan
    id: str
    run_url: str
    store: str
    home: Path
    has_workspace: bool = False
    """Whether `workspace/` in the home is a copy of the user's folder."""
    dataset_version: int | None = None
    """Version of `job.data`, chosen at submission so that all starts of a job see the same one."""
    code: str = ""
    """Name of the user's folder in `workspace/`, where the command starts; "" without `-d`."""

    @property
    def workspace(self) -> Path:
        """The folder that the job finds at its workspace's mount path; empty without `-d`."""
        return self.home / "workspace"

    @property
    def start_folder(self) -> str:
        """Where the command starts, as the job sees it."""
        return self.job.start_folder(self.code)

    @property
    def log(self) -> Path:
        """Folder of the nodes' output."""
        return self.home / "log"

    def node_log(self, node_rank: int) -> Path:
        """Output of one node."""
        return self.log / f"node-{node_rank}.log"

    def exit_file(self, node_rank: int, start: int) -> Path:
        """File in which the script on one node records how it ended."""
        return self.home / "nodes" / str(node_rank) / f"exit-{start}.json"

    def node_file(self, node_rank: int, start: int) -> Path:
        """File in which one node records how its command ended."""
        return self.home / "nodes" / str(node_rank) / f"node-{start}.json"

    def restored_file(self, start: int) -> Path:
        """File with the checkpoint that the nodes on this disk restore in one start."""
        return self.home / "nodes" / f"restored-{start}"

    def forget_start(self, number: int) -> None:
        """Delete the files of an old start with this number, whose supervisor was killed before it recorded it."""
        for rank in range(self.plan.nodes):
            self.exit_file(rank, number).unlink(missing_ok=True)
            self.node_file(rank, number).unlink(missing_ok=True)
        self.restored_file(number).unlink(missing_ok=True)

    def save(self) -> None:
        """Write `job.json`."""
        self.home.mkdir(parents=True, exist_ok=True)
        beside = self.home / f".{FILE}"
        beside.write_text(json.dumps(self.encode(), indent=2) + "\n")
        os.replace(beside, self.home / FILE)

    def encode(self) -> dict[str, Any]:
        """The content of `job.json`: of variables only the names."""
        job = self.job.model_dump(mode="json", exclude_none=True)
        job["env"] = dict.fromkeys(self.job.env)
        plan = self.plan
        shape = {
            "nodes": plan.nodes,
            "nproc_per_node": plan.nproc_per_node,
            "grace": plan.grace,
            "price": plan.price,
        }
        return {**{name: getattr(self, name) for name in _PLAIN}, **shape, "code": self.code, "job": job}

    @classmethod
    def load(cls, home: str | os.PathLike[str]) -> Submission:
        """The submission in a job's home. Raises OSError, ValueError."""
        return cls.decode(json.loads(Path(home, FILE).read_text()), Path(home))

    @classmethod
    def load_here(cls, home: str | os.PathLike[str]) -> Submission:
        """As `load`, for a command line. Raises ConfigurationError if the home is not on this machine, or not valid."""
        try:
            return cls.load(home)
        except FileNotFoundError:
            raise ConfigurationError(
                f"{os.fspath(home)!r} has no {FILE}: either the job was submitted on a different machine (use one that "
                "shares its disk), or its submission was interrupted (submit it again)."
            ) from None
        except ValueError:
            raise ConfigurationError(
                f"{os.fspath(Path(home, FILE))!r} is not valid in this version of hf_cloudtrain, such as a 'run_url' that it "
                "refuses. Submit the job file again."
            ) from None

    @classmethod
    def decode(cls, record: Mapping[str, Any], home: Path) -> Submission:
        """The submission that `encode` gave, with its home at its current path."""
        job = Job.model_validate(record["job"])
        if env.GRACE in job.env:  # not a secret, and recorded
            job = job.model_copy(update={"env": {**job.env, env.GRACE: f"{record['grace']:g}"}})
        shape = record["nodes"], record["nproc_per_node"]
        launch = job.launch == "auto"
        price = number(record.get("price"))
        plan = Plan(*shape, job.checkpoint_dir, job.env, record["grace"], job.experiment, launch, price)
        plain = {name: record[name] for name in _PLAIN}
        # A job that was submitted before its folder kept its name starts at the mount path.
        return cls(job=job, plan=plan, home=home, code=record.get("code", ""), **plain)
