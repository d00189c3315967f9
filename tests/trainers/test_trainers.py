"""Trainers of other libraries, killed and resumed (`make test-trainers`), and the table in docs/trainers.md.

They have an environment of their own: TRL, sentence-transformers and peft.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.integrations.trainer.known_trainers import KNOWN
from tests.conftest import missing

pytestmark = [pytest.mark.trainers, pytest.mark.timeout(0)]

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv-trainers" / "bin" / "python"
PAGE = ROOT / "docs" / "trainers.md"


def table() -> dict[str, str]:
    """What the page says of each set-up: its difference."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]* \|$", PAGE.read_text(), re.MULTILINE)
    return {name.replace("`", ""): said for name, said in rows[1:]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not PYTHON.exists():
        missing("the environment of the trainers: make test-trainers")
    command = [str(PYTHON), "-m", "tests.trainers._trainers", str(tmp_path_factory.mktemp("trainers"))]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    lines = [json.loads(line[7:]) for line in ended.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, ended.stderr[-3000:]
    return {found["name"]: found for found in lines}


def test_the_page_has_the_differences_that_are_measured(results: dict[str, Any]) -> None:
    measured = {
        name: "0.0"
        if found.get("difference") == 0.0
        else "differs"
        if "difference" in found
        else "resume fails"
        for name, found in results.items()
    }
    assert table() == measured


def test_a_difference_is_not_one_between_two_uninterrupted_runs(results: dict[str, Any]) -> None:
    assert {found["name"] for found in results.values() if found.get("twice")} == set()


def test_the_manifest_says_nothing_wrong_of_the_weights(results: dict[str, Any]) -> None:
    answers = {
        name: (found["exact"], found["difference"] == 0.0)
        for name, found in results.items()
        if "exact" in found
    }
    assert [name for name, (says, same) in answers.items() if says == "yes" and not same] == []
    assert [name for name, (says, same) in answers.items() if says.startswith("no: ") and same] == []


def test_every_trainer_in_the_table_of_the_code_was_measured(results: dict[str, Any]) -> None:
    exact = {found["class"] for found in results.values() if found.get("difference") == 0.0}
    assert {name for name in KNOWN if not name.startswith("transformers.")} <= exact
