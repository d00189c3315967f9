"""Our own files below an output folder: unseen by other readers, moved from where earlier versions kept them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from hf_cloudtrain.checkpoints.in_place import InPlace
from hf_cloudtrain.checkpoints.local_folders import LocalFolders
from hf_cloudtrain.checkpoints.local_home import adopt_earlier, make_local_home, remove_if_unused
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.runtime.files import locked
from tests.faults.runs import bytes_of, entry_of, write_files

TRAINER_IGNORES = ["_*", "checkpoint-*"]
"""What Trainer.push_to_hub and Trainer._push_from_checkpoint leave out; with `hub_strategy="all_checkpoints"`, the first alone."""


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    """An output folder with a checkpoint that waits for its upload."""
    write_files(tmp_path / "out/checkpoint-5", bytes_of(5))
    LocalFolders(tmp_path / "out").check_writable()
    Outbox(tmp_path / "out").accept(tmp_path / "out/checkpoint-5", entry_of("file:///run", 1, 5))
    return tmp_path / "out"


class TestOtherReaders:
    @pytest.mark.parametrize("ignored", [TRAINER_IGNORES, TRAINER_IGNORES[:1]])
    def test_a_push_to_the_hub_leaves_it_out(self, waiting: Path, ignored: list[str]) -> None:
        sent = list(filter_repo_objects(names(waiting), ignore_patterns=ignored))
        assert [name for name in names(waiting) if "outbox" in name]
        assert [name for name in sent if not name.startswith("checkpoint-5/")] == []

    @pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
    def test_git_leaves_it_out(self, waiting: Path) -> None:
        for words in (["init", "-q"], ["add", "."]):
            subprocess.run(["git", *words], cwd=waiting, check=True)
        added = subprocess.run(["git", "ls-files"], cwd=waiting, check=True, capture_output=True, text=True)
        assert added.stdout.split() == [f"checkpoint-5/{name}" for name in sorted(bytes_of(5))]


class TestEarlierVersions:
    def test_what_they_left_is_found_in_the_new_place(self, waiting: Path) -> None:
        (waiting / "_cloudtrain").rename(waiting / ".cloudtrain")
        write_files(waiting / ".cloudtrain", {"stale/checkpoint-9/a": b"1", "stale.json": b"{}"})
        (entry,) = Outbox(waiting).entries()
        entry.check_unchanged()
        assert entry.home.is_relative_to(waiting / "_cloudtrain/outbox")
        assert {"stale/checkpoint-9/a", "stale.json"} <= {*names(waiting / "_cloudtrain")}
        assert not (waiting / ".cloudtrain").exists()

    def test_both_places_are_joined(self, waiting: Path, tmp_path: Path) -> None:
        write_files(tmp_path / "other/checkpoint-6", bytes_of(6))
        Outbox(tmp_path / "other").accept(tmp_path / "other/checkpoint-6", entry_of("file:///run", 1, 6))
        (tmp_path / "other/_cloudtrain").rename(waiting / ".cloudtrain")
        assert [entry.key.step for entry in Outbox(waiting).entries()] == [6, 5]

    def test_a_run_that_is_stored_in_the_same_folder_stays(self, waiting: Path) -> None:
        write_files(waiting / ".cloudtrain", {"attempts/000001.json": b"{}", "outbox/.x": b""})
        adopt_earlier(waiting)
        assert names(waiting / ".cloudtrain") == ["attempts/000001.json", "outbox.lock"]

    def test_an_outbox_that_a_process_is_uploading_from_stays(
        self, waiting: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (waiting / "_cloudtrain").rename(waiting / ".cloudtrain")
        with locked(waiting / ".cloudtrain/outbox.lock"):
            assert Outbox(waiting).entries() == []
        assert "is uploading from" in caplog.text
        assert [entry.key.step for entry in Outbox(waiting).entries()] == [5]


@pytest.mark.parametrize("layout", [LocalFolders, InPlace])
def test_a_folder_in_which_nothing_was_saved_is_left_empty(
    tmp_path: Path, layout: type[LocalFolders]
) -> None:
    layout(tmp_path).check_writable()
    with Outbox(tmp_path).lock():
        assert [path.name for path in tmp_path.iterdir()] == ["_cloudtrain"]
    remove_if_unused(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_something_was_saved_is_kept(waiting: Path) -> None:
    before = names(waiting)
    remove_if_unused(waiting)
    assert [name for name in before if "outbox/" in name] == [n for n in names(waiting) if "outbox/" in n]
    make_local_home(waiting)
    assert names(waiting) == before
