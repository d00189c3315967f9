"""The engine `slurm` on a real cluster of two nodes: tests/slurm_cluster.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.jobs import lifecycle
from hf_cloudtrain.jobs.engines.slurm.client import SlurmClient
from hf_cloudtrain.jobs.engines.slurm.engine import ENGINE
from hf_cloudtrain.jobs.inventory import find
from hf_cloudtrain.jobs.records import JobRecord
from hf_cloudtrain.storage.client import Storage
from tests.integration._jobs import REPOSITORY, Desk, python, value_after
from tests.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slow

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
from hf_cloudtrain.preemption import agreement

agreement.INTERVAL_SECONDS = 0.0  # steps of milliseconds agree at each
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
SLOW = "time.sleep(2 if ct.is_emergency_save() else 0); print('saving', flush=True); state.write_text"
"""In place of `state.write_text` in TRAIN: a slow save that prints something on the way."""


class Cluster(Desk):
    """A desk at the login node of a cluster."""

    def __init__(self, folder: Path, slurm: SlurmCluster) -> None:
        super().__init__(folder)
        self.slurm = slurm

    def number(self, job_id: str = "toy") -> str:
        """The number of a job in Slurm."""
        return str(self.record(job_id).handle["job"])

    def in_slurm(self, job_id: str = "toy") -> str:
        """The state of a job in Slurm."""
        return self.slurm.job(self.number(job_id))["JobState"]

    def looked_at(self, job_id: str = "toy") -> JobRecord:
        """As `job status` shows it."""
        return lifecycle.look(self.store, self.record(job_id))

    def wait_until_left(self, state: str, job_id: str = "toy") -> None:
        """Wait until a job is in a state that Slurm keeps."""
        self.wait_until(lambda: self.in_slurm(job_id) == state)

    def supervisor_log(self, job_id: str = "toy") -> str:
        """The output of the supervisor and srun."""
        return Path(self.record(job_id).home, "log", "supervisor.log").read_text()

    def newest(self, job_id: str = "toy") -> str:
        """The newest committed checkpoint."""
        return str(Catalog(Storage(self.record(job_id).run_url)).checkpoints()[-1])


@pytest.fixture
def desk(tmp_path: Path, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    desk = Cluster(tmp_path, slurm)
    set_up(desk, tmp_path, monkeypatch)
    monkeypatch.setattr(
        ENGINE, "_client", SlurmClient()
    )  # a test without a controller leaves one that does not ask
    yield desk
    desk.slurm.end_jobs(tmp_path)
    desk.close()


def set_up(desk: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in desk.slurm.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", desk.store.url)
    monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_its_partitions_are_listed_as_machines(desk: Cluster) -> None:
    found = find(cloud="slurm")
    assert found.problems == []
    assert [(vm.vm, vm.region, vm.is_spot) for vm in found.vms] == [
        ("slurm-16gb-v100-4g-spot-spot", "spot", True),
        ("slurm-16gb-v100-4g-prod", "prod", False),
    ]
    assert all(str(vm.quota).endswith(" of 2 idle") for vm in found.vms)


@pytest.fixture(scope="module")
def out_of_time(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A job whose time limit comes while other tests run: Slurm looks at the limits every 30 s."""
    folder = tmp_path_factory.mktemp("out-of-time")
    with pytest.MonkeyPatch.context() as monkeypatch:
        desk = Cluster(folder, slurm)
        set_up(desk, folder, monkeypatch)
        desk.write(
            f"pause=0.2; [ ! -e again ] || pause=0; touch again; {python('train.py', '400', '$pause')}",
            "engine: slurm\nenv: {HF_CLOUDTRAIN_GRACE: '10'}",
        )
        desk.run()
        slurm.run("scontrol", "update", f"JobId={desk.number()}", "TimeLimit=1")
    yield desk
    slurm.end_jobs(folder)
    desk.close()


@pytest.mark.usefixtures("out_of_time")
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
    desk.write(whole, two.replace(", gres: 'gpu:v100:4'", ""), name="whole")
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


def test_scancel_saves_and_ends_a_job_and_resume_finishes_it(desk: Cluster) -> None:
    desk.write(python("train.py", "60", "0.05"), "engine: slurm")
    desk.run()
    desk.wait_for_step(5)
    desk.slurm.run("scancel", desk.number())
    record = desk.wait_until_over()
    assert (record.state, record.starts[-1].outcome) == ("cancelled", "preempted")
    assert (record.reason or "").startswith("Cancelled in Slurm (scancel).")
    assert desk.newest() in (record.reason or "")
    desk.wait_until(lambda: desk.in_slurm() == "CANCELLED")  # and not PENDING
    first = desk.number()

    desk.call("job", "run", "--resume", "toy")
    record = desk.wait_until_over()
    assert (record.state, len(record.starts), desk.number() == first) == ("finished", 2, False)
    assert f"ends with {value_after(60)!r}" in desk.log()
    desk.wait_until_left("COMPLETED")


