"""Asynchronous saves of a TrainLoop: the same files, the same weights after a resume, and nothing that is half a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.storage.client import Storage
from tests.faults.late_writer import LateWriters, replaced_functions
from tests.integration._lab import Lab
from tests.integration._loops import KilledError, Rows, difference, forget_accelerate, through_kills, train

STAGED = ["checkpoint-2", "checkpoint-4", "checkpoint-5", "checkpoint-6", "checkpoint-8"]
"""Of ten steps in two epochs, with a save every two; the last save is an ordinary one."""


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateWriters]:
    with LateWriters.instead_of_processes(monkeypatch) as writers:
        yield writers


def files_in(folder: Path) -> dict[str, bytes]:
    """The files of a folder; of the state, what does not depend on the time and the run."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    state = json.loads(found["training_state.json"])
    found["training_state.json"] = repr(
        {name: value for name, value in state.items() if "nonce" not in name}
    ).encode()
    return found


def test_files_best_last_and_weights_are_those_of_ordinary_saves(
    tmp_path: Path, writers: LateWriters
) -> None:
    plain, _, _ = train(tmp_path / "plain", tmp_path / "plain-out", Rows(20), async_save=False)
    assert not writers.jobs
    weights, _, _ = train(tmp_path / "run", tmp_path / "out", Rows(20), async_save=True)
    assert difference(plain, weights) == 0.0
    assert writers.written == STAGED
    for name in ("checkpoint-2", "checkpoint-10"):
        assert files_in(tmp_path / "run" / name) == files_in(tmp_path / "plain" / name)
    for name in ("best", "last", "checkpoint-10"):
        assert files_in(tmp_path / "out" / name) == files_in(tmp_path / "plain-out" / name)
    local = {path.name for path in (tmp_path / "out").iterdir()}
    assert local == {"_cloudtrain", "best", "last", "checkpoint-10", "log.json"}
    assert not list((tmp_path / "out" / "_cloudtrain").glob("saving-*"))


def test_small_checkpoints_are_staged_only_on_request(tmp_path: Path, writers: LateWriters) -> None:
    train(tmp_path / "run", tmp_path / "out", Rows(8), epochs=1)
    assert not writers.jobs


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, writers: LateWriters) -> None:
    found = through_kills(tmp_path, lambda: Rows(20, noise=True), async_save=True)
    assert found["difference"] == 0.0
    assert found["batches"] == found["uninterrupted"]
    assert len(writers.written) > len(STAGED)


