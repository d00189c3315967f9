"""What one rank of `examples/fsdp` does in a test: train, note the losses, write the whole state down, wait to be killed.

torchrun … _fsdp_ranks.py '{"run_url": "run", "checkpoint_dir": "host-{rank}", "steps": 12, …}'
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from examples.fsdp.train import Training, train


def main(
    run_url: str | None,
    checkpoint_dir: str,
    steps: int,
    result: str | None = None,
    loaded: str | None = None,
    hold: dict[str, int] | None = None,
    save_every: int = 4,
) -> list[float]:
    """Train; gives the losses of this rank's samples.

    Args:
        checkpoint_dir: `{rank}` in it is replaced: a disk for each rank.
        result: file for the whole state at the end; `loaded`: for that which was resumed from.
        hold: the step after which a rank waits to be killed.
    """
    dist.init_process_group("gloo")
    load = dcp.load

    def load_and_dump(state: dict[str, Any], **arguments: Any) -> None:
        load(state, **arguments)
        dump(state["training"], loaded)

    dcp.load = load_and_dump
    losses = []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if hold is not None and (step, dist.get_rank()) == (hold["step"], hold["rank"]):
            time.sleep(600)

    folder = checkpoint_dir.format(rank=dist.get_rank())
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # without a run, a log of the metrics is written here
    dump(train(run_url, folder, steps, save_every, report), result)
    dist.barrier()
    dist.destroy_process_group()
    return losses


def dump(training: Training, path: str | None) -> None:
    """Every tensor of model and optimizer, whole, from rank 0."""
    if path is None:
        return
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = get_state_dict(training.model, training.optimizer, options=options)
    if dist.get_rank() == 0:
        save_file(dict(tensors({"model": model, "optimizer": optimizer})), path)


def tensors(found: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(found, torch.Tensor):
        yield name, found.contiguous()
    elif isinstance(found, dict):
        for key, item in found.items():
            yield from tensors(item, f"{name}/{key}")


def agent(argv: list[str]) -> None:
    """One host's torchrun."""
    from torch.distributed.run import main as torchrun

    torchrun(argv)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(**json.loads(sys.argv[1]))
