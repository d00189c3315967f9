"""The newest checkpoint in the job's checkpoint folder: all nodes of a disk restore the same one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.in_place import InPlace
from hf_cloudtrain.checkpoints.local_folders import LocalFolders
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.jobs.node.restore import restore

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
