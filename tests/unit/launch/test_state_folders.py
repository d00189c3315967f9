"""Folders of `Accelerator.save_state`: their names in a manifest, where they go, and what never happens to other files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.frozen import SMALL_FILE
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.launch import marks
from hf_cloudtrain.launch.before import Prepared, prepare
from hf_cloudtrain.launch.marks import Marks, cut_off
from hf_cloudtrain.launch.state_folders import FOLDER, name_of, path_of, unshare
from hf_cloudtrain.launch.trainer import newest_in
from tests.unit.cli.terminal import Run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run", tmp_path / "work")
    run.begin()
    return run


def saved(run: Run, step: int, name: str) -> None:
    run.save(1, step, {"optimizer.bin": b"%d" % step}, origin={FOLDER: name})


@pytest.mark.parametrize(
    ("folder", "name"), [("step_1", "step_1"), ("./out/step_1/", "out/step_1"), ("/mnt/out/step_1", "/mnt/out/step_1")]
)  # fmt: skip
def test_a_folder_below_the_current_one_is_noted_by_its_relative_name(folder: str, name: str) -> None:
    assert name_of(Path(folder)) == name


def test_the_newest_state_is_put_where_the_script_looks(run: Run, here: Path) -> None:
    saved(run, 5, "checkpoints/state_0")
    saved(run, 10, "checkpoints/state_1")
    said: list[str] = []
    assert prepare(run.url, [], said.append).folder == "checkpoints/state_1"
    assert (here / "checkpoints" / "state_1" / "optimizer.bin").read_bytes() == b"10"
    assert os.listdir(here / "checkpoints") == ["state_1"], "Accelerate reads a number from each name there"
    assert said == [f"Restored checkpoints/state_1 from checkpoint-10 of {run.url!r}."]
    assert prepare(run.url, [], said.append).folder == "checkpoints/state_1"
    assert len(said) == 1, "it is here, whole"


def test_a_folder_that_differs_moves_aside(run: Run, here: Path) -> None:
    saved(run, 5, "step_5")
    (here / "step_5").mkdir()
    (here / "step_5" / "optimizer.bin").write_text("half")
    prepare(run.url, [], print)
    assert (here / "step_5" / "optimizer.bin").read_bytes() == b"5"
    assert (here / "_cloudtrain" / "stale" / "step_5" / "optimizer.bin").read_text() == "half"


@pytest.mark.parametrize(
    "name", ["../step_5", "/etc/cron.d/step_5", "a/../../step_5", "_cloudtrain/outbox", ""]
)
def test_law_11_a_manifest_that_leads_elsewhere_restores_nothing(run: Run, here: Path, name: str) -> None:
    saved(run, 5, name)
    assert prepare(run.url, ["python", "train.py", "--output_dir", "out"], print).folder is None
    assert os.listdir(here) == []


def test_an_absolute_folder_is_restored_where_the_command_names_it(run: Run, tmp_path: Path) -> None:
    saved(run, 5, f"{tmp_path}/out/step_5")
    assert (
        prepare(run.url, ["train.py", f"--output_dir={tmp_path}/out"], print).folder
        == f"{tmp_path}/out/step_5"
    )
    assert (tmp_path / "out" / "step_5").is_dir()
    manifest = run.catalog.read(CheckpointKey(1, 5))
    assert path_of(manifest, [f"{tmp_path}/ou"]) is None


def test_a_damaged_state_is_said_and_the_one_before_is_taken(run: Run, here: Path) -> None:
    saved(run, 5, "step_5")
    saved(run, 10, "step_10")
    (run.folder / "checkpoint-10" / "optimizer.bin").write_bytes(b"xx")
    said: list[str] = []
    assert prepare(run.url, [], said.append).folder == "step_5"
    assert said[0].startswith("checkpoint-10 is damaged; trying the one before.")


def test_checkpoints_of_trainer_are_left_to_trainer(run: Run, here: Path) -> None:
    run.save(1, 5)
    assert prepare(run.url, [], print) == Prepared()
    assert os.listdir(here) == []


def test_a_checkpoint_of_the_functions_is_restored_into_the_folder_that_the_environment_names(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1, 5, {"checkpoint.pt": b"5"})
    assert prepare(run.url, [], print) == Prepared()
    monkeypatch.setenv("CKPT_DIR", "ckpt")
    assert prepare(run.url, [], print).variables == {
        "HF_CLOUDTRAIN_RESTORED_CHECKPOINT": "000001-0000000005",
        "CKPT_DIR": str(here / "ckpt"),
    }
    assert (here / "ckpt" / "checkpoint.pt").read_bytes() == b"5"


def test_files_that_the_outbox_shares_get_an_inode_of_their_own(here: Path) -> None:
    state, outbox = here / "state", here / "outbox"
    state.mkdir()
    outbox.mkdir()
    for name, size in (("model.safetensors", SMALL_FILE), ("alone.bin", SMALL_FILE), ("small.json", 1)):
        (state / name).write_bytes(b"1" * size)
        if name != "alone.bin":
            os.link(state / name, outbox / name)
    alone = (state / "alone.bin").stat().st_ino
    unshare(state)
    with open(state / "model.safetensors", "r+b") as file:
        file.write(b"2")
    assert (outbox / "model.safetensors").read_bytes() == b"1" * SMALL_FILE
    assert (state / "model.safetensors").read_bytes() == b"2" + b"1" * (SMALL_FILE - 1)
    assert (state / "alone.bin").stat().st_ino == alone
    assert sorted(os.listdir(state)) == ["alone.bin", "model.safetensors", "small.json"]


class TestMarks:
    def test_rank_0_waits_for_a_rank_that_has_entered(self, here: Path) -> None:
        main, other = Marks(here, 0, 2), Marks(here, 1, 2)
        with other.saving(None):
            pass
        with main.saving(here / "step_1"):
            main.wait()

    def test_an_error_leaves_the_name_of_the_folder_for_the_next_start(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(OSError, match="disk full"), Marks(here, 0, 1).saving(here / "step_1"):
            raise OSError("disk full")
        assert cut_off(here) is None, "the process still runs"
        monkeypatch.setattr(marks, "is_alive", lambda _: False)
        assert cut_off(here) == here / "step_1"
        assert cut_off(here) is None

    def test_a_save_that_came_to_its_end_leaves_none(self, here: Path) -> None:
        with Marks(here, 0, 1).saving(here / "step_1"):
            pass
        assert cut_off(here) is None


def test_a_link_to_an_output_folder_leads_to_the_same_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "disk" / "out" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    newest = newest_in(str(tmp_path / "out"))
    assert newest == newest_in(str(tmp_path / "disk" / "out"))
    assert newest == str((tmp_path / "disk" / "out" / "checkpoint-4").resolve())
