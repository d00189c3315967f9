"""`cloudtrain verify-resume`: it reports an exact resume, and otherwise what differs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.cli import app
from hf_cloudtrain.storage.client import Storage
from tests.integration._rehearsed import PLAIN, fork_instead
from tests.integration._zygote import Zygote


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the command."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "train.py").write_text("import os" + PLAIN)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return folder


def verify_resume(*words: str, code: int) -> tuple[dict[str, Any], str]:
    """Its record and its messages; the record is empty if nothing could be compared."""
    result = CliRunner().invoke(app, ["verify-resume", "--json", *words])
    assert result.exit_code == code, result.output
    return (json.loads(result.stdout) if result.stdout else {}), result.stderr


def plain(kind: str, *words: str, code: int, options: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    return verify_resume(*options, "--", sys.executable, "train.py", kind, *words, code=code)


def test_an_exact_script_is_reported_as_exact_and_leaves_nothing_behind(
    project: Path, tmp_path: Path
) -> None:
    record, said = plain("good", code=0)
    assert record["exact"] is record["deterministic"] is True
    assert (record["resumed_from"], record["steps"], record["resumed_steps"]) == ("000001-0000000003", 9, 9)
    assert [(one["path"], one["max_difference"]) for one in record["files"]] == [("model.safetensors", 0.0)]
    assert record["values_compared"] == 9
    assert "1 of 3" in said
    assert os.listdir(tmp_path) == ["project"]
    assert os.listdir(project) == ["train.py"]


def test_a_random_state_that_the_script_does_not_save_is_found_at_the_first_step(project: Path) -> None:
    record, said = plain("forgets", code=1)
    assert record["exact"] is False
    assert record["deterministic"] is True
    assert record["files"][0]["max_difference"] > 0.1
    assert (record["first_value"]["step"], record["first_value"]["name"]) == (4, "loss")
    assert record["first_weights"] == 6
    assert "The first difference is at step 4." in said
    kept = Catalog(
        Storage(
            f"{record['folder']}/interrupted/runs/{os.listdir(record['folder'] + '/interrupted/runs')[0]}"
        )
    )
    assert kept.attempts.numbers() == [1, 2]


def test_a_script_without_a_seed_differs_before_the_kill(project: Path) -> None:
    record, said = plain("not seeded", code=1)
    assert record["deterministic"] is False
    assert record["first_value"]["step"] == 1
    assert "Two whole runs of this script would differ as well. Seed everything" in said


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("starts over", "The resumed script ended with exit code 1"),
        ("saves once", "The whole run saved 1 checkpoint, but a resume needs one before the last"),
        ("names", "The script used 2 run URLs, but only one run can be compared."),
    ],
)
def test_a_script_that_cannot_be_compared_gets_the_reason(project: Path, kind: str, message: str) -> None:
    record, said = plain(kind, code=1)
    assert record == {}
    assert message in said


def test_a_script_with_its_output_elsewhere_is_refused_before_it_writes(
    project: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    _, said = plain("good", str(elsewhere), code=1)
    assert f"{str(elsewhere)!r}, which verify-resume must not touch" in said
    assert "--output_dir {output_dir}" in said
    assert not elsewhere.exists()


def test_a_launcher_is_killed_with_the_processes_that_it_started_in_new_sessions(project: Path) -> None:
    """As torchrun does. A process that survived would write into the run of the next start."""
    (project / "launch.py").write_text(
        "import subprocess, sys\n"
        "sys.exit(subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True).wait())\n"
    )
    script = str(project / "train.py")
    record, _ = verify_resume("--", sys.executable, "launch.py", script, "good", code=0)
    assert record["exact"]
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert [words for words in commands if script in words] == []


def test_the_command_can_name_the_output_folder_and_a_signal(project: Path, tmp_path: Path) -> None:
    options = ("--signal", "TERM", "--folder", str(tmp_path / "kept"))
    record, _ = plain("good", "{output_dir}", code=0, options=options)
    assert record["signal"] == "TERM"
    assert sorted(os.listdir(tmp_path / "kept/whole/start/output")) == [
        "_cloudtrain",
        "model.safetensors",
        "state.json",
    ]


def test_folders_of_earlier_trainings_start_empty(project: Path) -> None:
    (project / "ckpt/.cloudtrain").mkdir(parents=True)
    (project / "ckpt/model.safetensors").write_bytes(b"precious")
    assert plain("good", code=0)[0]["exact"]
    assert (project / "ckpt/model.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["trainer", "loop"])
def test_trainer_and_loop_are_exact_in_the_middle_of_an_epoch(
    name: str, project: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_instead(zygote, monkeypatch)
    record, _ = verify_resume("--", name, code=0)
    assert record["exact"] is True
    kinds = {one["kind"] for one in record["files"]}
    assert kinds >= {"weights", "optimizer", "schedule", "random state"}
    assert record["values_compared"] > 4
    assert record["positions_compared"] > 1


def test_a_trainer_with_a_random_state_in_no_checkpoint_is_not_exact(
    project: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_instead(zygote, monkeypatch)
    record, _ = verify_resume("--", "trainer with dice", code=1)
    assert record["deterministic"] is True
    found = {one["kind"]: one["max_difference"] for one in record["files"]}
    assert found["weights"] > 0
    assert found["optimizer"] > 0


def test_ctrl_c_and_a_command_that_does_not_exist_leave_nothing_behind(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, said = verify_resume("--", "no-such-program", code=1)
    assert "Cannot start 'no-such-program'" in said

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_cloudtrain.cli.verify.trial.time.sleep", interrupted)
    _, said = verify_resume("--", "sleep", "60", code=130)
    assert said.endswith("Interrupted.\n")
    assert os.listdir(tmp_path) == ["project"]