def test_until_a_save_is_written_the_one_before_stays_and_the_next_one_waits(
    tmp_path: Path, writers: LateWriters, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    events: list[Any] = []
    real = Accelerator.save_state

    def last() -> int | None:
        state = out / "last" / "training_state.json"
        return json.loads(state.read_text())["step"] if state.exists() else None

    def save_state(self: Accelerator, folder: str, **options: Any) -> Any:
        there = [path.name for path in out.glob("checkpoint-*")]
        events.append((Path(folder).name.split("-")[1], there, last()))
        return real(self, folder, **options)

    def inside(loop: Any) -> None:
        if loop.global_step == 2:
            writers.may_write.clear()  # checkpoint-4 waits
        if loop.global_step == 4:
            assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
            assert last() == 2
            threading.Timer(0.3, writers.may_write.set).start()

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    train(tmp_path / "run", out, Rows(32), inside=inside, epochs=1, async_save=True)
    assert events == [
        ("2", [], None),
        ("4", ["checkpoint-2"], 2),
        ("6", ["checkpoint-4"], 4),
        ("8", ["checkpoint-6"], 6),
    ]


def test_what_cannot_be_written_is_said_and_leaves_the_one_before(
    tmp_path: Path, writers: LateWriters, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    writers.fails = {"checkpoint-4"}
    local: list[Any] = []

    def inside(loop: Any) -> None:
        if loop.global_step == 5:  # the save of step 4 has failed
            loop._folder._staged.settle()
            loop._folder._finish()
            local.append(sorted(path.name for path in out.glob("checkpoint-*")))
            local.append(json.loads((out / "last" / "training_state.json").read_text())["step"])

    train(tmp_path / "run", out, Rows(32), inside=inside, epochs=1, async_save=True)
    assert local == [["checkpoint-2"], 2]
    assert "checkpoint-4 could not be kept for upload: [Errno 28] No space left on device" in caplog.text
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-8"]
    assert [key.step for key in Catalog(Storage(str(tmp_path / "run"))).checkpoints()] == [2, 6, 8]


def test_an_error_in_save_state_ends_the_staging(
    tmp_path: Path, writers: LateWriters, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = Accelerator.save_state, replaced_functions()

    def fail(self: Accelerator, folder: str, **options: Any) -> Any:
        answer = real(self, folder, **options)
        if "saving-4" in folder:
            assert replaced_functions() != before
            raise RuntimeError("a hook of the script failed")
        return answer

    monkeypatch.setattr(Accelerator, "save_state", fail)
    with pytest.raises(RuntimeError, match="a hook of the script failed"):
        train(tmp_path / "run", tmp_path / "out", Rows(20), async_save=True)
    assert replaced_functions() == before
    assert writers.written == ["checkpoint-2"]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((tmp_path / "out" / "_cloudtrain").glob("saving-*"))


def test_the_save_before_a_stop_is_an_ordinary_one(tmp_path: Path, writers: LateWriters) -> None:
    def inside(loop: Any) -> None:
        if loop.global_step == 5:
            loop.stop()

    train(tmp_path / "run", tmp_path / "out", Rows(40), inside=inside, epochs=1, async_save=True)
    assert writers.written == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "out" / "checkpoint-6" / "optimizer.bin").exists()


def test_a_second_loop_in_the_process_has_a_writer_of_its_own(tmp_path: Path, writers: LateWriters) -> None:
    for kill in (3, 5):  # the second one resumes, in the same process and folder
        with pytest.raises(KilledError):
            train(tmp_path / "run", tmp_path / "out", Rows(40), kill=kill, async_save=True)
    assert writers.written == ["checkpoint-2", "checkpoint-4"]


def train_until_killed(folder: str) -> None:
    """In a process of its own: SIGKILL right after a save was staged, as likely as not before it is written."""
    from hf_cloudtrain.staging import recorders

    recorders.SMALL_FILE = 0

    def inside(loop: Any) -> None:
        if loop.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    train(Path(folder, "run"), Path(folder, "out"), Rows(20), inside=inside, async_save=True)


@pytest.mark.slow
def test_a_staged_save_survives_the_kill_of_the_training(tmp_path: Path) -> None:
    command = f"from {__name__} import train_until_killed; train_until_killed({str(tmp_path)!r})"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == -signal.SIGKILL
    resumed, seen, _ = train(tmp_path / "run", tmp_path / "out", Rows(20), async_save=False)
    assert seen[0][0] == 5, "the save of step 4 was staged before the kill"
    weights, _, _ = train(tmp_path / "plain", tmp_path / "plain-out", Rows(20), async_save=False)
    assert difference(weights, resumed) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["first", "second"])
def test_two_ranks_with_staged_saves_killed_and_resumed_equal_uninterrupted(machine: str, lab: Lab) -> None:
    """On the same disk, where the writer may still be at work at step 4, and on a different one."""
    given: dict[str, Any] = {"module": "tests.integration._loop_attempts", "samples": 40, "noise": True}
    plain = lab.start_ranks("plain", "attempt", run_url=f"{lab.folder}/plain-run", async_save=False, **given)
    assert [rank.wait() for rank in plain] == [0, 0], plain[0].log
    killed = lab.start_ranks("first", "staged_attempt", hold_at=4, **given)

    def is_due() -> bool:
        return (lab.folder / "held").exists() if machine == "first" else 4 in lab.steps()

    lab.wait_until(lambda: is_due() or any(rank.poll() is not None for rank in killed))
    assert [rank.poll() for rank in killed] == [None, None], killed[0].log + killed[1].log
    for rank in killed:
        rank.kill()
    resumed = lab.start_ranks(machine, "staged_attempt", **given)
    assert [rank.wait() for rank in resumed] == [0, 0], resumed[0].log + resumed[1].log
    for ours, theirs in zip(resumed, plain, strict=True):
        assert ours.value["weights"] == theirs.value["weights"]
        assert ours.value["seen"] == [one for one in theirs.value["seen"] if one[0] > 4]
    assert [rank.value["staged"] for rank in resumed] == [
        ["checkpoint-5", "checkpoint-6", "checkpoint-8"],
        [],
    ]
    assert lab.steps() == [2, 4, 5, 6, 8, 10]
    assert lab.problems() == []
