"""A copy of the template trains without changes, and its run resumes exactly after an interruption."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_cloudtrain.cli import app
from hf_cloudtrain.tracking.history import read_history

ROOT = Path(__file__).parents[1]
LOAD = """
import torch
from model.modeling import Classifier

model = Classifier.from_pretrained("output/first/best").eval()
few, many = torch.zeros(1, 15, dtype=torch.long), torch.full((1, 15), 31)
print(*(model(input_ids=ids).logits.argmax().item() for ids in (few, many)))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new project after its first complete run."""
    folder = tmp_path_factory.mktemp("template") / "project"
    assert CliRunner().invoke(app, ["new", str(folder)]).exit_code == 0
    python(folder, "train.py")
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained project that a test may change."""
    return shutil.copytree(trained, tmp_path / "project")


def python(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the project, which must succeed without a Python warning."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    environment.pop("HF_CLOUDTRAIN_RUN_URL", None)
    result = subprocess.run(
        [sys.executable, *words], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_a_new_project_trains_without_changes_and_its_model_loads(trained: Path) -> None:
    output = trained / "output" / "first"
    log = json.loads((output / "log.json").read_text())
    assert [record["epoch"] for record in log] == [0, 1, 2]
    assert log[-1]["valid"]["accuracy"] > 0.95
    assert log[-1]["valid"]["loss"] < log[0]["valid"]["loss"]
    state = json.loads((output / "last" / "training_state.json").read_text())
    assert (state["step"], state["script_args"]["batch_size"]) == (375, 16)
    assert python(trained, "-c", LOAD).stdout.split() == ["0", "1"]


def test_an_interrupted_run_resumes_elsewhere_with_the_weights_of_an_uninterrupted_one(project: Path) -> None:
    # As if the machine had died after the first commit of epoch 1: without a manifest, a checkpoint does not exist.
    for manifest in (project / "runs" / "first" / ".cloudtrain" / "checkpoints").iterdir():
        if int(manifest.stem.split("-")[1]) > 150:
            manifest.unlink()
    python(project, "train.py", "--output_dir", "elsewhere")

    first, second = read_history(str(project / "runs" / "first")).attempts
    assert (second.resumed_from, second.first_step, second.last_step) == (first.checkpoints[-1], 150, 375)
    whole, resumed = (
        load_file(project / folder / "last" / "model.safetensors") for folder in ("output/first", "elsewhere")
    )
    assert max(float((whole[key] - resumed[key]).abs().max()) for key in whole) == 0.0


@pytest.mark.slow
def test_a_finished_run_trains_again_only_with_more_epochs(project: Path) -> None:
    again = python(project, "train.py", "--output_dir", "again")
    assert "The run is complete: 3 of 3 epochs" in again.stderr
    python(project, "train.py", "--output_dir", "more", "--num_epochs", "4")
    log = json.loads((project / "more" / "log.json").read_text())
    assert [record["epoch"] for record in log] == [0, 1, 2, 3]
