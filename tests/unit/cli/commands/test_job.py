"""`cloudtrain job`: the template, the schema, and how errors in a job file are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hf_cloudtrain import env
from hf_cloudtrain.cli import _Root, app
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.spec.job import Job
from hf_cloudtrain.jobs.spec.job_file import parse_job, read_job
from hf_cloudtrain.jobs.submission import Submission


def cloudtrain(*words: str) -> Any:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result


def test_the_template_is_a_job_file() -> None:
    result = cloudtrain("job", "template")
    assert parse_job(result.stdout.encode()).name == "my-job"
    assert result.stderr == ""
    assert json.loads(cloudtrain("job", "template", "--json").stdout) == {"template": result.stdout}


def test_the_schema_is_that_of_the_job() -> None:
    schema = json.loads(cloudtrain("job", "schema").stdout)
    assert set(schema["properties"]) == set(Job.model_fields)
    assert schema["additionalProperties"] is False
    assert json.loads(cloudtrain("job", "schema", "--json").stdout) == schema


@pytest.mark.parametrize("name", ["job.yml", "a\x1bb.yml"])
def test_errors_in_a_job_file_start_with_file_and_line(tmp_path: Path, name: str) -> None:
    group = typer.Typer(cls=_Root)

    @group.command()
    def read(path: str) -> None:
        read_job(path)

    @group.command()
    def other() -> None: ...

    (tmp_path / name).write_text("nmae: x\nvm: y\n")
    result = CliRunner().invoke(group, ["read", str(tmp_path / name)])
    assert result.exit_code == 1
    shown = str(tmp_path / name).replace("\x1b", "\\x1b")
    lines = result.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines[:-1]] == [
        f"{shown}:1",
        f"{shown}:1",
        f"{shown}:1",
        f"{shown}:2",
    ]
    assert lines[-1].endswith("Nothing was started.")
    assert "\x1b" not in result.stderr


def test_a_job_whose_run_url_is_refused_today_is_shown_listed_and_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.STORE, str(tmp_path))
    store = JobStore()
    facts = {
        "engine": "local",
        "nodes": 1,
        "nproc_per_node": 1,
        "max_restarts": 3,
        "run_url": "s3:/bucket/run",
    }
    store.write(store.create("old", **facts), state="failed", reason="Stopped at 000001-0000000005.")
    shown = cloudtrain("job", "status", "old")
    assert "Stopped at 000001-0000000005." in shown.stdout
    assert "Warning: cannot read the run." in shown.stderr
    assert "old-1" in cloudtrain("job", "list").stdout
    cloudtrain("job", "delete", "old", "--force", "--yes")
    assert store.ids() == []


def test_a_submission_that_is_refused_today_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"job": {"name": "old", "run_url": "s3:/bucket/run"}}')
    with pytest.raises(ConfigurationError, match="Submit the job file again"):
        Submission.load_here(tmp_path)


def test_jobs_of_one_experiment_are_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.STORE, str(tmp_path))
    store = JobStore()
    facts = {"engine": "local", "nodes": 1, "nproc_per_node": 1, "max_restarts": 3, "run_url": str(tmp_path)}
    store.write(store.create("a", **facts), state="finished")
    assert "experiment" not in cloudtrain("job", "list").stdout.splitlines()[0]
    for name, experiment in (("b", "warmup"), ("c", None), ("d", "warmup")):
        store.write(store.create(name, experiment=experiment, **facts), state="finished")
    head, *rows = cloudtrain("job", "list").stdout.splitlines()
    assert "experiment" in head.split()
    assert [row.split()[0] for row in rows] == ["a-1", "c-1", "b-1", "d-1"]
    found = json.loads(cloudtrain("job", "list", "--experiment", "warmup", "--json").stdout)["jobs"]
    assert [job["id"] for job in found] == ["b-1", "d-1"]
