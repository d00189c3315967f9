"""The training of docs/nsmc.md that MLflow tracks, as the page has it (`make test-trainers`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.integration.test_nsmc_page import COMMANDS, MLFLOW, ROOT, write_reviews
from tests.unit.cli.terminal import answer

pytestmark = [pytest.mark.trainers, pytest.mark.timeout(0)]

PYTHON = ROOT / ".venv-trainers" / "bin" / "python"
READ = """
import json, mlflow
client = mlflow.MlflowClient()
for run in client.search_runs([each.experiment_id for each in client.search_experiments()]):
    for name in ("loss", "eval_accuracy", "test_accuracy"):
        steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
        print("FOUND", json.dumps([run.info.run_id, name, steps]))
"""


def test_two_starts_of_the_command_are_one_run_of_mlflow_with_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not PYTHON.exists():
        missing("the environment of the trainers: make test-trainers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_reviews(tmp_path / "nsmc")
    (command,) = (each for each in COMMANDS if each.endswith(MLFLOW))
    path = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    often = "--logging_steps 1 --save_steps 2 --eval_steps 2"
    run("bash", "-c", f"{command} {often} --max_steps 4")
    run("bash", "-c", f"{command} {often} --max_steps 8")
    found = [json.loads(line[6:]) for line in run("python", "-c", READ).splitlines() if line[:6] == "FOUND "]
    (tracked,) = {identity for identity, *_ in found}
    assert {name: steps for _, name, steps in found} == {
        "loss": list(range(1, 9)),
        "eval_accuracy": [2, 4, 6, 8],
        "test_accuracy": [4, 8],
    }
    assert answer("run", "status", "runs/nsmc-trainer")["trackers"]["mlflow"].endswith(tracked)
