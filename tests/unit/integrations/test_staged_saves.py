"""Which saves of a training are staged, and what happens where they cannot be."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.manifest import Position
from hf_cloudtrain.integrations import staged_saves
from hf_cloudtrain.integrations.staged_saves import StagedSaves, checkpoint_size, may_stage
from hf_cloudtrain.staging.saves import WORTH_IT
from tests.faults.late_writer import LateWriters
from tests.faults.runs import Machines


@pytest.mark.parametrize(
    ("wish", "size", "variable", "answer"),
    [
        (None, WORTH_IT, None, True),
        (None, WORTH_IT - 1, None, False),
        (True, 1, None, True),
        (False, WORTH_IT, None, False),
        (None, 1, "1", True),
        (None, WORTH_IT, "0", False),
        (True, 1, "0", True),
    ],
)
def test_large_checkpoints_are_staged_unless_the_user_says_otherwise(
    checkpointer: Checkpointer,
    monkeypatch: pytest.MonkeyPatch,
    wish: bool | None,
    size: int,
    variable: str | None,
    answer: bool,
) -> None:
    if variable is not None:
        monkeypatch.setenv("HF_CLOUDTRAIN_ASYNC_SAVE", variable)
    assert may_stage(checkpointer, wish, size) is answer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda monkeypatch: monkeypatch.setattr(staged_saves, "why_not", lambda size: "no room"), "no room"),
        (
            lambda monkeypatch: monkeypatch.setattr("hf_cloudtrain.env.verify_folder", lambda: "somewhere"),
            "verify-resume looks at each checkpoint",
        ),
    ],
)
def test_why_not_is_a_warning_for_who_asks_for_it_and_information_for_others(
    checkpointer: Checkpointer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    change(monkeypatch)
    caplog.set_level(logging.INFO, staged_saves.__name__)
    assert not may_stage(checkpointer, None, WORTH_IT - 1)
    assert not may_stage(checkpointer, False, WORTH_IT)
    assert not may_stage(checkpointer, None, WORTH_IT)
    assert not may_stage(checkpointer, True, WORTH_IT - 1)
    told = [record for record in caplog.records if "Saves are not asynchronous" in record.message]
    assert [record.levelname for record in told] == ["INFO", "WARNING"]
    assert all(reason in record.message for record in told)


def test_what_the_framework_cannot_stage_is_not_staged(checkpointer: Checkpointer) -> None:
    assert not may_stage(checkpointer, True, WORTH_IT, lambda: "FSDP writes the model")


def test_without_a_writer_process_saves_are_ordinary_ones(
    checkpointer: Checkpointer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(staged_saves, "AsyncSaves", refuse)
    staged = StagedSaves(checkpointer, WORTH_IT)
    assert "Saves are not asynchronous: [Errno 12] Cannot allocate memory" in caplog.text
    folder = tmp_path / "out" / "checkpoint-5"
    folder.mkdir()
    staged.open(folder)
    torch.save(torch.zeros(2**20), folder / "model.pt")
    assert not staged.close()
    assert (folder / "model.pt").exists()
    staged.settle()
    staged.end()


def test_a_checkpoint_that_is_stored_under_a_name_is_waited_for(
    checkpointer: Checkpointer,
    machines: Machines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "out" / "checkpoint-5"
    folder.mkdir()
    with LateWriters.instead_of_processes(monkeypatch) as writers:
        caplog.set_level("INFO", logger="hf_cloudtrain")
        staged = StagedSaves(checkpointer, WORTH_IT)
        assert "Saves are asynchronous: process 4711 writes their files." in caplog.text
        writers.may_write.clear()
        staged.open(folder)
        torch.save(torch.zeros(1), folder / "model.pt")
        staged.close()
        checkpointer.save(folder, Position(global_step=5))
        threading.Timer(0.2, writers.may_write.set).start()
        checkpointer.save_folder(folder, "final")
        assert (machines.run / "final" / "model.pt").exists()
        staged.end()


def test_the_end_gives_the_memory_back_and_later_saves_are_ordinary_ones(
    checkpointer: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LateWriters.instead_of_processes(monkeypatch):
        staged = StagedSaves(checkpointer, WORTH_IT)
        queue = checkpointer.upload_queue
        assert queue is not None
        assert queue.late is not None
        staged.end()
        assert queue.late is None
        staged.open(tmp_path)
        torch.save(torch.zeros(1), tmp_path / "model.pt")
        assert not staged.close()
        assert (tmp_path / "model.pt").exists()


def test_the_expected_size_is_that_of_the_weights_and_of_adam_for_those_that_are_trained() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.BatchNorm1d(10))
    model[0].weight.requires_grad = False
    weights = 4 * (100 + 10 + 10 + 10 + 10) + 8  # two vectors of weights, two of statistics, and a count
    assert checkpoint_size([model]) == weights + 8 * 20
    assert checkpoint_size([model, model], save_only_model=True) == 2 * weights
