"""The trackers of an Accelerator go on when a TrainLoop resumes, as those of Trainer do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.paths import EVENTS
from hf_cloudtrain.errors import PreemptedExit
from hf_cloudtrain.integrations.loop.loop import TrainLoop
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking import tracker
from hf_cloudtrain.tracking.services import service
from hf_cloudtrain.tracking.services.service import register_tracker
from hf_cloudtrain.tracking.status import run_state
from tests.faults.runs import wait_until
from tests.integration._loops import KilledError, Rows, train
from tests.integration._trackers import Notebook, NotebookService, NotebookTracker

KILLS = (3, 7)
LOGGED = [2, 4, 6, 8, 10]
"""Of ten steps in two epochs of five, reported every two."""


@pytest.fixture(autouse=True)
def service_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_services", {})
    monkeypatch.setattr(tracker, "SAVE_FLUSH_SECONDS", 0.0)
    monkeypatch.setenv("NOTEBOOK", str(tmp_path / "notebook.jsonl"))
    monkeypatch.delenv("NOTEBOOK_DOWN", raising=False)
    register_tracker(NotebookService(["one"]))


@pytest.fixture
def notebook(service_in_a_file: None) -> Notebook:
    if not hasattr(GeneralTracker, "start"):
        pytest.skip("accelerate before 1.8 has trackers that start when they are made")
    return Notebook()


def begin(loop: TrainLoop, config: dict[str, Any] | None = None) -> None:
    loop.init_trackers("project", config)


def attempt(folder: Path, machine: str, kill: int | None = None, **arguments: Any) -> TrainLoop | None:
    """One attempt at the run of a folder, on a machine of its own."""
    arguments = {"log_with": NotebookTracker(), "before": begin, **arguments}
    try:
        return train(folder / "run", folder / machine, Rows(20), kill=kill, **arguments)[2]
    except KilledError:
        return None


def losses(found: list[tuple[str, int, float]], name: str = "loss") -> list[int]:
    return [step for metric, step, _ in found if metric == name]


def test_two_kills_leave_one_tracker_run_with_each_step_once(
    tmp_path: Path, notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, kill in enumerate(KILLS):
        attempt(tmp_path, f"machine-{number}", kill, before=partial(begin, config={"lr": 0.1}))
    attempt(tmp_path, "machine-9")
    found = notebook.values("one")
    assert notebook.values() == found
    assert losses(found) == LOGGED
    assert losses(found, "eval_loss") == [5, 10]
    assert {"run": "one", "config": {"lr": 0.1}} in notebook.lines()
    monkeypatch.setenv("NOTEBOOK", str(tmp_path / "plain.jsonl"))
    register_tracker(NotebookService(["plain"]))
    train(tmp_path / "plain", tmp_path / "plain-machine", Rows(20), log_with=NotebookTracker(), before=begin)
    assert Notebook().values() == found
    assert run_state(Catalog(Storage(str(tmp_path / "run")))).trackers == {
        "notebook": "https://notebook.example/one"
    }


def test_what_a_new_tracker_run_lacks_comes_from_the_records_of_the_run(
    tmp_path: Path, notebook: Notebook
) -> None:
    attempt(tmp_path, "first", 7)
    notebook.path.unlink()
    attempt(tmp_path, "second")
    assert losses(notebook.values("one")) == LOGGED


def test_a_service_that_is_down_does_not_end_the_training(
    tmp_path: Path, notebook: Notebook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTEBOOK_DOWN", "1")
    monkeypatch.setenv("NOTEBOOK_TOKEN", "hush-hush-hush")
    loop = attempt(tmp_path, "first")
    assert loop is not None
    assert loop.global_step == 10
    assert caplog.text.count("The tracker notebook did not start") == 1
    assert "hush" not in caplog.text
    assert loop.accelerator.trackers == []


def test_an_emergency_save_flushes_it(tmp_path: Path, notebook: Notebook) -> None:
    with pytest.raises(PreemptedExit):
        attempt(tmp_path, "first", signal_at=3)
    assert {"flushed": True} in notebook.lines()
    attempt(tmp_path, "second")
    assert losses(notebook.values("one")) == LOGGED


def test_event_files_of_tensorboard_go_on(tmp_path: Path) -> None:
    here = {"log_with": "tensorboard", "project_dir": tmp_path / "logs"}
    for kill in KILLS:
        attempt(tmp_path, "machine", kill, **here)
    attempt(tmp_path, "machine", **here)
    found = EventAccumulator(str(tmp_path / "logs" / "project"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == LOGGED


def test_event_files_of_a_machine_that_is_gone_come_back(tmp_path: Path) -> None:
    attempt(tmp_path, "one", 7, log_with="tensorboard", project_dir=tmp_path / "one")
    storage = Storage(str(tmp_path / "run"))
    wait_until(lambda: storage.list(EVENTS), "event files on storage")
    attempt(tmp_path, "two", log_with="tensorboard", project_dir=tmp_path / "two")
    first, second = (
        {path.name for path in (tmp_path / name / "project").iterdir()} for name in ("one", "two")
    )
    assert first < second
    found = EventAccumulator(str(tmp_path / "two" / "project"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == LOGGED


def test_without_it_the_trackers_of_the_accelerator_report_as_before(
    tmp_path: Path, notebook: Notebook, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hf_cloudtrain")
    attempt(tmp_path, "first", before=lambda loop: loop.accelerator.init_trackers("project"))
    assert losses(notebook.values("unknown")) == LOGGED
    assert (
        caplog.text.count(
            "With loop.init_trackers(…) in place of accelerator.init_trackers(…) all of them have one."
        )
        == 1
    )
