"""Trainings that report to real services, killed three times on three machines (`make test-trainers`), and the table of docs/trackers.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import missing

pytestmark = [pytest.mark.trainers, pytest.mark.timeout(0)]

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv-trainers" / "bin" / "python"
PAGE = ROOT / "docs" / "trackers.md"
NAMES = ("mlflow", "trackio", "tensorboard", "wandb offline", "wandb")
TITLES = {"MLflow", "trackio", "TensorBoard", "W&B"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not PYTHON.exists():
        missing("the environment of the trainers: make test-trainers")
    command = [str(PYTHON), "-m", "tests.trainers._trackers", str(tmp_path_factory.mktemp("trackers"))]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line[7:]) for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    return {found["name"]: found for found in lines}


@pytest.mark.parametrize("name", NAMES)
def test_the_curves_of_a_run_that_is_killed_three_times_are_those_of_an_uninterrupted_one(
    results: dict[str, Any], name: str
) -> None:
    found = results[name]
    assert found["wrong"] == {}
    assert found["points"] == 115


@pytest.mark.parametrize("name", NAMES)
def test_it_has_one_tracker_run_which_run_status_names(results: dict[str, Any], name: str) -> None:
    (run,) = results[name]["runs"]
    assert results[name]["trackers"][name.split(maxsplit=1)[0]].endswith(run)


@pytest.mark.parametrize("name", ["mlflow deleted", "wandb deleted"])
def test_a_run_that_the_service_has_deleted_is_followed_by_a_new_one_with_the_whole_curve(
    results: dict[str, Any], name: str
) -> None:
    assert results[name] == {"name": name, "steps": list(range(1, 25)), "told": True}


def test_two_trainings_in_one_run_of_the_user_lose_nothing(results: dict[str, Any]) -> None:
    twice = list(range(9, 13))  # redone by the second one
    found = results["wandb shared"]
    assert (found["runs"], found["lost"], found["told"]) == (["mine"], [], True)
    assert set(found["twice"]) <= set(twice)


def test_a_server_that_answers_500_is_named_once_and_its_password_is_nowhere(results: dict[str, Any]) -> None:
    assert results["mlflow 500"] == {"name": "mlflow 500", "code": 0, "password": [], "told": 1}


def test_the_page_says_so() -> None:
    rows = re.findall(r"^\| (\S+) [\d.]+, [^|]*\| (\d+) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {name for name, *_ in rows} == TITLES
    assert len(rows) == len(NAMES)
    assert {(runs, wrong) for _, runs, wrong in rows} == {("1", "0")}
