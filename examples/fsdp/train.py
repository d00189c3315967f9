"""Train a sharded model (FSDP2) in a plain loop; each rank writes its shards with torch.distributed.checkpoint (DCP).

    torchrun --nproc_per_node 2 examples/fsdp/train.py --run-url s3://bucket/runs/fsdp

Kill it and start it again anywhere, on the same number of ranks or a different one: DCP redistributes the shards. On several hosts
(`torchrun --nnodes 2 …`) each host uploads the shards on its own disk.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hf_cloudtrain as ct

WIDTH, BATCH = 16, 8


class Training(Stateful):
    """The content of a checkpoint: model and optimizer, of which each rank holds its shards."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def make_model() -> nn.Module:
    """Create a model that is sharded over all ranks: first each layer, then the whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's part of the samples of a step, which depend only on the step."""
    chance = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, WIDTH, generator=chance)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    return inputs[mine], inputs.sum(1, keepdim=True)[mine]


def train(
    run_url: str | None,
    checkpoint_dir: str,
    steps: int,
    save_every: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Training:
    """Train to the last step, from the newest checkpoint of the run if there is one."""
    ct.init(steps, run_url=run_url, checkpoint_dir=checkpoint_dir)
    model = make_model()
    training = Training(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    folder = ct.restore()
    if folder is not None:
        dcp.load({"training": training}, checkpoint_id=folder)
    for step in range(ct.processed_steps() + 1, steps + 1):
        inputs, targets = batch(step)
        with ct.train_step():
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
        ct.metric({"loss": loss})
        report(step, loss.item())
        if step % save_every == 0 or step == steps or ct.is_emergency_save():
            # Without this file, DCP does not warn that it overwrites a checkpoint. It writes the file last, after all shards.
            Path(checkpoint_dir, ".metadata").unlink(missing_ok=True)
            dcp.save({"training": training}, checkpoint_id=checkpoint_dir)
            ct.upload_checkpoint()
    return training


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-url", help="any fsspec URL or folder; without it nothing is uploaded")
    parser.add_argument("--checkpoint-dir", default="checkpoint")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")

    def report(step: int, loss: float) -> None:
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)

    train(**vars(arguments), report=report)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
