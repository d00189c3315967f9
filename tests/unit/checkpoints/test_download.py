"""A folder appears only when it is whole, and a folder that was there before moves aside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_cloudtrain.checkpoints import download as module
from hf_cloudtrain.checkpoints.download import download, is_whole, move_aside, verify
from hf_cloudtrain.checkpoints.manifest import Manifest
from hf_cloudtrain.errors import CorruptCheckpointError, StorageError
from tests.faults.runs import Machines, bytes_of, contents, left_overs, write_files


@pytest.fixture
def manifest(machines: Machines) -> Manifest:
    """A committed checkpoint of step 5."""
    machine = machines.new("origin")
    machine.start()
    machine.save(5)
    machine.wait()
    newest = machines.catalog.newest()
    assert newest is not None
    return machines.catalog.read(newest)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out/checkpoint-5"


def test_a_download_has_every_file_and_no_others(
    machines: Machines, manifest: Manifest, target: Path
) -> None:
    heard: list[int] = []
    download(machines.catalog, manifest, target, on_bytes=heard.append)
    assert contents(target) == bytes_of(5)
    assert sum(heard) == manifest.size
    assert left_overs(target.parent) == []


def test_only_wanted_files_are_downloaded(machines: Machines, manifest: Manifest, target: Path) -> None:
    machines.storage.calls.clear()
    download(machines.catalog, manifest, target, wanted=lambda path: "rng_state" not in path)
    assert set(contents(target)) == set(bytes_of(5)) - {"state/rng_state_0.pth"}
    assert machines.storage.count("download", "*rng_state*") == 0


def test_a_folder_that_was_there_moves_aside_whole(
    machines: Machines, manifest: Manifest, target: Path
) -> None:
    write_files(target, {"model.safetensors": b"another", "extra": b"x"})
    download(machines.catalog, manifest, target)
    assert contents(target) == bytes_of(5)
    aside = target.parent / "_cloudtrain/stale/checkpoint-5"
    assert contents(aside) == {"model.safetensors": b"another", "extra": b"x"}


def test_of_folders_that_moved_aside_the_latest_stays(tmp_path: Path) -> None:
    for text in (b"first", b"second"):
        write_files(tmp_path / "checkpoint-5", {"a": text})
        aside = move_aside(tmp_path / "checkpoint-5")
    assert contents(aside) == {"a": b"second"}
    assert not (tmp_path / "checkpoint-5").exists()


def test_a_failed_download_leaves_the_folder_that_was_there_and_no_temporary_files(
    machines: Machines, manifest: Manifest, target: Path
) -> None:
    write_files(target, {"model.safetensors": b"before"})
    machines.storage.fail("download", path="*/model.safetensors", times=100)
    with pytest.raises(StorageError):
        download(machines.catalog, manifest, target)
    assert contents(target) == {"model.safetensors": b"before"}
    assert left_overs(target.parent) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing on storage"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is cut short on storage"),
        (
            lambda path: path.write_bytes(b"x" * path.stat().st_size),
            "differs from the digest in its manifest",
        ),
    ],
)
def test_a_damaged_file_is_named_and_leaves_nothing(
    machines: Machines, manifest: Manifest, target: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(machines.run / "checkpoint-5/model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=f"'model.safetensors' of checkpoint-5 {words}"):
        download(machines.catalog, manifest, target)
    assert not target.exists()
    assert left_overs(target.parent) == []


def test_a_full_disk_is_an_error_before_the_first_byte(
    machines: Machines, manifest: Manifest, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = manifest.size + module.SPARE_SPACE - 1
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    machines.storage.calls.clear()
    with pytest.raises(StorageError, match=r"needs .*, and only .* are free"):
        download(machines.catalog, manifest, target)
    assert machines.storage.calls == []
    assert left_overs(target.parent) == []


def test_a_whole_checkpoint_has_no_problems(machines: Machines, manifest: Manifest) -> None:
    assert verify(machines.catalog, manifest) == []


def test_every_damaged_file_is_named(machines: Machines, manifest: Manifest) -> None:
    folder = machines.run / "checkpoint-5"
    (folder / "empty").unlink()
    (folder / "model.safetensors").write_bytes(b"x" * len(bytes_of(5)["model.safetensors"]))
    (folder / "trainer_state.json").write_bytes(b"{")
    missing, different, short = verify(machines.catalog, manifest)
    assert missing == "'empty' is missing on storage"
    assert different == "'model.safetensors' differs from the digest in its manifest"
    assert short.startswith("'trainer_state.json' is cut short")


def test_a_local_folder_is_whole_if_every_wanted_file_matches_the_manifest(
    manifest: Manifest, tmp_path: Path
) -> None:
    local = tmp_path / "origin/checkpoint-5"
    assert is_whole(local, manifest)
    (local / "state/rng_state_0.pth").unlink()
    assert not is_whole(local, manifest)
    assert is_whole(local, manifest, wanted=lambda path: "rng" not in path)
    (local / "trainer_state.json").write_bytes(bytes_of(6)["trainer_state.json"])
    assert not is_whole(local, manifest, wanted=lambda path: "rng" not in path)
    assert not is_whole(tmp_path / "nowhere", manifest)


def test_the_original_counts_if_a_restored_file_was_changed_on_this_machine(
    manifest: Manifest, tmp_path: Path
) -> None:
    local, originals = tmp_path / "origin/checkpoint-5", tmp_path / "originals"
    write_files(originals, {"trainer_state.json": (local / "trainer_state.json").read_bytes()})
    (local / "trainer_state.json").write_text("made true on this machine")
    assert is_whole(local, manifest, originals=originals)
    write_files(originals, {"trainer_state.json": b"not even that"})
    assert not is_whole(local, manifest, originals=originals)


def test_a_file_that_was_damaged_on_its_way_is_downloaded_once_more(
    machines: Machines, manifest: Manifest, target: Path
) -> None:
    machines.storage.corrupt("download", path="*/model.safetensors")
    download(machines.catalog, manifest, target)
    assert contents(target) == bytes_of(5)
