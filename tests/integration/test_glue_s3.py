"""The promise of the README on real data: run_glue.py under torchrun, on S3, killed and resumed on a different machine."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.named_folders import NamedFolders
from hf_cloudtrain.storage.client import Storage
from tests.integration._lab import max_difference, problems
from tests.integration._torchrun import kill_family, torchrun
from tests.integration._zygote import PATIENCE, REPOSITORY
from tests.servers import MotoServer

MAX_STEPS, SAVE_STEPS = 60, 10
OPTIONS = {
    "--task_name": "mrpc",
    "--max_steps": MAX_STEPS,
    "--save_steps": SAVE_STEPS,
    "--eval_strategy": "steps",
    "--eval_steps": 20,
    "--logging_steps": 5,
    "--max_train_samples": 200,
    "--max_eval_samples": 64,
    "--max_seq_length": 64,
    "--per_device_train_batch_size": 4,
    "--disable_tqdm": "true",
}
TIMES = ("runtime", "per_second")


@pytest.mark.slow
def test_mrpc_killed_and_resumed_in_an_empty_folder_equals_uninterrupted(
    moto: MotoServer, shared_data: Path, tmp_path: Path
) -> None:
    run_url = f"s3://{moto.make_bucket()}/runs/mrpc"
    catalog = Catalog(Storage(run_url, moto.storage_options))
    data = shared_data / "glue" / "mrpc"

    with torchrun(*script(data, tmp_path / "plain"), log=tmp_path / "plain.log") as launcher:
        assert launcher.wait(PATIENCE) == 0, (tmp_path / "plain.log").read_text()

    argv = script(data, tmp_path / "first", "--run_url", run_url)
    with torchrun(*argv, log=tmp_path / "first.log", env=moto.env) as launcher:
        deadline = time.monotonic() + PATIENCE
        while not catalog.checkpoints() and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert launcher.poll() is None, (tmp_path / "first.log").read_text()
        kill_family(launcher)
    (killed,) = catalog.checkpoints()[-1:]
    assert SAVE_STEPS <= killed.step < MAX_STEPS

    argv = script(data, tmp_path / "second", "--run_url", run_url)
    with torchrun(*argv, log=tmp_path / "second.log", env=moto.env) as launcher:
        assert launcher.wait(PATIENCE) == 0, (tmp_path / "second.log").read_text()
    assert f"resumes from checkpoint-{killed.step} (attempt 1" in (tmp_path / "second.log").read_text()

    assert (
        max_difference(*(tmp_path / name / "final" / "model.safetensors" for name in ("plain", "second")))
        == 0.0
    )
    assert metrics(tmp_path / "second") == metrics(tmp_path / "plain")
    assert {"eval_accuracy", "eval_f1", "eval_loss"} <= metrics(tmp_path / "plain").keys()
    assert problems(catalog) == []
    assert len(NamedFolders(catalog).keys()) == 1


def script(data: Path, machine: Path, *more: str) -> list[str]:
    options = {**OPTIONS, "--dataset_dir": data, "--output_dir": machine, "--cache_dir": machine / "cache"}
    argv = [str(value) for option in options.items() for value in option]
    return [str(REPOSITORY / "examples" / "glue" / "run_glue.py"), *argv, *more]


def metrics(machine: Path) -> dict[str, float]:
    """The final metrics of the script, without times."""
    found: dict[str, float] = json.loads((machine / "eval_results.json").read_text())
    return {name: value for name, value in found.items() if not any(word in name for word in TIMES)}
