"""Our tasks and command lines, read by SkyPilot's own code (`make test-skypilot`); nothing is launched.

It has an environment of its own: 460 MB, and versions that ours cannot have.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_cloudtrain.jobs.engines.skypilot import client, engine
from hf_cloudtrain.jobs.engines.skypilot.task import SAVED, as_task
from hf_cloudtrain.jobs.records import JobStore
from tests.conftest import missing
from tests.fake_sky import DATA, GOLDEN, SKYPILOT, FakeSky, job_text, submission_of, submitted

pytestmark = pytest.mark.skypilot

PYTHON = Path(__file__).resolve().parent.parent.parent / ".venv-skypilot" / "bin" / "python"
BROKEN = {"name": "x", "run": "true", "resources": {"use_spott": True}}
ENDS = [[75, 75], [75, 137], [1, 137], [1], [1], [1], [75]]


def golden(name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(yaml.safe_load_all((DATA / name).read_text()))
    return found


def lines_of_the_engine(folder: Path) -> list[str]:
    """Every command line that the engine passes to `sky`, without the program."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        sky = FakeSky(folder / "sky")
        sky.install(monkeypatch)
        monkeypatch.setenv("TOKEN", "hunter2")
        for managed in ("true", "false"):
            sky.prints("launch", "Managed Job ID: 12\n")
            sky.prints("queue", '[{"job_id": 12, "job_name": "x-1"}]' if managed == "true" else "{}")
            store = JobStore(str(folder / managed))
            job = (f"skypilot: {{managed: {managed}}}", "env: {TOKEN: }")
            record = dataclasses.replace(submitted(store, sky, *job), run_url=str(folder / "run"))
            unnumbered = dataclasses.replace(record, handle={**record.handle, "job": None})
            for found in (record, unnumbered):
                SKYPILOT.look(dataclasses.replace(found, state="running"))
                for follow in (True, False):
                    list(SKYPILOT.lines(found, None, follow))
                SKYPILOT.cancel(found, store)
        return sorted(set(sky.calls))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """SkyPilot's answers to all questions of this file."""
    if not PYTHON.exists():
        missing(f"no SkyPilot at {PYTHON}: make test-skypilot")
    folder = tmp_path_factory.mktemp("skypilot")
    (folder / "home").mkdir()
    odd = submission_of(job_text("vm: gcp-80gb-a100-2g-us-central1", name="7up--x"), "az://c/x")
    shell = {"HF_CLOUDTRAIN_STORAGE_OPTIONS": '{"account_name": "acc"}'}
    os.environ.update(shell)
    tasks = {name: golden(name) for name in GOLDEN} | {"broken": BROKEN, "odd": as_task(odd, shell)}
    del os.environ["HF_CLOUDTRAIN_STORAGE_OPTIONS"]
    for task in tasks.values():
        if "workdir" in task:
            task["workdir"] = str(folder)
        for path, source in task.get("file_mounts", {}).items():
            if isinstance(source, str):
                task["file_mounts"][path] = __file__  # SkyPilot requires that the files exist
    questions = {
        "tasks": tasks,
        "lines": [*lines_of_the_engine(folder), "jobs launch --nonsense task.yaml"],
        "recovery": golden("skypilot_glue.txt")["resources"]["job_recovery"],
        "codes": ENDS,
    }
    answer = subprocess.run(
        [PYTHON, Path(__file__).with_name("_parse.py")],
        input=json.dumps(questions),
        env={"HOME": str(folder / "home"), "PATH": os.environ["PATH"], "TOKEN": "hunter2"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", ["skypilot_glue.txt", "skypilot_cifar.txt"])
def test_skypilot_understands_periflows_jobs(answers: dict[str, Any], name: str) -> None:
    task = answers["tasks"][name]
    assert (task["cloud"], task["region"], task["accelerators"]) == ("azure", "eastus", {"V100": 4})
    assert (task["use_spot"], task["num_nodes"]) == (True, 2)
    assert "docker:friendliai/periflow:sdk" in task["image_id"].values()
    assert task["job_recovery"]["max_restarts_on_errors"] == 3
    assert task["job_recovery"]["recover_on_exit_codes"] == [SAVED]
    assert [mode for _, mode in task["buckets"].values()] == ["MOUNT"]


@pytest.mark.parametrize("name", [*GOLDEN, "odd"])
def test_skypilot_accepts_every_task(answers: dict[str, Any], name: str) -> None:
    task = answers["tasks"][name]
    assert "error" not in task
    assert task["run"] == "exec python3 -m hf_cloudtrain.jobs.engines.skypilot.node_main ~/hf_cloudtrain"
    assert set(task["file_mounts"]) == {"~/hf_cloudtrain/job.json"}


def test_skypilot_finds_what_is_wrong_with_a_task(answers: dict[str, Any]) -> None:
    assert "use_spott" in answers["tasks"]["broken"]["error"]


def test_skypilot_knows_every_command_and_option(answers: dict[str, Any]) -> None:
    wrong = {line: found["error"] for line, found in answers["lines"].items() if "error" in found}
    assert set(wrong) == {"jobs launch --nonsense task.yaml"}
    launches = {
        line: found for line, found in answers["lines"].items() if "launch" in line and line not in wrong
    }
    assert len(launches) == 2
    for found in launches.values():
        assert found["secret"] == [["TOKEN", "hunter2"]]
        assert found["detach_run"]
        assert found["yes"]


def test_skypilot_restarts_what_saved_without_counting_and_a_crash_three_times(
    answers: dict[str, Any],
) -> None:
    assert answers["restarts"] == [True, True, True, True, True, False, True]


def test_every_state_of_skypilot_is_known(answers: dict[str, Any]) -> None:
    states = {*answers["managed"], *answers["own"]}
    assert {state for state in states if not state.startswith("FAILED")} == set(engine.STATES)


@pytest.mark.parametrize(("hint", "number"), [("launched", "12"), ("cluster", "7")])
def test_the_number_of_a_job_is_found_in_the_output_of_a_launch(
    answers: dict[str, Any], hint: str, number: str
) -> None:
    assert client.JOB_ID.findall(client._COLOR.sub("", answers[hint])) == [number]