def test_an_administrators_requeue_saves_and_the_next_start_resumes(desk: Cluster) -> None:
    desk.write(python("train.py", "60", "0.05"), "engine: slurm")
    desk.run()
    desk.wait_for_step(5)
    desk.slurm.run("scontrol", "requeue", desk.number())
    desk.wait_until(lambda: desk.record().state == "queued")
    saved = int(desk.newest()[-10:])
    assert "Queued again in Slurm." in (desk.looked_at().reason or "")
    record = desk.wait_until_over()
    assert (record.state, record.restarts, len(record.starts)) == ("finished", 0, 2)
    assert f"begins at {saved} with" in desk.log()
    assert f"ends with {value_after(60)!r}" in desk.log()


def test_slurm_queues_a_job_again_that_has_lost_a_node(desk: Cluster) -> None:
    desk.write(f"[ $NODE_RANK = 1 ] || {alone('60')}", "engine: slurm\nnum_devices: 2\nslurm: {nodes: 2}")
    desk.run()
    desk.wait_for_step(5)
    with desk.slurm.node_down("n2"):
        desk.wait_until(lambda: desk.looked_at().state == "queued")
    record = desk.wait_until_over()
    assert (record.state, record.restarts, len(record.starts)) == ("finished", 0, 2)


def test_a_killed_node_is_restarted_within_the_allocation(desk: Cluster) -> None:
    desk.write(
        f"[ $NODE_RANK = 0 ] && {alone('60')} || sleep 600",
        "engine: slurm\nnum_devices: 2\nslurm: {nodes: 2}",
    )
    desk.run()
    desk.wait_for_step(5)
    desk.one_of("--node-rank 0").kill()
    desk.wait_until(lambda: len(desk.record().starts) == 2)
    record = desk.record()
    assert (record.restarts, record.starts[0].outcome) == (1, "failed")
    assert None in record.starts[0].exit_codes
    assert desk.slurm.job(desk.number())["Restarts"] == "0"
    desk.call("job", "cancel", "toy")
    assert desk.wait_until_over().state == "cancelled"


def test_a_queued_job_shows_slurms_reason_and_is_cancelled_at_once(desk: Cluster) -> None:
    desk.write(python("train.py", "60", "0"), "engine: slurm\nslurm: {gres: 'gpu:v100:4', partition: prod}")
    with desk.slurm.busy():
        desk.run()
        desk.wait_until(lambda: desk.looked_at().reason == "Slurm: Resources.")
        assert desk.status()["state"] == "queued"
        desk.call("job", "cancel", "toy")
        record = desk.record()
    assert (record.state, record.starts) == ("cancelled", ())
    assert desk.in_slurm() == "CANCELLED"
    assert "is over: cancelled" in desk.call("job", "cancel", "toy", code=1).output


def test_a_job_is_cancelled_while_it_starts(desk: Cluster) -> None:
    desk.write(python("train.py", "6000", "0.05"), "engine: slurm")
    desk.run()
    desk.wait_until(lambda: desk.in_slurm() == "RUNNING")  # bash, or a Python that is still importing
    desk.call("job", "cancel", "toy", "--wait")
    assert desk.record().state == "cancelled"
    desk.wait_until_left("CANCELLED")


def test_a_job_that_is_cancelled_while_it_saves_for_a_preemption_is_not_queued_again(desk: Cluster) -> None:
    text = (desk.project / "train.py").read_text()
    (desk.project / "train.py").write_text(text.replace("state.write_text", SLOW))
    desk.write(f"{python('train.py', '6000', '0.05')} | tee output.txt", "engine: slurm")
    desk.run()
    desk.wait_for_step(5)
    desk.slurm.run("scancel", "--batch", "--signal=USR1", desk.number())
    desk.wait_until(lambda: desk.record().state == "stopping")
    desk.call("job", "cancel", "toy", "--wait")
    record = desk.record()
    assert (record.state, len(record.starts)) == ("cancelled", 1)
    assert f"The newest checkpoint is {desk.newest()}." in (record.reason or "")
    assert "saving\n" in desk.log()  # tee received no signal
    assert (record.starts[0].reason or "").startswith("Stopped by `cloudtrain job cancel`.")
    desk.wait_until_left("CANCELLED")


def test_a_script_that_ignores_sigterm_is_killed_after_its_grace(desk: Cluster) -> None:
    (desk.project / "deaf.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: None)\nprint('deaf', flush=True)\n"
        "while True: time.sleep(1)\n"
    )
    desk.write(python("deaf.py"), "engine: slurm\nenv: {HF_CLOUDTRAIN_GRACE: '1'}")
    desk.run()
    desk.wait_until(lambda: "deaf" in desk.log())
    desk.call("job", "cancel", "toy", "--wait")
    assert (desk.record().state, desk.record().reason) == (
        "cancelled",
        "Stopped by `cloudtrain job cancel`. Nothing was saved.",
    )
    desk.wait_until(lambda: not desk.processes())


