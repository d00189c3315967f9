"""Every door takes a run URL the same way: one normal form, or a refusal that says what to type."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from typer.testing import CliRunner

import hf_cloudtrain as ct
from hf_cloudtrain import cli, env
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.cli.runs import open_catalog
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import ConfigurationError, JobFileError
from hf_cloudtrain.integrations.functions.modes import RemoteRun
from hf_cloudtrain.integrations.trainer.session import Session
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.jobs.spec.job_file import parse_job
from tests.urls import HERE, HOME, NORMAL, REFUSED, RELATIVE

Door = Callable[[str], str]


def callback(url: str) -> str:
    ct.CloudTrainCallback(url)
    return Session.of(url, None, fresh=False).run_url


def train_loop(url: str) -> str:
    loop = ct.TrainLoop(Accelerator(cpu=True), url, num_epochs=1, output_dir="out")
    return loop._checkpointer.storage.url


def init(url: str) -> str:
    ct.init(1, url, checkpoint_dir="ckpt")
    return RemoteRun(url, "ckpt", 1, None, Policy())._run_url


def environment(url: str) -> str:
    os.environ[env.RUN_URL] = url
    return callback_without_url()


def callback_without_url() -> str:
    ct.CloudTrainCallback()
    return Session.of(None, None, fresh=False).run_url


def command_line(url: str) -> str:
    return open_catalog(url).storage.url


def job_file(url: str) -> str:
    text = f"name: a\njob_setting: {{docker: {{command: echo}}}}\nrun_url: {json.dumps(url)}\n"
    try:
        return parse_job(text.encode()).run_url or ""
    except JobFileError as error:
        (problem,) = error.problems
        raise ConfigurationError(
            problem.partition("job.yml:3: ")[2]
        ) from None  # the line is a part of the answer


def dataset_store(url: str) -> str:
    return DatasetStore(url).url


def job_store(url: str) -> str:
    return JobStore(url).url


DOORS = [callback, train_loop, init, environment, command_line, dataset_store, job_store, job_file]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setenv(env.RUN_URL, "")


def in_here(table: dict[str, str], folder: Path) -> dict[str, str]:
    """The table for a test whose current folder is another one."""
    return {
        url: made.replace(HERE, str(folder)).replace("/project/", f"{folder.parent}/")
        for url, made in table.items()
    }


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_makes_the_normal_form(door: Door, tmp_path: Path) -> None:
    expected = in_here(NORMAL if door is job_file else {**NORMAL, **RELATIVE}, tmp_path)
    assert {url: door(url) for url in expected} == expected


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_refuses_with_the_value_and_what_to_type(door: Door, tmp_path: Path) -> None:
    for url, right in in_here(REFUSED, tmp_path).items():
        with pytest.raises(ConfigurationError) as raised:
            pytest.fail(f"{url!r} became {door(url)!r}")
        assert repr(url.strip()) in str(raised.value)
        assert repr(right) in str(raised.value)


def test_the_command_line_ends_with_one_line_and_code_1() -> None:
    result = CliRunner().invoke(cli.app, ["run", "list", "s3:/bucket/runs"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "Write 's3://bucket/runs'" in result.stderr


@pytest.mark.parametrize("door", [callback, train_loop, init, dataset_store], ids=lambda door: door.__name__)
def test_takes_a_path_as_a_folder(door: Callable[[Path], str], tmp_path: Path) -> None:
    assert door(Path("runs") / "mrpc") == str(tmp_path / "runs" / "mrpc")
    with pytest.raises(ConfigurationError, match=r"pathlib leaves it out. Write 's3://bucket/runs/x'"):
        door(Path("s3://bucket/runs") / "x")
