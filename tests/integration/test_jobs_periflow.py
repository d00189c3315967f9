"""PeriFlow's two commands, word for word: `job run -f pf-template.yml -d ./huggingface`, and `-d ./cifar`.

One torchrun is killed, and the job finishes. The two tables and `with_values` list every change to PeriFlow's files.
"""

from __future__ import annotations

import json
import shutil
import signal
import tarfile
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.jobs.engines.local import free_port
from hf_cloudtrain.storage.client import Storage
from tests.integration._jobs import REPOSITORY, Desk

FILES = REPOSITORY / "tests" / "data"

GLUE = {
    # A small BERT instead of one from the hub, and fewer and shorter rows.
    "--model_name_or_path bert-base-cased": "--max_train_samples 200 --max_eval_samples 20",
    "--max_seq_length 128": "--max_seq_length 32 --per_device_train_batch_size 4 --disable_tqdm true",
    # Fewer steps.
    "--max_steps 500": "--max_steps 60",
    "--save_steps 100": "--save_steps 10",
    # The rows as files: PeriFlow's dataset is a cache of the hub's.
    "--cache_dir /workspace/data/mnli": "--dataset_dir /workspace/data --cache_dir /workspace/cache",
}
CIFAR = {
    # A CPU and a model for it.
    "--model resnet50": "--model small --use-cpu",
    # Fewer steps, and no validation.
    "--batch-size 256": "--batch-size 128",
    "--total-epochs 50": "--total-epochs 2",
    "--save-interval 100": "--save-interval 4",
    "--test-interval 100": "--test-interval 1000",
    # Two processes on a machine of two cores.
    "--num-dataloader-workers 4": "--num-dataloader-workers 0",
}


@pytest.mark.slow
def test_glue_on_mnli_finishes_after_a_torchrun_was_killed(
    desk: Desk, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk.folder)
    desk.call("data", "create", "mnli", str(shared_data / "glue" / "mnli"))
    shutil.copytree(REPOSITORY / "examples" / "glue", "huggingface")
    Path("huggingface/requirements.txt").write_text("transformers\n")  # installed already
    with_values("periflow_glue.yml", GLUE)
    desk.call("job", "run", "-f", "pf-template.yml", "-d", "./huggingface")
    finishes_after_a_kill(desk, "glue-run", 60, tmp_path)
    assert (Path(desk.record("glue-run").home) / "workspace" / "ckpt" / "final" / "config.json").exists()


@pytest.mark.slow
def test_cifar100_finishes_after_a_torchrun_was_killed(
    desk: Desk, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk.folder)
    with tarfile.open(shared_data / "cifar" / "cifar-100-python.subset.tar.xz") as archive:
        archive.extractall(tmp_path / "data", filter="data")
    desk.call("data", "create", "cifar100", str(tmp_path / "data"))
    shutil.copytree(REPOSITORY / "examples" / "cifar", "cifar")
    with_values("periflow_cifar.yml", CIFAR)
    desk.call("job", "run", "-f", "pf-template.yml", "-d", "./cifar")
    finishes_after_a_kill(desk, "cifar-job", 80, tmp_path)


def with_values(name: str, values: dict[str, str]) -> None:
    """Write PeriFlow's file with these values, a free port, and two processes instead of eight."""
    text = (FILES / name).read_text()
    for old, new in {**values, "--master_port 6000": f"--master_port {free_port()}"}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    Path("pf-template.yml").write_text(f"{text}\nlocal: {{nodes: 2, nproc_per_node: 1}}\n")


def finishes_after_a_kill(desk: Desk, name: str, steps: int, tmp_path: Path) -> None:
    desk.wait_for_step(1, name)
    desk.one_of("--node_rank 1").send_signal(signal.SIGKILL)
    record = desk.wait_until_over(name)
    assert (record.state, record.restarts) == ("finished", 1), desk.log(name)
    assert [start.outcome for start in record.starts] == ["failed", "finished"]
    desk.wait_until(lambda: not desk.processes())

    catalog = Catalog(Storage(record.run_url))
    attempts = catalog.attempts.read_all()
    assert len(attempts) == 2
    assert attempts[1].resumed_from is not None
    status = desk.status(name)
    assert (status["state"], status["run"]["step"], status["nodes"]) == ("finished", steps, 2)
    listed = json.loads(desk.call("job", "list", "--json").stdout)["jobs"]
    assert [(job["id"], job["state"]) for job in listed] == [(record.id, "finished")]
    logs = desk.call("job", "logs", name).stdout
    assert "[node 0] --- start 2 ---" in logs
    assert "[node 1] --- start 2 ---" in logs
    newest = json.loads(desk.call("checkpoint", "list", record.run_url, "--json").stdout)["checkpoints"][-1]
    assert newest["step"] == steps
    assert str(steps) in desk.call("checkpoint", "view", record.run_url).stdout
    desk.call("checkpoint", "download", record.run_url, str(tmp_path / "downloaded"))
    assert any(path.is_file() for path in (tmp_path / "downloaded").rglob("*"))
