"""Nodes and processes of a job, and the environment of each node: data, the same for every engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from hf_cloudtrain import env
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.launch.environment import with_hook

CONTRACT = (
    *("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK"),
    *("NODE_RANK", "NUM_NODES", "NPROC_PER_NODE"),
    *("PET_NNODES", "PET_NODE_RANK", "PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
    *("PET_MAX_RESTARTS", "PET_SHUTDOWN_TIMEOUT"),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    *(env.RUN_URL, env.EXPERIMENT, env.CHECKPOINT_DIR, env.RESTORED_CHECKPOINT, env.EXIT_FILE, env.GRACE),
    env.LAUNCH_NOTES,
)
"""Variables that every engine sets for the script. Of these a job's `env` may set the grace time only."""
PYTHONPATH = "PYTHONPATH"
PROCESSED_ITERS = "PROCESSED_ITERS"
PERIFLOW = (env.PERIFLOW_CHECKPOINT_DIR, PROCESSED_ITERS)
"""PeriFlow's names of what its scripts read; a job's `env` may set them, because they are common names."""


def periflow_variables(checkpoint_dir: str | None, step: int) -> dict[str, str]:
    """What PeriFlow's scripts read, where the job does not set it.

    Args:
        checkpoint_dir: the checkpoint folder as the script sees it, if the job has one.
        step: of the checkpoint in it; 0 without one.
    """
    folder = {} if checkpoint_dir is None else {env.PERIFLOW_CHECKPOINT_DIR: checkpoint_dir}
    return {**folder, PROCESSED_ITERS: str(step)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Nodes, processes, and the variables of the job. Data only: it starts nothing."""

    nodes: int
    nproc_per_node: int
    checkpoint_dir: str | None = None
    """The checkpoint folder as the script sees it, absolute."""
    variables: Mapping[str, str | None] = dataclasses.field(default_factory=dict, repr=False)
    """The job's own variables; None: the shell that submits the job has the value."""
    grace_seconds: float | None = None
    """Seconds between the notice and the end; None: take it from the variables."""
    experiment: str | None = None
    """The group that the run belongs to."""
    launch: bool = False
    """Whether the command gets the hook of `cloudtrain launch`."""
    price: float | None = None
    """Hourly price of all nodes, if it is known. A `HF_CLOUDTRAIN_PRICE` of the job or of the shell takes precedence."""

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.nproc_per_node

    @property
    def grace(self) -> float:
        """Seconds between the notice and the end: the job's own `HF_CLOUDTRAIN_GRACE`, else 30."""
        if self.grace_seconds is not None:
            return self.grace_seconds
        return float(self.variables.get(env.GRACE) or env.DEFAULT_GRACE)

    def environment(
        self,
        node_rank: int,
        *,
        master_addr: str,
        master_port: int,
        run_url: str,
        exit_file: str,
        grace: float | None = None,
        shell: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """The environment of the command on one node, the same on every engine.

        A launcher knows its node, not its processes: `RANK` and `LOCAL_RANK` are those of the node's first process, and
        torchrun sets those of each. The supervisor restarts all nodes: torchrun's own restarts hang with a static
        rendezvous (pytorch #135712, #167288), which is also why its store is not shared.

        Args:
            node_rank: 0 to `nodes` - 1.
            master_addr: host of node 0, as the other nodes reach it.
            master_port: free port on it.
            run_url: URL of the run.
            exit_file: file in which the script records how it ended.
            grace: seconds between the notice and the end; None: the job's.
            shell: where to take variables without a value from, such as `os.environ`.

        Raises:
            ConfigurationError: `node_rank` is out of range, or the shell lacks a variable.
        """
        if not 0 <= node_rank < self.nodes:
            raise ConfigurationError(
                f"node_rank={node_rank!r} is out of range: the job has {self.nodes} nodes, numbered from 0."
            )
        seconds = self.grace if grace is None else grace
        rank = node_rank * self.nproc_per_node
        contract: dict[str, object] = {
            "MASTER_ADDR": master_addr,
            "MASTER_PORT": master_port,
            "WORLD_SIZE": self.world_size,
            "RANK": rank,
            "LOCAL_RANK": 0,
            "NODE_RANK": node_rank,
            "NUM_NODES": self.nodes,
            "NPROC_PER_NODE": self.nproc_per_node,
            "PET_NNODES": self.nodes,
            "PET_NODE_RANK": node_rank,
            "PET_NPROC_PER_NODE": self.nproc_per_node,
            "PET_MASTER_ADDR": master_addr,
            "PET_MASTER_PORT": master_port,
            "PET_MAX_RESTARTS": 0,
            "PET_SHUTDOWN_TIMEOUT": math.ceil(seconds),  # torchrun accepts whole seconds only
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1,
            env.RUN_URL: run_url,
            env.EXIT_FILE: exit_file,
            env.GRACE: f"{seconds:g}",
        }
        if self.experiment is not None:
            contract[env.EXPERIMENT] = self.experiment
        if self.checkpoint_dir is not None:
            contract[env.CHECKPOINT_DIR] = self.checkpoint_dir
        is_set = self.price is None or (shell or {}).get(env.PRICE)
        known = {} if is_set else {env.PRICE: str(self.price)}
        found = {
            **known,
            **self.own_variables(shell or {}),
            **{name: str(value) for name, value in contract.items()},
        }
        if self.launch:
            found[env.LAUNCH_NOTES] = f"{exit_file}.launch"
            found[PYTHONPATH] = with_hook(found.get(PYTHONPATH) or (shell or {}).get(PYTHONPATH))
        return found

    def shown(self, environment: Mapping[str, str]) -> dict[str, str]:
        """The environment for display: the values of the job's own variables are hidden."""
        return {
            name: "***" if name in self.variables and name not in CONTRACT else value
            for name, value in environment.items()
        }

    def own_variables(self, shell: Mapping[str, str]) -> dict[str, str]:
        """The job's own variables with their values. Raises ConfigurationError if the shell lacks one."""
        missing = sorted(
            name for name, value in self.variables.items() if value is None and name not in shell
        )
        if missing:
            raise ConfigurationError(
                f"The job takes {', '.join(map(repr, missing))} from this shell, where it is not set. Values are not stored with "
                f"the job, so a resume needs them again. Set it: export {missing[0]}=…"
            )
        return {name: shell[name] if value is None else value for name, value in self.variables.items()}
