"""The loop on real data: train.py under `accelerate launch`, on S3, killed in epoch 1 and resumed on a different machine."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.storage.client import Storage
from tests.integration._lab import max_difference, problems
from tests.integration._torchrun import accelerate_launch, kill_family
from tests.integration._zygote import PATIENCE, REPOSITORY
from tests.servers import MotoServer

if TYPE_CHECKING:
    import psutil

EPOCH = 60
"""Steps of one epoch."""
BATCH = 4
"""Of all processes together."""
OPTIONS = {
    "--task_name": "mrpc",
    "--num_train_epochs": 2,
    "--save_steps": 7,  # none falls on the end of an epoch
    "--logging_steps": 5,
    "--max_train_samples": EPOCH * BATCH,
    "--max_eval_samples": 64,
    "--max_seq_length": 64,
    "--metric_for_best_model": "f1",
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_mrpc_killed_in_epoch_1_and_resumed_in_an_empty_folder_equals_uninterrupted(
    moto: MotoServer, shared_data: Path, tmp_path: Path, processes: int
) -> None:
    run_url = f"s3://{moto.make_bucket()}/runs/mrpc"
    catalog = Catalog(Storage(run_url, moto.storage_options))

    with contextlib.ExitStack() as stack:

        def start(machine: str, url: str) -> psutil.Popen:
            options = {
                **OPTIONS,
                "--run_url": url,
                "--dataset_dir": shared_data / "glue" / "mrpc",
                "--cache_dir": tmp_path / machine / "cache",
                "--output_dir": tmp_path / machine / "output",
                "--per_device_train_batch_size": BATCH // processes,
            }
            arguments = [str(argument) for option in options.items() for argument in option]
            script = str(REPOSITORY / "examples" / "glue" / "train.py")
            log = tmp_path / f"{machine}.log"
            return stack.enter_context(
                accelerate_launch(script, *arguments, processes=processes, log=log, env=moto.env)
            )

        plain = start("plain", str(tmp_path / "run"))  # beside the other one: both cores have work
        first = start("first", run_url)
        killed = kill_in_epoch_1(first, catalog, tmp_path / "first.log")
        second = start("second", run_url)
        for launcher, machine in ((plain, "plain"), (second, "second")):
            assert launcher.wait(PATIENCE) == 0, (tmp_path / f"{machine}.log").read_text()

    log = (tmp_path / "second.log").read_text()
    assert f"resumes from checkpoint-{killed.step} (attempt 1" in log
    for kept in ("last", "best"):
        if kept == "best" and "is not on storage, so 'best' cannot be written" in log:
            continue  # the newest goes first, so the kill may have come before the best one's turn
        weights = (
            tmp_path / machine / "output" / kept / "model.safetensors" for machine in ("plain", "second")
        )
        assert max_difference(*weights) == 0.0
    epochs = [
        json.loads((tmp_path / machine / "output" / "log.json").read_text())
        for machine in ("plain", "second")
    ]
    assert epochs[0] == epochs[1]
    assert [(record["epoch"], record["step"]) for record in epochs[0]] == [(0, EPOCH), (1, 2 * EPOCH)]
    assert {"loss", "accuracy", "f1"} == epochs[0][1]["valid"].keys()
    assert problems(catalog) == []
    assert str(catalog.checkpoints()[-1]) == f"000002-{2 * EPOCH:010d}"


def kill_in_epoch_1(launcher: psutil.Popen, catalog: Catalog, log: Path) -> CheckpointKey:
    """SIGKILL to everything, once a checkpoint within epoch 1 is on storage; returns the newest that is."""
    deadline = time.monotonic() + PATIENCE
    while launcher.poll() is None and time.monotonic() < deadline:
        newest = catalog.newest()
        if newest is not None and newest.step > EPOCH:
            break
        time.sleep(0.05)
    assert launcher.poll() is None, log.read_text()
    kill_family(launcher)
    newest = catalog.newest()
    assert newest is not None
    assert EPOCH < newest.step < 2 * EPOCH, "the kill came too late"
    return newest
