"""docs/nsmc.md can be followed to the letter: its commands, in their order, on 200 generated reviews."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_examples_nsmc import _generated

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = re.findall(r"^\$ (.*)$", (ROOT / "docs" / "nsmc.md").read_text(), re.MULTILINE)

MLFLOW = " --report_to mlflow"


def write_reviews(folder: Path) -> None:
    """Generated reviews as the two tables of NSMC."""
    folder.mkdir()
    for split, count in (("train", 160), ("test", 40)):
        columns = zip(("id", "document", "label"), zip(*_generated(count, count), strict=True), strict=True)
        table = pa.table({name: list(values) for name, values in columns})
        pq.write_table(table, folder / f"{split}.parquet")


def test_the_page_has_commands_of_each_step() -> None:
    words = " ".join(COMMANDS)
    for step in (
        "data create",
        "train_loop",
        "train_trainer",
        "--report_to mlflow",
        "job run",
        "run compare",
        "endpoint create",
        "label.py",
        "predict",
    ):
        assert step in words


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_page_work_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_reviews(tmp_path / "nsmc")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_CLOUDTRAIN_STORE": str(tmp_path / "store"),
        "HF_CLOUDTRAIN_CACHE": str(tmp_path / "cache"),
    }
    said = {}
    try:
        for command in COMMANDS:
            # tests/trainers runs this one with MLflow, which the environment of the test suite lacks.
            typed = command if importlib.util.find_spec("mlflow") else command.replace(MLFLOW, "")
            done = subprocess.run(
                ["bash", "-c", typed],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            said[command] = done.stdout
    finally:
        subprocess.run(
            ["bash", "-c", "cloudtrain endpoint delete nsmc --yes"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            check=False,
        )
    (labelled,) = (text for command, text in said.items() if "label.py" in command)
    (predicted,) = (text for command, text in said.items() if "cloudtrain predict" in command)
    accuracy = re.search(r"accuracy\s+([0-9.]+)", predicted)
    assert accuracy is not None
    assert f"40 reviews, accuracy {accuracy[1]}," in labelled
    (trained,) = (
        text for command, text in said.items() if "train_loop.py" in command and "--sample" not in command
    )
    assert f"'accuracy': {float(accuracy[1]):.3f}"[:17] in trained
