"""A plain PyTorch loop on the function API, on real data: main.py under torchrun, on S3, killed and continued elsewhere."""

from __future__ import annotations

import tarfile
import time
from pathlib import Path
from statistics import mean

import pytest
import torch

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.history import read_history
from tests.cifar_files import write_set
from tests.integration._lab import problems
from tests.integration._torchrun import kill_family, torchrun
from tests.integration._zygote import PATIENCE, REPOSITORY
from tests.servers import MotoServer

STEPS, SAVE_STEPS = 40, 4
"""One epoch: 10,000 images in batches of 128 for each of two processes."""
OPTIONS = {
    "--dataset": "cifar100",
    "--batch-size": 128,
    "--total-epochs": 1,
    "--save-interval": SAVE_STEPS,
    "--test-interval": 1000,
    "--log-interval": 1,
    "--num-dataloader-workers": 1,
}


@pytest.mark.slow
def test_cifar100_killed_and_resumed_in_an_empty_folder_equals_uninterrupted(
    moto: MotoServer, shared_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    with tarfile.open(shared_data / "cifar" / "cifar-100-python.subset.tar.xz") as archive:
        archive.extractall(data, filter="data")
    run_url = f"s3://{moto.make_bucket()}/runs/cifar"
    catalog = Catalog(Storage(run_url, moto.storage_options))

    arguments = script(data, tmp_path / "plain", str(tmp_path / "plain-run"))
    with torchrun(*arguments, log=tmp_path / "plain.log") as launcher:
        assert launcher.wait(PATIENCE) == 0, (tmp_path / "plain.log").read_text()

    arguments = script(data, tmp_path / "first", run_url)
    with torchrun(*arguments, log=tmp_path / "first.log", env=moto.env) as launcher:
        deadline = time.monotonic() + PATIENCE
        while len(catalog.checkpoints()) < 2 and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert launcher.poll() is None, (tmp_path / "first.log").read_text()
        kill_family(launcher)
    killed = catalog.checkpoints()[-1]
    assert killed.step < STEPS

    arguments = script(data, tmp_path / "second", run_url)
    with torchrun(*arguments, log=tmp_path / "second.log", env=moto.env) as launcher:
        assert launcher.wait(PATIENCE) == 0, (tmp_path / "second.log").read_text()

    history = read_history(run_url, storage_options=moto.storage_options)
    _, second = history.attempts
    assert (second.resumed_from, second.first_step, second.last_step) == (killed, killed.step, STEPS)
    assert catalog.checkpoints()[-1].step == STEPS
    assert problems(catalog) == []
    plain, resumed = (content(tmp_path / machine) for machine in ("plain", "second"))
    assert (plain["step"], resumed["step"]) == (STEPS, STEPS)
    for name, weights in plain["model"].items():
        assert torch.equal(resumed["model"][name], weights), name

    uninterrupted = read_history(str(tmp_path / "plain-run"))
    losses, expected = (
        {log["step"]: log["loss"] for log in found.logs if "loss" in log}
        for found in (history, uninterrupted)
    )
    assert {log["step"] for log in uninterrupted.logs if "rank1/loss" in log} == set(expected)
    assert list(expected) == list(range(1, STEPS + 1))
    assert losses.items() <= expected.items()  # what was not stored yet at the kill is lost
    assert losses.keys() >= set(range(killed.step + 1, STEPS + 1))
    assert mean(list(losses.values())[-5:]) < mean(list(expected.values())[:5]) - 0.1


@pytest.mark.slow
def test_a_different_number_of_processes_continues_at_the_same_image(tmp_path: Path) -> None:
    write_set(tmp_path / "data", "cifar10")  # 200 images
    run_url = str(tmp_path / "run")
    sizes = {"--dataset": "cifar10", "--batch-size": 20, "--save-interval": 1000, "--total-epochs": 2}
    arguments = script(tmp_path / "data", tmp_path / "two", run_url, **sizes)
    with torchrun(*arguments, log=tmp_path / "two.log") as launcher:
        assert launcher.wait(PATIENCE) == 0, (tmp_path / "two.log").read_text()
    two = content(tmp_path / "two")
    assert (two["step"], two["sampler"]["epoch"], two["sampler"]["samples_seen"]) == (10, 1, 200)

    sizes |= {"--batch-size": 40, "--total-epochs": 3}
    arguments = script(tmp_path / "data", tmp_path / "one", run_url, **sizes)
    log = tmp_path / "one.log"
    with torchrun("--nproc_per_node", "1", *arguments, log=log) as launcher:
        assert launcher.wait(PATIENCE) == 0, log.read_text()
    one = content(tmp_path / "one")
    assert (one["step"], one["sampler"]["epoch"], one["sampler"]["samples_seen"]) == (15, 2, 200)
    assert "[Step 11 / 15 (" in log.read_text()


def script(data: Path, machine: Path, run_url: str, **options: object) -> list[str]:
    options = {**OPTIONS, **options, "--data-path": data, "--save": machine, "--run-url": run_url}
    arguments = [str(word) for option in options.items() for word in option]
    return [str(REPOSITORY / "examples" / "cifar" / "main.py"), "--use-cpu", *arguments]


def content(machine: Path) -> dict:
    return torch.load(machine / "checkpoint.pt", weights_only=True)
