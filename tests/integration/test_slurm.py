"""The engine `slurm` on a real cluster of two nodes: tests/slurm_cluster.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_cloudtrain import jobs
from hf_cloudtrain.catalog import Catalog
from hf_cloudtrain.job_record import JobRecord
from hf_cloudtrain.storage import Storage
from hf_cloudtrain.vms import find
from tests.integration._jobs import REPOSITORY, Desk, python
from tests.slurm_cluster import SlurmCluster

SECRET = "sesame-2c9e"
STEPS = 60
DDP = """
import os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
import hf_cloudtrain as ct
from hf_cloudtrain import preemption

preemption.INTERVAL_SECONDS = 0.0  # steps of milliseconds ask at each
total, pause, result = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
path = Path(os.environ["HF_CLOUDTRAIN_CHECKPOINT_DIR"], "state.pt")
state = torch.load(path) if path.exists() else None
dist.init_process_group("gloo")
ct.init(total_train_steps=total)
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
if state is not None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
print(f"rank {rank} of {dist.get_world_size()} begins at {ct.processed_steps()}", flush=True)
while ct.processed_steps() < total:
    step = ct.processed_steps()
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step * 2 + rank))
    with ct.train_step():
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), inputs.sum(1, keepdim=True)).backward()
        optimizer.step()
        time.sleep(pause)
    if (step + 1) % 10 == 0 or ct.is_emergency_save():
        if rank == 0:
            path.parent.mkdir(exist_ok=True)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        ct.upload_checkpoint()
if rank == 0:
    save_file(model.module.state_dict(), result)
dist.barrier()
dist.destroy_process_group()
"""
"""Two ranks; a batch depends on the step and the rank alone."""


class Cluster(Desk):
    """A desk at the login node of a cluster."""

    def __init__(self, folder: Path, slurm: SlurmCluster) -> None:
        super().__init__(folder)
        self.slurm = slurm

    def number(self, job_id: str = "toy") -> str:
        """Of a job, in Slurm."""
        return str(self.record(job_id).handle["job"])

    def in_slurm(self, job_id: str = "toy") -> str:
        """State of a job in Slurm."""
        return self.slurm.job(self.number(job_id))["JobState"]

    def looked_at(self, job_id: str = "toy") -> JobRecord:
        """As `job status` shows it."""
        return jobs.look(self.store, self.record(job_id))

    def wait_until_left(self, state: str, job_id: str = "toy") -> None:
        """Until Slurm has a job in a state that it keeps."""
        self.wait_until(lambda: self.in_slurm(job_id) == state)

    def supervisor_log(self, job_id: str = "toy") -> str:
        """What the supervisor and srun have said."""
        return Path(self.record(job_id).home, "log", "supervisor.log").read_text()

    def newest(self, job_id: str = "toy") -> str:
        """The newest committed checkpoint."""
        return str(Catalog(Storage(self.record(job_id).run_url)).checkpoints()[-1])


@pytest.fixture
def desk(tmp_path: Path, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    desk = Cluster(tmp_path, slurm)
    set_up(desk, tmp_path, monkeypatch)
    yield desk
    desk.slurm.cancel_all_below(tmp_path)
    desk.close()


def set_up(desk: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in desk.slurm.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", desk.store.url)
    monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_its_partitions_are_machines_that_a_job_can_have(desk: Cluster) -> None:
    found = find(cloud="slurm")
    assert found.problems == []
    assert [(vm.vm, vm.region, vm.is_spot) for vm in found.vms] == [
        ("slurm-16gb-v100-4g-spot-spot", "spot", True),
        ("slurm-16gb-v100-4g-prod", "prod", False),
    ]
    assert all(str(vm.quota).endswith(" of 2 nodes idle") for vm in found.vms)


def test_a_preempted_job_saves_is_queued_again_and_ends_with_the_weights_of_an_uninterrupted_one(
    desk: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    (desk.project / "ddp.py").write_text(DDP)
    two = "engine: slurm\nnum_devices: 2\nslurm: {nodes: 2, partition: spot, gres: 'gpu:v100:4'}\n"
    desk.write(
        f"echo $CUDA_VISIBLE_DEVICES ${{#TOKEN}}\n{torchrun('ddp.py', str(STEPS), '0.1', str(tmp_path / 'preempted'))}",
        f"{two}env: {{TOKEN: }}\n",
        name="preempted",
    )
    desk.run()
    desk.wait_for_step(10, "preempted")
    prod = desk.slurm.run(
        *("sbatch", "--parsable", "--partition=prod", "--nodes=2", "--gres=gpu:v100:4"),
        *("--output=/dev/null", "--wrap=true"),
    ).strip()
    desk.wait_until(lambda: desk.looked_at("preempted").state == "queued")
    whole = python("ddp.py", str(STEPS), "0", str(tmp_path / "whole"))
    desk.write(whole, two.replace("spot", "prod").replace("gpu:v100:4", "gpu:v100:1"), name="whole")
    desk.run()
    assert desk.wait_until_over("whole").state == "finished"
    record = desk.wait_until_over("preempted")

    assert record.state == "finished", record
    assert desk.slurm.job(prod)["JobState"] == "COMPLETED"
    assert [start.outcome for start in record.starts] == ["preempted", "finished"]
    assert (record.restarts, record.starts[0].exit_codes) == (0, (75, 75))
    log = desk.log("preempted")
    assert "rank 0 of 2 begins at 0\n" in log
    assert f"rank 0 of 2 begins at {first_save(record)}\n" in log
    assert 10 <= first_save(record) < STEPS
    whole_weights, weights = load_file(tmp_path / "whole"), load_file(tmp_path / "preempted")
    assert max((whole_weights[name] - weights[name]).abs().max().item() for name in weights) == 0.0
    assert f"0,1,2,3 {len(SECRET)}\n" in desk.log("preempted", node=1)
    texts = [path.read_text(errors="replace") for path in Path(record.home).rglob("*") if path.is_file()]
    assert not any(SECRET in text for text in texts)


def first_save(record: JobRecord) -> int:
    """Step of the last checkpoint of the first attempt."""
    keys = Catalog(Storage(record.run_url)).checkpoints()
    return max(key.step for key in keys if key.attempt == 1)


def torchrun(*words: str) -> str:
    return python("-m", "torch.distributed.run", *words)
