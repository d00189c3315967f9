"""What the shell suggests, and that nothing else ever reaches it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_cloudtrain import env
from hf_cloudtrain.cli import app, completion
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.jobs.records import JobStore
from tests.unit.cli.terminal import Run, process


@pytest.fixture
def store(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(env.STORE, str(tmp_path))
    JobStore().create("glue", run_url=None, engine="local", nodes=1, nproc_per_node=1, max_restarts=3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("1")
    DatasetStore().create("nsmc", str(tmp_path / "data"))
    return tmp_path


def asked(line: str) -> dict[str, str]:
    """The variables with which bash asks for a completion at the end of the line."""
    count = len(line.split(" ")) - 1
    return {completion.ASKED: "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(count)}


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("line", "suggested"),
    [
        ("cloudtrain run st", ["status", "stop"]),
        ("cloudtrain run status ", ["glue-1", "mrpc"]),
        ("cloudtrain checkpoint download mr", ["mrpc"]),
        ("cloudtrain job logs gl", ["glue-1"]),
        ("cloudtrain data view ", ["nsmc"]),
        (
            "cloudtrain checkpoint view mrpc -c checkpoint-",
            ["checkpoint-400", "checkpoint-300.a2", "checkpoint-300.a1", "checkpoint-200", "checkpoint-100"],
        ),
        ("cloudtrain checkpoint view mrpc --checkpoint fi", ["final", "final.2"]),
        ("cloudtrain checkpoint view nothing -c ", []),
    ],
)
def test_suggests(line: str, suggested: list[str]) -> None:
    assert CliRunner().invoke(app, [], prog_name="cloudtrain", env=asked(line)).stdout.split() == suggested


def test_the_command_suggests_and_prints_nothing_else(store: Path) -> None:
    done = process(**asked("cloudtrain job status "), **{env.STORE: str(store)})
    assert (done.stdout.split(), done.stderr) == (["glue-1"], "")


def test_a_store_that_fails_suggests_nothing_and_prints_nothing() -> None:
    for store in ("nope://bucket", "/dev/null"):
        done = process(**asked("cloudtrain run status "), **{env.STORE: store})
        assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


def test_a_store_that_does_not_answer_in_time_suggests_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "SECONDS", 0.05)

    def look(found: list[str]) -> None:
        found.append("glue-1")
        time.sleep(60)

    assert completion._starting("gl", look) == ["glue-1"]
