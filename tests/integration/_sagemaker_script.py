"""The script of a job, as it is in the workspace: one weight, data of the job, the function API.

No optimizer and no DistributedDataParallel: both import for seconds, in each of six processes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

import hf_cloudtrain as ct
from hf_cloudtrain.preemption import agreement

TOTAL, HELD = 12, 6
"""All steps; a start that begins before HELD waits at it until it is stopped."""

agreement.INTERVAL_SECONDS = 0.0
numbers = [float(line) for line in Path("/workspace/data/numbers.txt").read_text().split()]
checkpoint = Path("/workspace/ckpt/checkpoint.pt")
start = os.environ["HF_CLOUDTRAIN_EXIT_FILE"].removesuffix(".json").rpartition("-")[2]

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
ct.init(total_train_steps=TOTAL)
state = {"step": 0, "weight": torch.zeros(1)}
if checkpoint.exists():
    state = torch.load(checkpoint)
assert state["step"] == ct.processed_steps(), (state["step"], ct.processed_steps())
print(f"rank {rank} of {size} begins at {state['step']} on {os.environ['SM_CURRENT_HOST']}", flush=True)
while state["step"] < TOTAL:
    with ct.train_step():
        # The gradient is the mean of a number of each rank, so the weight is their sum: exact in binary.
        gradient = torch.tensor([numbers[state["step"] * size + rank]])
        dist.all_reduce(gradient)
        state["weight"] += gradient / size
    state["step"] += 1
    stops = ct.is_emergency_save()
    if state["step"] == HELD:
        print(f"rank {rank} waits at {HELD} in start {start}", flush=True)
        while not stops:
            time.sleep(0.05)
            stops = ct.is_emergency_save()
    if stops or state["step"] % 4 == 0 or state["step"] == TOTAL:
        if rank == 0:
            torch.save(state, checkpoint)
        ct.upload_checkpoint()
Path(os.environ["SM_MODEL_DIR"], f"weight-{rank}").write_text(str(state["weight"].item()))
dist.barrier()
dist.destroy_process_group()