def test_a_job_whose_supervisor_is_killed_saves_and_has_failed(desk: Cluster) -> None:
    desk.write(python("train.py", "6000", "0.05"), "engine: slurm")
    desk.run()
    desk.wait_for_step(5)
    desk.one_of("slurm.batch_main").kill()
    desk.wait_until(lambda: desk.status()["state"] == "failed")
    record = desk.record()
    assert "Its supervisor was killed." in (record.reason or "")
    assert [start.outcome for start in record.starts] == ["failed"]
    desk.wait_until(lambda: not desk.processes())
    assert f"checkpoint-{int(desk.newest()[-10:])} is on storage" in desk.log()


def test_without_a_controller_submit_fails_status_shows_the_record_and_cancel_stops_the_job(
    desk: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (desk.project / "train.py").read_text()
    (desk.project / "train.py").write_text(text.replace("state.write_text", SLOW))
    desk.write(python("train.py", "6000", "0.05"), "engine: slurm")
    desk.run()
    desk.wait_for_step(5)
    with desk.slurm.down() as environment, monkeypatch.context() as impatient:
        impatient.setenv("SLURM_CONF", environment["SLURM_CONF"])
        desk.call("job", "cancel", "toy-1")
        refused = desk.run(code=1)
        assert "Slurm does not answer" in refused.output
        assert "Nothing was submitted" in refused.output
        assert desk.record("toy-2").state == "failed"
        shown = desk.call("job", "status", "toy-1")
        assert "cannot ask slurm about toy-1" in shown.output
        assert "toy-1" in shown.stdout
        desk.wait_until(lambda: ": saving at step" in desk.log("toy-1"))
    assert desk.wait_until_over("toy-1").state == "cancelled"
    assert desk.newest("toy-1") in (desk.record("toy-1").reason or "")
    desk.wait_until_left("CANCELLED", "toy-1")


def test_a_refusal_of_slurm_is_reported_and_no_job_is_left(desk: Cluster) -> None:
    desk.write(python("train.py", "1", "0"), "engine: slurm\nslurm: {partition: nowhere}")
    assert "invalid partition specified: nowhere" in desk.run(code=1).output
    assert desk.record().state == "failed"
    desk.write(python("train.py", "1", "0"), "engine: slurm\nslurm: {time: '1'}", name="short")
    assert "asked to stop as it starts" in desk.run(code=1).output


def test_a_job_that_slurm_has_forgotten_is_lost_unless_its_record_says_how_it_ended(
    desk: Cluster,
) -> None:
    record = desk.store.create("toy", engine="slurm", nodes=1, nproc_per_node=1, max_restarts=0)
    desk.store.write(record, state="running", handle={"job": "999999"})
    assert "cloudtrain job run --resume toy-1" in desk.status()["reason"]
    assert desk.status()["state"] == "lost"
    desk.store.write(desk.record(), state="finished", reason=None)
    assert desk.status()["state"] == "finished"


def test_a_job_that_is_out_of_time_saves_is_queued_again_and_finishes(out_of_time: Cluster) -> None:
    desk = out_of_time
    record = desk.wait_until_over()
    assert record.state == "finished", record
    assert [start.outcome for start in record.starts] == ["preempted", "finished"]
    assert "SIGUSR1" in (record.starts[0].reason or "")
    assert "Time limit." in desk.supervisor_log()
    assert f"ends with {value_after(400)!r}" in desk.log()


def test_a_test_cluster_leaves_neither_processes_nor_files(tmp_path: Path) -> None:
    with SlurmCluster() as slurm:
        (tmp_path / "job").write_text(
            "#!/bin/bash\ntrap '' TERM\ntouch began\nwhile true; do sleep 1; done\n"
        )
        slurm.run("sbatch", f"--chdir={tmp_path}", "--output=/dev/null", str(tmp_path / "job"))
        deadline = time.monotonic() + 60
        while not (tmp_path / "began").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        marked = processes_with(f"SLURM_CONF={slurm.env['SLURM_CONF']}")
        assert {"slurmctld", "slurmd", "munged", "slurm_script"} <= {name for _, name in marked}
    # A killed process stays until its parent has collected its exit code.
    deadline = time.monotonic() + 10
    while (
        any(psutil.pid_exists(pid) and not is_dead(pid) for pid, _ in marked) and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert [mark for mark in marked if not is_dead(mark[0])] == []
    assert not slurm.folder.exists()


def processes_with(variable: str) -> list[tuple[int, str]]:
    """Number and name of every process with this in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if variable in Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0"):
                found.append((process.pid, process.name()))
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def is_dead(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def first_save(record: JobRecord) -> int:
    """Step of the last checkpoint of the first attempt."""
    keys = Catalog(Storage(record.run_url)).checkpoints()
    return max(key.step for key in keys if key.attempt == 1)


def alone(steps: str) -> str:
    """A training of a single node, whatever the job has."""
    return f"env WORLD_SIZE=1 {python('train.py', steps, '0.05')}"


def torchrun(*argv: str) -> str:
    return python("-m", "torch.distributed.run", *argv)
