"""Which files a window stages, of which thread, and that nothing is replaced outside of one."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

from hf_cloudtrain.staging import recorders
from hf_cloudtrain.staging.memory import StagingMemory
from hf_cloudtrain.staging.recorders import write_file
from hf_cloudtrain.staging.window import Window

DATA = torch.arange(100.0)


@pytest.fixture(autouse=True)
def stage_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorders, "SMALL_FILE", 0)


@pytest.fixture(autouse=True)
def nothing_stays_replaced() -> Iterator[None]:
    before = seams()
    yield
    assert seams() == before


@pytest.fixture
def memory() -> Iterator[StagingMemory]:
    memory = StagingMemory(2**20)
    yield memory
    memory.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    return folder


@pytest.fixture
def window(memory: StagingMemory, folder: Path) -> Iterator[Window]:
    older = (str(folder.parent / "checkpoint-1"), str(folder))
    window = Window(str(folder), memory, lambda path: path in older)
    window.open()
    yield window
    window.close()


def seams() -> list[object]:
    return [
        *(
            torch.serialization._open_zipfile_writer,
            torch.serialization._save,
            safetensors.torch.serialize_file,
        ),
        *(shutil.rmtree, shutil.copyfile, shutil.copytree, os.rename, os.replace),
    ]


def test_only_files_below_the_folder_are_staged(window: Window, folder: Path) -> None:
    for name in ("checkpoint-5.pt", "checkpoint-50/a.pt", "other/a.pt"):
        path = folder.parent / name
        path.parent.mkdir(exist_ok=True)
        torch.save(DATA, path)
        assert torch.equal(torch.load(path), DATA)
    save_file({"a": DATA}, folder / "a.safetensors")
    assert names(window) == ["a.safetensors"]


def test_a_file_behind_a_link_is_written_where_the_link_leads(window: Window, folder: Path) -> None:
    """A relative link leads nowhere while the folder waits for the writer under a different name."""
    other = folder.parent / "other"
    other.mkdir()
    (folder / "folder").symlink_to("../other")
    (folder / "file.pt").symlink_to("../other/linked.pt")
    torch.save(DATA, folder / "folder/a.pt")
    save_file({"a": DATA}, folder / "folder/a.safetensors")
    torch.save(DATA, folder / "file.pt")
    torch.save(DATA, folder / "own.pt")
    assert names(window) == ["own.pt"]
    assert sorted(os.listdir(other)) == ["a.pt", "a.safetensors", "linked.pt"]
    assert (folder / "file.pt").is_symlink()


def test_a_folder_that_is_reached_by_a_link_is_staged(memory: StagingMemory, folder: Path) -> None:
    """As an output folder on a different disk."""
    (folder.parent / "out").symlink_to(folder.parent, target_is_directory=True)
    window = Window(f"{folder.parent}/out/checkpoint-5", memory)
    window.open()
    torch.save(DATA, folder.parent / "out/checkpoint-5/a.pt")
    window.close()
    assert names(window) == ["a.pt"]


def test_a_folder_that_is_given_with_dots_is_the_same_folder(memory: StagingMemory, folder: Path) -> None:
    window = Window(f"{folder.parent}/x/../checkpoint-5", memory)
    window.open()
    torch.save(DATA, folder / "a.pt")
    window.close()
    assert names(window) == ["a.pt"]


def test_other_threads_write_as_always(window: Window, folder: Path) -> None:
    def save() -> None:
        torch.save(DATA, folder / "theirs.pt")
        save_file({"a": DATA}, folder / "theirs.safetensors")
        shutil.rmtree(folder.parent / "checkpoint-1")

    (folder.parent / "checkpoint-1").mkdir()
    torch.save(DATA, folder / "ours.pt")
    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert names(window) == ["ours.pt"]
    assert sorted(os.listdir(folder)) == ["theirs.pt", "theirs.safetensors"]
    assert not (folder.parent / "checkpoint-1").exists()


def test_two_threads_stage_at_once_and_end_in_any_order(tmp_path: Path) -> None:
    turns = [threading.Event() for _ in range(3)]
    found: dict[str, list[str]] = {}

    def save(name: str, begin: int, end: int) -> None:
        memory = StagingMemory(2**20)
        folder = tmp_path / name
        folder.mkdir()
        window = Window(str(folder), memory)
        window.open()
        turns[begin].set()
        turns[end].wait(20)
        torch.save(DATA, folder / f"{name}.pt")
        window.close()
        found[name] = names(window)
        turns[2].set()

    first = threading.Thread(target=save, args=("first", 0, 1))
    first.start()
    turns[0].wait(20)
    second = threading.Thread(target=save, args=("second", 1, 2))  # begins within the first, and outlives it
    second.start()
    first.join()
    second.join()
    assert found == {"first": ["first.pt"], "second": ["second.pt"]}


def test_windows_within_windows_each_take_their_own(
    memory: StagingMemory, window: Window, folder: Path
) -> None:
    """A training that a callback of a different training starts, in the same thread."""
    inner_folder = folder.parent / "inner/checkpoint-5"
    inner_folder.mkdir(parents=True)
    inner_memory = StagingMemory(2**20)
    inner = Window(str(inner_folder), inner_memory)
    inner.open()
    torch.save(DATA, folder / "outer.pt")
    torch.save(DATA, inner_folder / "inner.pt")
    window.close()  # out of order
    torch.save(DATA, inner_folder / "inner-2.pt")
    torch.save(DATA, folder / "late.pt")
    inner.close()
    torch.save(DATA, inner_folder / "late.pt")
    assert names(window) == ["outer.pt"]
    assert names(inner) == ["inner.pt", "inner-2.pt"]
    assert [path.name for path in (folder / "late.pt", inner_folder / "late.pt") if path.exists()] == [
        "late.pt"
    ] * 2


def test_what_replaced_ours_in_the_meantime_stays(
    memory: StagingMemory, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that patches the same function during a save calls ours later, which then does nothing."""
    window = Window(str(folder), memory)
    before = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", before)  # what it restores at the end is what it has found first
    window.open()
    ours = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", partial(ours))
    theirs = shutil.rmtree
    window.close()
    assert shutil.rmtree is theirs
    (folder.parent / "checkpoint-1").mkdir()
    shutil.rmtree(folder.parent / "checkpoint-1")
    assert not (folder.parent / "checkpoint-1").exists()
    monkeypatch.setattr(shutil, "rmtree", before)


