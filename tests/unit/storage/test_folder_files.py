"""What a folder holds that a checkpoint cannot hold: left out, and named once."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.checkpoints.outbox import Outbox
from hf_cloudtrain.storage.folder_files import fresh_files, own_files
from tests.faults.runs import Machines, bytes_of, contents, entry_of, write_checkpoint, write_files


def bind(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def mutual(path: Path) -> None:
    """Two folders with a link to each other."""
    for name, other in (("a", "b"), ("b", "a")):
        write_files(path / name, {name: b"x"})
        (path / name / "other").symlink_to(f"../{other}")


NAMES = ["a\nb", "a\x1bb", "caf\udce9", "back\\slash", "C:", "\x85"]
TABLE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a link to its own folder": (
        lambda at: (at / "latest").symlink_to("."),
        "latest",
        "a link to a folder that contains it",
    ),
    "a link to the folder above": (
        lambda at: (at / "up").symlink_to(".."),
        "up",
        "a link to a folder that contains it",
    ),
    "a broken link": (lambda at: (at / "gone").symlink_to("nowhere"), "gone", "a broken link"),
    "a link to itself": (lambda at: (at / "self").symlink_to("self"), "self", "a link to itself"),
    "a FIFO": (lambda at: os.mkfifo(at / "pipe"), "pipe", "a FIFO"),
    "a socket": (lambda at: bind(at / "socket"), "socket", "a socket"),
    "a device": (lambda at: (at / "device").symlink_to("/dev/null"), "device", "a device"),
    **{f"the name {name!r}": (lambda at, name=name: (at / name).touch(), name, "its name") for name in NAMES},
    "the name of a folder": (lambda at: write_files(at / "a\x07b", {"inside": b"x"}), "a\x07b", "its name"),
    "our own name in capitals": (lambda at: (at / ".CloudTrain").touch(), ".CloudTrain", "its name"),
    "folders that link to each other": (mutual, "a/other/other", "a link to a folder that contains it"),
}


@pytest.mark.parametrize("kind", TABLE)
def test_what_cannot_be_stored_is_left_out_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    make, path, reason = TABLE[kind]
    outbox = Outbox(tmp_path)
    for step in (5, 10):
        folder = write_checkpoint(tmp_path, step)
        make(folder)
        entry = outbox.accept(folder, entry_of("file:///run", 1, step))
        assert bytes_of(step).items() <= contents(entry.home / "files").items()
        assert path not in {file.path for file in entry.files}
    warnings = [record.getMessage() for record in caplog.records if "Not stored of" in record.getMessage()]
    assert len(warnings) == 1
    assert f"{path!r} ({reason})" in warnings[0]
    assert "rename them, make them readable, or replace links by copies" in warnings[0]


def test_files_that_cannot_be_read_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """root can read all files, so the answer of the system is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("secret"))
    real = os.scandir

    def scandir(path: Path) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    folder = write_checkpoint(tmp_path, 5)
    write_files(folder, {"secret": b"x", "closed/file": b"x"})
    entry = Outbox(tmp_path).accept(folder, entry_of("file:///run", 1, 5))
    assert {file.path for file in entry.files} == set(bytes_of(5))
    assert "'secret' (it cannot be read)" in caplog.text
    assert "'closed' (it cannot be read)" in caplog.text


def test_a_link_to_a_sibling_folder_is_stored_twice_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "final"
    write_files(folder, {"checkpoint-2/model": b"x"})
    (folder / "latest").symlink_to("checkpoint-2")
    for _ in range(2):
        entry = Outbox(tmp_path).accept(folder, entry_of("file:///run", 1, 5))
        assert {file.path for file in entry.files} == {"checkpoint-2/model", "latest/model"}
    assert caplog.text.count("'latest' in") == 1
    assert "is a link to 'checkpoint-2', so the files of that folder are stored twice" in caplog.text


def test_folders_that_all_link_to_one_another_are_walked_in_a_reasonable_time(tmp_path: Path) -> None:
    """Every path through 9 folders would be 10**6 files."""
    names = "abcdefghi"
    for name in names:
        write_files(tmp_path / name, {"file": b"x"})
        for other in names:
            (tmp_path / name / other).symlink_to(f"../{other}")
    assert len(list(fresh_files(tmp_path, 0, {}))) <= len(names) ** 2


def test_a_folder_that_is_written_again_and_again_names_its_links_to_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path, 5)
    (folder / "data").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.tmp")
    entry = Outbox(tmp_path / "out").accept(folder, entry_of("file:///run", 1, 5), link=False)
    assert {file.path for file in entry.files} == set(bytes_of(5))
    assert "'data' (a link to a folder)" in caplog.text
    assert "pipe" not in caplog.text


def test_without_a_list_every_name_is_handed_out(tmp_path: Path) -> None:
    """Who stores a dataset is told of a name that cannot be stored by an error."""
    write_files(tmp_path, {"a\nb": b"x", "c": b"x"})
    assert set(fresh_files(tmp_path, 0)) == set(own_files(tmp_path)) == {"a\nb", "c"}


def test_a_training_whose_folder_holds_all_of_it_commits_and_restores(
    machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    machine = machines.new("first")
    machine.start()
    folder = write_checkpoint(machine.output_dir, 5)
    for make, _, _ in TABLE.values():
        make(folder)
    machine.checkpointer.save(folder, Position(global_step=5))
    machine.wait()
    assert machines.committed() == [(1, 5)]
    assert bytes_of(5).items() <= (machines.restored("second") or {}).items()
