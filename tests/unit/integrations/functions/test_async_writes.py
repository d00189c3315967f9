"""`async_writes` around a script's own saves: the same bytes on storage, and in the folder once they are whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import hf_cloudtrain as ct
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations.functions import api
from hf_cloudtrain.staging import recorders
from tests.faults.late_writer import LateWriters, replaced_functions
from tests.faults.runs import Machines, wait_until


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateWriters]:
    with LateWriters.instead_of_processes(monkeypatch) as writers:
        yield writers


@pytest.fixture
def begin(machines: Machines, tmp_path: Path, writers: LateWriters) -> Iterator[Callable[..., Path]]:
    """`init` on a machine; gives its checkpoint folder."""

    def init(name: str = "ckpt", **options: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        ct.init(1_000, machines.storage.url, folder, **{"async_save": True, **options})
        return folder

    yield init
    writers.may_write.set()
    end_of_process()


def end_of_process() -> None:
    if api._Current.run is not None:
        api._Current.run.close()
        api._Current.run = None


def state(value: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((1_000,), float(value))}


def step() -> None:
    with ct.train_step():
        pass


def save(folder: Path, value: int, name: str = "checkpoint.pt") -> None:
    with ct.async_writes():
        torch.save(state(value), folder / name)


def train(folder: Path, until: int) -> None:
    """A save at each step."""
    while ct.processed_steps() < until:
        step()
        save(folder, ct.processed_steps())
        ct.upload_checkpoint()
        wait_until_committed(ct.processed_steps())


def wait_until_committed(*steps: int) -> None:
    """Of two saves in quick succession, the newer one may be committed first."""
    assert isinstance(api._Current.run, api._Run)
    mode: Any = api._Current.run._mode
    catalog = Catalog(mode._lifecycle.checkpointer.storage)
    wait_until(lambda: {key.step for key in catalog.checkpoints()} >= set(steps), f"steps {steps}")


def value_in(path: Path) -> float:
    return float(torch.load(path)["weight"][0])


def test_what_is_committed_and_restored_are_the_bytes_of_ordinary_saves(
    begin: Callable[..., Path], machines: Machines, tmp_path: Path, writers: LateWriters
) -> None:
    folder = begin()
    for value in (1, 2, 3):
        step()
        (folder / "log.txt").write_text(f"of step {value}")
        with ct.async_writes(folder):
            torch.save(state(value), folder / "checkpoint.pt")
            save_file(state(value), folder / "model.safetensors", metadata={"format": "pt"})
        ct.upload_checkpoint()
        (folder / "log.txt").write_text("of a later step")
        wait_until_committed(value)
    assert [len(job.files) for job in writers.jobs] == [2, 2], "the first save shows how much memory it takes"
    for value in (1, 2, 3):
        there = machines.run / f"checkpoint-{value}"
        torch.save(state(value), tmp_path / "checkpoint.pt")
        save_file(state(value), tmp_path / "model.safetensors", metadata={"format": "pt"})
        for name in ("checkpoint.pt", "model.safetensors"):
            assert (there / name).read_bytes() == (tmp_path / name).read_bytes()
        assert (there / "log.txt").read_text() == f"of step {value}"
        assert len(list(there.iterdir())) == 3
    assert value_in(folder / "checkpoint.pt") == 3
    assert list((folder / "_cloudtrain" / "saving").iterdir()) == []
    end_of_process()
    other = begin("elsewhere")
    assert ct.restore() == str(other)
    assert value_in(other / "checkpoint.pt") == 3


def begin_step_4_before_3_is_written(begin: Callable[..., Path], writers: LateWriters) -> Path:
    """The checkpoint folder; `writers.may_write` lets the files of step 3 be written."""
    folder = begin()
    train(folder, until=2)
    writers.may_write.clear()
    step()
    save(folder, 3)
    ct.upload_checkpoint()
    step()
    return folder


def test_the_next_block_waits_until_the_files_are_whole(
    begin: Callable[..., Path], writers: LateWriters
) -> None:
    folder = begin_step_4_before_3_is_written(begin, writers)
    assert not (folder / "checkpoint.pt").exists()
    threading.Timer(0.3, writers.may_write.set).start()
    with ct.async_writes():
        assert value_in(folder / "checkpoint.pt") == 3


def test_a_file_that_the_script_writes_again_meanwhile_is_the_newer_one(
    begin: Callable[..., Path], machines: Machines, writers: LateWriters
) -> None:
    folder = begin_step_4_before_3_is_written(begin, writers)
    torch.save(state(4), folder / "checkpoint.pt")
    threading.Timer(0.3, writers.may_write.set).start()
    ct.upload_checkpoint()
    wait_until_committed(3, 4)
    assert value_in(folder / "checkpoint.pt") == 4
    assert value_in(machines.run / "checkpoint-3" / "checkpoint.pt") == 3
    assert value_in(machines.run / "checkpoint-4" / "checkpoint.pt") == 4


@pytest.mark.parametrize("upload", [True, False])
def test_a_file_that_the_script_writes_again_after_the_block_counts(
    begin: Callable[..., Path], machines: Machines, writers: LateWriters, upload: bool
) -> None:
    folder = begin()
    train(folder, until=2)
    step()
    save(folder, 3)
    save_file(state(3), folder / "model.safetensors")
    torch.save(state(4), folder / "checkpoint.pt")
    if upload:
        ct.upload_checkpoint()
        wait_until_committed(3)
        assert value_in(machines.run / "checkpoint-3" / "checkpoint.pt") == 4
    step()
    assert value_in(folder / "checkpoint.pt") == 4


def test_a_save_without_the_block_waits_for_the_files_of_the_one_before(
    begin: Callable[..., Path], machines: Machines, writers: LateWriters
) -> None:
    folder = begin_step_4_before_3_is_written(begin, writers)
    (folder / "other.txt").write_text("of step 4")
    threading.Timer(0.3, writers.may_write.set).start()
    ct.upload_checkpoint()
    wait_until_committed(4)
    assert value_in(machines.run / "checkpoint-4" / "checkpoint.pt") == 3


def test_files_that_are_not_handed_over_are_there_when_the_next_step_begins(
    begin: Callable[..., Path], writers: LateWriters
) -> None:
    folder = begin()
    train(folder, until=2)
    jobs = len(writers.jobs)
    step()
    save(folder, 3)
    assert not (folder / "checkpoint.pt").exists()
    step()
    assert value_in(folder / "checkpoint.pt") == 3
    assert len(writers.jobs) == jobs


def test_a_script_that_renames_in_the_block_keeps_ordinary_saves(
    begin: Callable[..., Path], writers: LateWriters, caplog: pytest.LogCaptureFixture
) -> None:
    folder = begin()
    for value in (1, 2):
        step()
        with ct.async_writes():
            torch.save(state(value), folder / "new.pt")
            os.replace(folder / "new.pt", folder / "checkpoint.pt")
        ct.upload_checkpoint()
    assert value_in(folder / "checkpoint.pt") == 2
    assert not writers.jobs
    assert "'new.pt' was renamed or removed inside async_writes" in caplog.text


def fail_in_block(folder: Path) -> None:
    before = replaced_functions()
    with ct.async_writes():
        torch.save(state(3), folder / "checkpoint.pt")
        assert replaced_functions() != before
        raise RuntimeError("an error of the script")


def test_an_error_in_the_block_ends_the_staging_and_keeps_what_was_saved(
    begin: Callable[..., Path], writers: LateWriters
) -> None:
    folder, before = begin(), replaced_functions()
    train(folder, until=2)
    with pytest.raises(RuntimeError, match="of the script"):
        fail_in_block(folder)
    assert replaced_functions() == before
    step()
    assert value_in(folder / "checkpoint.pt") == 3


def test_a_save_that_cannot_be_written_is_said_and_the_next_one_counts(
    begin: Callable[..., Path], machines: Machines, writers: LateWriters, caplog: pytest.LogCaptureFixture
) -> None:
    folder = begin()
    train(folder, until=2)
    writers.fails = {"ckpt"}
    step()
    save(folder, 3)
    ct.upload_checkpoint()
    with ct.async_writes():
        writers.fails = set()
    assert "checkpoint-3 could not be kept for upload: [Errno 28]" in caplog.text
    train(folder, until=4)
    assert [key.step for key in machines.catalog.checkpoints()] == [1, 2, 4]


def test_the_emergency_save_is_an_ordinary_one(begin: Callable[..., Path], writers: LateWriters) -> None:
    folder = begin()
    train(folder, until=2)
    assert api._Current.run is not None
    mode: Any = api._Current.run._mode
    mode._lifecycle.is_leaving = True
    save(folder, 3)
    assert value_in(folder / "checkpoint.pt") == 3
    mode._lifecycle.is_leaving = False


@pytest.mark.parametrize("wish", [None, False])
def test_small_saves_and_those_of_who_does_not_want_it_are_ordinary(
    begin: Callable[..., Path], writers: LateWriters, wish: bool | None
) -> None:
    folder = begin(async_save=wish)
    train(folder, until=3)
    assert not writers.jobs


def test_a_folder_that_is_not_uploaded_is_refused(begin: Callable[..., Path], tmp_path: Path) -> None:
    begin()
    with (
        pytest.raises(ConfigurationError, match="is not in the checkpoint folder"),
        ct.async_writes(tmp_path),
    ):
        pass


def test_in_local_mode_and_before_the_first_step_files_are_written_as_always(
    begin: Callable[..., Path], tmp_path: Path
) -> None:
    save(begin(), 1)
    assert value_in(tmp_path / "ckpt" / "checkpoint.pt") == 1
    ct.init(10)
    save(tmp_path, 2)
    assert value_in(tmp_path / "checkpoint.pt") == 2


def train_until_killed(url: str, folder: str) -> None:
    """In a process of its own: SIGKILL right after a save was handed over."""
    recorders.SMALL_FILE = 0
    ct.init(1_000, url, folder, async_save=True)
    while True:
        step()
        save(Path(folder), ct.processed_steps())
        ct.upload_checkpoint()
        if ct.processed_steps() == 3:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_staged_save_survives_the_kill_of_the_script(machines: Machines, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    call = f"train_until_killed({machines.storage.url!r}, {str(folder)!r})"
    command = [sys.executable, "-c", f"from {__name__} import train_until_killed; {call}"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    for _ in range(2):  # the second time from a whole folder
        ct.init(1_000, machines.storage.url, folder)
        assert ct.restore() == str(folder)
        assert ct.processed_steps() == 3
        assert value_in(folder / "checkpoint.pt") == 3
        end_of_process()