def test_closing_twice_and_never_opening_do_nothing(memory: StagingMemory, folder: Path) -> None:
    window = Window(str(folder), memory)
    window.close()
    window.open()
    window.close()
    window.close()
    torch.save(DATA, folder / "a.pt")
    assert (names(window), os.listdir(folder)) == ([], ["a.pt"])


def test_an_older_file_of_the_name_is_gone_while_the_new_one_is_staged(window: Window, folder: Path) -> None:
    (folder / "a.pt").write_bytes(b"of an earlier save")
    (folder / "b.safetensors").write_bytes(b"of an earlier save")
    torch.save(DATA, folder / "a.pt")
    save_file({"a": DATA}, folder / "b.safetensors")
    assert (names(window), os.listdir(folder)) == (["a.pt", "b.safetensors"], [])


def test_a_file_that_is_written_as_always_replaces_a_staged_one_of_its_name(
    window: Window, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(DATA, folder / name)
    save_file({"a": DATA}, folder / "c.safetensors")
    monkeypatch.setattr(recorders, "SMALL_FILE", 2**20)
    torch.save(DATA + 1, folder / "a.pt")
    save_file({"a": DATA + 1}, folder / "c.safetensors")
    assert names(window) == ["b.pt"]
    assert torch.equal(torch.load(folder / "a.pt"), DATA + 1)


def test_a_missing_folder_is_the_error_that_it_always_is(window: Window, folder: Path) -> None:
    with pytest.raises(RuntimeError, match="Parent directory"):
        torch.save(DATA, folder / "missing/a.pt")
    with pytest.raises(Exception, match="No such file"):
        save_file({"a": DATA}, folder / "missing/a.safetensors")
    assert window.files == []


def test_an_older_checkpoint_is_deleted_later_once_something_is_staged(window: Window, folder: Path) -> None:
    older = folder.parent / "checkpoint-1"
    older.mkdir()
    shutil.rmtree(older)  # nothing is staged: this is an ordinary save
    assert not older.exists()
    older.mkdir()
    torch.save(DATA, folder / "a.pt")
    shutil.rmtree(str(older), ignore_errors=True)
    assert older.exists()
    assert window.deleted == [str(older)]
    other = folder.parent / "cache"
    other.mkdir()
    shutil.rmtree(other)
    assert not other.exists()
    assert shutil.rmtree.avoids_symlink_attacks in (True, False)


def test_what_is_deleted_from_the_folder_is_not_staged_any_more(window: Window, folder: Path) -> None:
    (folder / "part").mkdir()
    for name in ("a.pt", "part/b.pt"):
        torch.save(DATA, folder / name)
    shutil.rmtree(folder / "part")
    assert names(window) == ["a.pt"]
    shutil.rmtree(folder)
    assert (names(window), window.deleted, folder.exists()) == ([], [], False)


@pytest.mark.parametrize(
    ("home", "name"),
    [
        *((os, name) for name in ("rename", "replace")),
        *((Path, name) for name in ("rename", "replace")),
        *((shutil, name) for name in ("move", "copy", "copyfile")),
    ],
)
def test_a_file_that_is_moved_or_copied_is_written_first(
    window: Window, folder: Path, home: Any, name: str
) -> None:
    """As a script does that writes under a temporary name."""
    for file, value in (("a.pt", DATA), ("b.pt", DATA), ("a.tmp", DATA + 1)):
        torch.save(value, folder / file)
    getattr(home, name)(folder / "a.tmp", folder / "a.pt")
    assert torch.equal(torch.load(folder / "a.pt"), DATA + 1)
    assert names(window) == ["b.pt"]
    torch.save(DATA, folder / "c.pt")
    assert names(window) == ["b.pt", "c.pt"]


def test_a_folder_that_is_moved_is_written_first(window: Window, folder: Path) -> None:
    (folder / "part.tmp").mkdir()
    for name in ("part.tmp/a.pt", "b.pt"):
        torch.save(DATA, folder / name)
    os.rename(folder / "part.tmp", folder / "part")
    os.rename(folder / "part", folder.parent / "elsewhere")
    assert torch.equal(torch.load(folder.parent / "elsewhere/a.pt"), DATA)
    assert names(window) == ["b.pt"]
    os.rename(folder, folder.parent / "final")
    assert torch.equal(torch.load(folder.parent / "final/b.pt"), DATA)
    assert names(window) == []


def test_a_folder_that_is_copied_is_written_first(window: Window, folder: Path) -> None:
    (folder / "part").mkdir()
    for name in ("part/a.pt", "b.pt"):
        torch.save(DATA, folder / name)
    shutil.copytree(folder / "part", folder.parent / "part")
    assert torch.equal(torch.load(folder.parent / "part/a.pt"), DATA)
    assert names(window) == ["b.pt"]
    shutil.copytree(folder, folder.parent / "all")
    assert torch.equal(torch.load(folder.parent / "all/b.pt"), DATA)


def test_what_is_copied_into_the_folder_replaces_what_is_staged(window: Window, folder: Path) -> None:
    other = folder.parent / "other"
    other.mkdir()
    torch.save(DATA + 1, other / "a.pt")
    for name in ("a.pt", "b.pt"):
        torch.save(DATA, folder / name)
    shutil.copytree(other, folder, dirs_exist_ok=True)
    assert torch.equal(torch.load(folder / "a.pt"), DATA + 1)
    assert torch.equal(torch.load(folder / "b.pt"), DATA)
    assert names(window) == []


@pytest.mark.parametrize("name", ["os.rename", "os.replace", "shutil.copyfile"])
def test_the_functions_keep_the_names_of_their_arguments(window: Window, folder: Path, name: str) -> None:
    torch.save(DATA, folder / "a.pt")
    home, _, function = name.partition(".")
    getattr({"os": os, "shutil": shutil}[home], function)(src=folder / "a.pt", dst=folder / "b.pt")
    assert torch.equal(torch.load(folder / "b.pt"), DATA)


def test_a_tensor_that_a_thread_changes_meanwhile_gives_a_readable_file(
    memory: StagingMemory, window: Window, folder: Path
) -> None:
    values, stop = torch.zeros(50_000), threading.Event()

    def change() -> None:
        while not stop.is_set():
            values.add_(1.0)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        torch.save({"a": values}, folder / "a.pt")
        save_file({"a": values}, folder / "a.safetensors")
    finally:
        stop.set()
        thread.join()
    window.close()
    for file in window.files:
        write_file(folder / file.path, file, memory)
    assert torch.load(folder / "a.pt")["a"].shape == (50_000,)
    assert safetensors.torch.load_file(folder / "a.safetensors")["a"].shape == (50_000,)


def names(window: Window) -> list[str]:
    return [file.path for file in window.files]
