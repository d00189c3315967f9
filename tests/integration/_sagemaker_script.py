"""The script of a job, as it is in the workspace: one weight, data of the job, the function API."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import hf_cloudtrain as ct
from hf_cloudtrain import preemption

TOTAL, HELD = 12, 6
"""Steps in all; the first start waits at HELD for its end."""

preemption.INTERVAL_SECONDS = 0.0
numbers = [float(line) for line in Path("/workspace/data/numbers.txt").read_text().split()]
checkpoint = Path("/workspace/ckpt/checkpoint.pt")

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
ct.init(total_train_steps=TOTAL)
model = nn.Linear(1, 1, bias=False)
nn.init.zeros_(model.weight)
loaded = torch.load(checkpoint) if checkpoint.exists() else None
step = 0
if loaded is not None:
    model.load_state_dict(loaded["model"])
    step = loaded["step"]
assert step == ct.processed_steps(), (step, ct.processed_steps())
print(f"rank {rank} of {size} begins at {step} on {os.environ['SM_CURRENT_HOST']}", flush=True)
parallel = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
while step < TOTAL:
    with ct.train_step():
        optimizer.zero_grad()
        # Each rank's gradient is its number, so the weight is the sum of their means: exact in binary.
        (-parallel(torch.tensor([[numbers[step * size + rank]]]))).sum().backward()
        optimizer.step()
    step += 1
    told = ct.is_emergency_save()
    if step == HELD and loaded is None:
        print(f"rank {rank} waits at {step}", flush=True)
        while not told:
            time.sleep(0.05)
            told = ct.is_emergency_save()
    if told or step % 4 == 0 or step == TOTAL:
        if rank == 0:
            torch.save({"step": step, "model": model.state_dict()}, checkpoint)
        ct.upload_checkpoint()
Path(os.environ["SM_MODEL_DIR"], f"weight-{rank}").write_text(str(model.weight.item()))
dist.barrier()
dist.destroy_process_group()
