"""`cloudtrain new`: what it copies, what it says, and what it leaves alone."""

from __future__ import annotations

import ast
import errno
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_cloudtrain.cli import app
from hf_cloudtrain.cli.commands import new as new_command

TEMPLATE = Path(__file__).resolve().parents[4] / "examples" / "template"


def cloudtrain(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", "output", "runs"} & set(path.relative_to(folder).parts)
    }


def test_the_project_is_the_template_file_by_file(tmp_path: Path) -> None:
    cloudtrain("new", str(tmp_path / "project"))
    assert contents(tmp_path / "project") == contents(TEMPLATE)
    assert {"train.py", "README.md", "requirements.txt", ".gitignore", "model/modeling.py"} <= contents(
        TEMPLATE
    ).keys()


def test_stdout_is_the_next_command_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a project's folder"
    result = cloudtrain("new", str(folder))
    assert shlex.split(result.stdout) == ["cd", str(folder), "&&", "python", "train.py"]
    assert result.stderr.count("\n") == 1


def test_an_empty_folder_is_filled_and_missing_ones_above_are_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "not" / "yet" / "there"):
        cloudtrain("new", str(folder))
        assert (folder / "train.py").is_file()


def test_json_names_the_folder_its_files_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = json.loads(cloudtrain("new", "project", "--json").stdout)
    assert record == {
        "directory": str(tmp_path / "project"),
        "files": sorted(contents(TEMPLATE)),
        "command": "cd project && python train.py",
    }


@pytest.mark.parametrize("taken", ["folder", "hidden", "file", "link"])
def test_an_existing_file_or_folder_is_refused_and_left_alone(tmp_path: Path, taken: str) -> None:
    target = tmp_path / "project"
    if taken == "file":
        target.write_text("mine")
    elif taken == "link":
        target.symlink_to(tmp_path / "gone")
    else:
        target.mkdir()
        (target / (".git" if taken == "hidden" else "thesis.txt")).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = cloudtrain("new", str(target), code=1)
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {str(target)!r} is ")
    assert "Choose a folder that does not exist yet" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_what_python_and_a_training_left_in_the_template_stays_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = tmp_path / "used"
    for path in (
        "train.py",
        "__pycache__/train.pyc",
        "model/__pycache__/m.pyc",
        "output/first/last/x",
        "runs/first/y",
    ):
        (used / path).parent.mkdir(parents=True, exist_ok=True)
        (used / path).touch()
    (used / "train.py").chmod(0o444)
    monkeypatch.setattr(new_command, "HOMES", (tmp_path / "nowhere", used))
    record = json.loads(cloudtrain("new", str(tmp_path / "project"), "--json").stdout)
    assert record["files"] == ["train.py"]
    assert (tmp_path / "project" / "train.py").stat().st_mode & 0o200, "a project is there to be edited"


def test_an_installation_without_its_template_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_command, "HOMES", (tmp_path / "nowhere",))
    assert "Reinstall hf_cloudtrain" in cloudtrain("new", str(tmp_path / "project"), code=1).stderr
    assert not (tmp_path / "project").exists()


def test_the_template_needs_nothing_but_itself_and_what_its_requirements_bring() -> None:
    known = {
        "__future__",
        "argparse",
        "csv",
        "json",
        "os",
        "random",
        "typing",
        "model",
        "accelerate",
        "hf_cloudtrain",
        "tokenizers",
        "torch",
        "transformers",
    }
    for path in TEMPLATE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            assert {name.split(".")[0] for name in names} <= known, path


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_is_one_line_and_leaves_no_half_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    project = tmp_path / "project"
    if exists:
        project.mkdir()
    copied: list[str] = []
    copyfile = shutil.copyfile

    def full(source: str, target: str) -> None:
        copied.append(target)
        if len(copied) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source)
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    text = cloudtrain("new", str(project), code=1).stderr
    assert text == f"Error: Cannot write {copied[-1]!r}: No space left on device. Nothing was created.\n"
    assert list(tmp_path.rglob("*")) == ([project] if exists else [])
