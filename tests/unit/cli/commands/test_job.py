"""`cloudtrain job`: the template, the schema, and how errors in a job file are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hf_cloudtrain.cli import _Root, app
from hf_cloudtrain.jobs.spec.job import Job
from hf_cloudtrain.jobs.spec.job_file import parse_job, read_job


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
