"""Trackers that a script starts itself get the id of the run's tracker run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hf_cloudtrain as ct
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations.functions import api
from hf_cloudtrain.tracking.services import service
from tests.faults.runs import Machines


class Counting(ct.TrackerService):
    """A service whose ids are numbers."""

    name = "counting"

    def __init__(self, first: int) -> None:
        self._next = first

    def new_id(self, start: Any) -> str:
        return str(self._next)

    def environment(self, tracker_id: str) -> dict[str, str]:
        return {"COUNTING_ID": tracker_id}

    def arguments(self, tracker_id: str, start: Any) -> dict[str, Any]:
        return {"id": tracker_id, "from_step": start.step}


class Down(Counting):
    name = "down"

    def new_id(self, start: Any) -> str:
        raise ConnectionError("503")


@pytest.fixture
def begin(machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(service, "_services", {})

    def init(first: int) -> None:
        ct.register_tracker(Counting(first))
        folder = tmp_path / f"machine-{first}"
        folder.mkdir()
        ct.init(10, machines.storage.url, folder)

    yield init
    if api._Current.run is not None:
        api._Current.run.close()
        api._Current.run = None


def test_each_start_of_a_run_gets_the_same_id(begin: Any) -> None:
    begin(1)
    assert ct.tracker_environment("counting") == {"COUNTING_ID": "1"}
    begin(2)
    assert ct.tracker_arguments("counting") == {"id": "1", "from_step": 0}


def test_event_files_go_on_after_the_restored_step(begin: Any, tmp_path: Path) -> None:
    begin(1)
    with ct.train_step():
        pass
    (tmp_path / "machine-1" / "checkpoint.pt").write_bytes(b"1")
    ct.upload_checkpoint()
    begin(2)
    ct.restore()
    assert ct.tracker_arguments("tensorboard") == {"purge_step": 2}


def test_in_local_mode_there_is_nothing_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ct.init(10)
    assert (ct.tracker_environment("wandb"), ct.tracker_arguments("mlflow")) == ({}, {})
    api._Current.run = None


@pytest.mark.parametrize(
    ("name", "message"),
    [("wandbb", "Did you mean 'wandb'"), ("trackio", r"Pass \*\*tracker_arguments\('trackio'\)")],
)
def test_a_service_that_is_not_known_or_takes_no_variables_is_named(
    begin: Any, name: str, message: str
) -> None:
    begin(1)
    with pytest.raises(ConfigurationError, match=message):
        ct.tracker_environment(name)


def test_a_service_that_is_down_does_not_end_the_script(begin: Any, caplog: pytest.LogCaptureFixture) -> None:
    begin(1)
    ct.register_tracker(Down(1))
    assert ct.tracker_arguments("down") == {}
    assert "The tracker down does not go on in the run of earlier attempts. Training goes on." in caplog.text
