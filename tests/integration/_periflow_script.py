"""A plain PyTorch script, as PeriFlow's users have them: it loads before `init`, saves to one path, and has no run URL.

    torchrun --nproc_per_node 2 _periflow_script.py '{"save": "ckpt", "total_steps": 12, …}'

The platform's part is the environment: run URL, checkpoint folder, and which checkpoint it has restored.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hf_cloudtrain as pf
from hf_cloudtrain.preemption import agreement

SAMPLES, WIDTH, BATCH = 96, 8, 4
agreement.INTERVAL_SECONDS = (
    0.0  # vote after each step, although steps take milliseconds, so that the deciding step is known
)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, WIDTH, generator=generator)
    return TensorDataset(torch.arange(SAMPLES), inputs, inputs.sum(1, keepdim=True))


def main(
    save: str,
    total_steps: int,
    result: str | None = None,
    restore: bool = False,
    group: str = "before",
    log: str | None = None,
    **options: Any,
) -> None:
    """Train.

    Args:
        save: the checkpoint folder.
        result: where rank 0 writes the final weights.
        restore: call `restore` rather than trust the platform.
        group: whether the process group is made `before` or `after` init and restore.
        log: file for the metrics without a run URL.
        options: of `train`.
    """
    if group == "before":
        dist.init_process_group("gloo")
    path = os.path.join(save, "checkpoint.pt")
    loaded = load(path) if not restore and os.path.exists(path) else None
    pf.init(total_train_steps=total_steps, local_log_name=log)
    if restore and (folder := pf.restore()) is not None:
        loaded = load(os.path.join(folder, "checkpoint.pt"))
    if group == "after":
        dist.init_process_group("gloo")

    run(loaded, total_steps, path, result, **options)
    # The model is gone by now: its reducer may hang where it outlives the group it was made with.
    dist.barrier()
    dist.destroy_process_group()


def run(loaded: Any, total_steps: int, path: str, result: str | None, **options: Any) -> None:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(WIDTH, 16), nn.Linear(16, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sampler = pf.ResumableSampler(SAMPLES, seed=7)
    if loaded is not None:
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        sampler.load_state_dict(loaded["sampler"])
    step = loaded["latest_step"] if loaded is not None else 0
    assert step == pf.processed_steps(), (step, pf.processed_steps())
    train(model, optimizer, sampler, step, total_steps, path, **options)
    if result and dist.get_rank() == 0:
        save_file(model.module.state_dict(), result)


def train(
    model: Any,
    optimizer: Any,
    sampler: pf.ResumableSampler,
    step: int,
    total_steps: int,
    path: str,
    *,
    save_interval: int = 4,
    seen: str | None = None,
    hold_at: int | None = None,
    signal_at: int | None = None,
    staged: bool = False,
) -> None:
    """Train to the last step.

    Args:
        path: the file to save.
        seen: file for (step, samples); `{rank}` in it is replaced.
        hold_at: step after which it waits to be killed.
        signal_at: step within which the last rank gets SIGTERM.
        staged: save inside `async_writes`, files of any size.
    """
    taken = stage_all() if staged else []
    loader = DataLoader(data(), batch_size=BATCH, sampler=sampler)
    while step < total_steps:
        for numbers, inputs, targets in loader:
            with pf.train_step():
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(inputs), targets)
                loss.backward()
                optimizer.step()
                if step + 1 == signal_at and dist.get_rank() == dist.get_world_size() - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
            step += 1
            sampler.advance(len(numbers))
            note(seen, step, numbers.tolist())
            pf.metric({"iteration": step, "loss": loss})
            if step % save_interval == 0 or step == total_steps or pf.is_emergency_save():
                if dist.get_rank() == 0:
                    state = {"latest_step": step, "model": model.state_dict()}
                    state |= {"optimizer": optimizer.state_dict(), "sampler": sampler.state_dict()}
                    with pf.async_writes() if staged else nullcontext():
                        torch.save(state, path)
                pf.upload_checkpoint()
            if step == hold_at:
                time.sleep(600)
            if step == total_steps:
                print(f"{len(taken)} saves were staged")
                return
        sampler.set_epoch(sampler.epoch + 1)


def stage_all() -> list[str]:
    """Stage files of any size; the saves that are staged."""
    from hf_cloudtrain.staging import recorders
    from tests.integration._staged import count_saves

    recorders.SMALL_FILE = 0
    return count_saves()


def shards(save: str, total_steps: int) -> list[Any]:
    """Ranks that never create a process group; each has a file of its own. What each found, and where it started."""
    pf.init(total_train_steps=total_steps)
    folder = pf.restore()
    began = pf.processed_steps()
    mine = Path(save) / f"shard-{os.environ['RANK']}"
    found = mine.read_text() if folder is not None else None
    while pf.processed_steps() < total_steps:
        with pf.train_step():
            pass
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(f"{mine.name} at step {pf.processed_steps()}")
        pf.upload_checkpoint()
    return [began, found]


def load(path: str) -> Any:
    return torch.load(path, map_location="cpu")


def note(seen: str | None, step: int, numbers: list[int]) -> None:
    if seen is not None:
        with open(seen.format(rank=dist.get_rank()), "a") as file:
            file.write(json.dumps([step, numbers]) + "\n")


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    Path(arguments["save"]).mkdir(parents=True, exist_ok=True)
    main(**arguments)
