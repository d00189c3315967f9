"""A complete torchrun job: its agent and two ranks of a real Trainer, forked so that no process has to import torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import Trainer

from hf_cloudtrain.checkpoints import checkpointer
from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.sender import EntrySender
from hf_cloudtrain.storage.client import Storage
from tests.chaos._kill import Aim, Phases, Watch
from tests.integration._attempts import train
from tests.integration._lab import max_difference as difference

PHASES: Phases = {
    "flush": (checkpointer, "finish_left_overs"),
    "restore": (Checkpointer, "restore"),
    "download": (Storage, "download"),
    "begin": (Checkpointer, "begin"),
    "Trainer's save": (Trainer, "_save_checkpoint"),
    "save": (Checkpointer, "save"),
    "upload": (Storage, "upload"),
    "commit": (EntrySender, "_commit"),
    "end": (Checkpointer, "wait"),
}
RANKS = 2
ARGUMENTS: dict[str, Any] = {"num_train_epochs": 3, "save_steps": 2, "save_total_limit": 2}

__all__ = ["PHASES", "attempt", "difference", "plain"]


def plain(result: str) -> None:
    """The same training, uninterrupted and without hf_cloudtrain."""
    launch({"output_dir": str(Path(result).with_suffix(".out")), "result": result})


def attempt(
    output_dir: str, run_url: str, state: str, result: str, hurry: float, aim: dict[str, Any] | None = None
) -> None:
    """One start of the job. `hurry` has no effect."""
    launch(
        {"output_dir": output_dir, "run_url": run_url, "result": result},
        state=state,
        aim=aim,
    )


def launch(arguments: dict[str, Any], **watched: Any) -> None:
    os.setpgrp()  # which the agent's children inherit: the job
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=RANKS,
        run_id="chaos",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        start_method="fork",
        monitor_interval=0.05,
        max_restarts=0,
    )
    elastic_launch(config, rank)(arguments, watched)


def rank(arguments: dict[str, Any], watched: dict[str, Any]) -> None:
    """One of the ranks. Only rank 0 moves bytes; rank 1 is killed in phases that both ranks have."""
    if watched:
        number = int(os.environ["RANK"])
        aim = Aim(**watched["aim"]) if watched["aim"] and watched["aim"].pop("rank") == number else None
        Watch(PHASES, f"{watched['state']}" if number == 0 else os.devnull, aim).begin()
    train(**arguments, **ARGUMENTS)
