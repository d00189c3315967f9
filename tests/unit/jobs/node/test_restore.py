"""The newest checkpoint in the job's checkpoint folder: all nodes of a disk restore the same one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.in_place import InPlace
from hf_cloudtrain.checkpoints.local_folders import LocalFolders
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.jobs.node.node import Node
from hf_cloudtrain.jobs.node.restore import restore
from hf_cloudtrain.jobs.spec.job_file import parse_job
from hf_cloudtrain.jobs.submission import Submission

DEADLINE = 30.0


def save(url: str, folder: Path, layout: type[LocalFolders], step: int, *names: str) -> None:
    """A run's next attempt saves one checkpoint on a machine of its own."""
    checkpointer = Checkpointer(url, folder, layout=layout)
    try:
        restored = checkpointer.restore()
        checkpointer.begin(restored.manifest.step if restored else 0)
        saved = folder if layout is InPlace else folder / f"checkpoint-{step}"
        saved.mkdir(parents=True, exist_ok=True)
        for name in names:
            (saved / name).write_text(str(step))
        checkpointer.save(saved, Position(global_step=step))
        checkpointer.wait(DEADLINE)
    finally:
        checkpointer.close()


@pytest.mark.parametrize(
    ("layout", "names", "restored"),
    [
        (LocalFolders, ("trainer_state.json", "model"), "checkpoint-{}/model"),
        (LocalFolders, ("training_state.json", "model"), "checkpoint-{}/model"),
        (InPlace, ("model",), "model"),
    ],
)
def test_the_nodes_of_a_disk_restore_what_the_first_one_chose(
    tmp_path: Path, layout: type[LocalFolders], names: tuple[str, ...], restored: str
) -> None:
    url, choice = str(tmp_path / "run"), tmp_path / "nodes" / "restored-1"
    save(url, tmp_path / "first", layout, 5, *names)
    key = restore(url, tmp_path / "node-0", choice)
    assert key is not None
    assert (key.step, json.loads(choice.read_text())) == (5, [key.attempt, 5])
    assert (tmp_path / "node-0" / restored.format(5)).read_text() == "5"
    save(url, tmp_path / "second", layout, 7, *names)  # it must not change the choice
    assert restore(url, tmp_path / "node-1", choice) == key
    assert (tmp_path / "node-1" / restored.format(5)).read_text() == "5"
    newest = restore(url, tmp_path / "node-2", choice.with_name("restored-2"))
    assert newest is not None
    assert newest.step == 7


def test_a_run_without_a_checkpoint_restores_nothing_on_any_node(tmp_path: Path) -> None:
    url, choice = str(tmp_path / "run"), tmp_path / "nodes" / "restored-1"
    assert restore(url, tmp_path / "node-0", choice) is None
    assert list((tmp_path / "node-0").iterdir()) == []  # scripts refuse an output folder that is not empty
    save(url, tmp_path / "first", InPlace, 5, "model")
    assert restore(url, tmp_path / "node-1", choice) is None
    assert not (tmp_path / "node-1" / "model").exists()


JOB = "name: toy\njob_setting: {docker: {command: echo}}\ncheckpoint: {output_checkpoint_dir: %s}\n"


def prepared(home: Path, start: int, folder: str = "ckpt") -> dict[str, str]:
    """The variables that a node sets once it has prepared the checkpoint folder of a start."""
    job = parse_job((JOB % folder).encode())
    submission = Submission(job, job.plan(), "toy-1", str(home / "run"), str(home / "store"), home)
    return Node(submission, 0, "localhost", 29500, start, lambda _, mounts, command: command)._restored()


def test_a_start_after_one_that_was_killed_before_its_first_checkpoint_finds_the_folder_of_the_first(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "workspace" / "ckpt"
    (folder / "initial").mkdir(parents=True)
    (folder / "initial" / "weights.pt").write_text("the user's")
    os.utime(folder / "initial" / "weights.pt", (1e9, 1e9))
    prepared(tmp_path, 1)
    LocalFolders(folder).check_writable()
    (folder / "checkpoint.pt").write_text("step 4, never uploaded")
    assert prepared(tmp_path, 2)["PROCESSED_ITERS"] == "0"
    assert [path.name for path in folder.iterdir()] == ["initial"]
    assert (tmp_path / "left-over" / "checkpoint.pt").read_text() == "step 4, never uploaded"
    (folder / "checkpoint.pt").write_text("step 4, by the command of another node on this disk")
    prepared(tmp_path, 2)
    assert (folder / "checkpoint.pt").exists()


def test_a_checkpoint_folder_of_the_users_own_stays_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    prepared(tmp_path / "home", 1, str(folder))
    (folder / "checkpoint.pt").write_text("step 4")
    prepared(tmp_path / "home", 2, str(folder))
    assert (folder / "checkpoint.pt").exists()
