"""Which run a training belongs to, over restarts that differ in what they skip and how they name their folders."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.launch import numbering
from hf_cloudtrain.launch.numbering import Numbers
from hf_cloudtrain.storage.client import Storage


class Launch:
    """A launch whose trainings begin an attempt, as real ones do; `process` is a new process of it."""

    def __init__(self, url: str) -> None:
        self.numbers = Numbers(url)

    def train(self, output_dir: str, *, fails: bool = False) -> int:
        training = self.numbers.began(self.numbers.begin(output_dir))
        attempts = Catalog(Storage(self.numbers.url_of(training.number))).attempts
        attempts.begin(time.time(), 0, None, {"output_dir": output_dir})
        training.is_over = not fails
        return training.number


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def test_trainings_are_numbered_in_their_order_and_alike_in_a_restart(url: str) -> None:
    for _ in range(2):
        launch = Launch(url)
        assert [launch.train(name) for name in ("/a", "/b", "/a")] == [1, 2, 3]
    assert launch.numbers.url_of(2) == f"{url}/trainer-2"


def test_a_restart_that_skips_a_training_finds_the_others_by_their_folders(url: str) -> None:
    launch = Launch(url)
    assert [launch.train("/a"), launch.train("/b"), launch.train("/c")] == [1, 2, 3]
    launch = Launch(url)
    assert [launch.train("/b"), launch.train("/c")] == [2, 3]
    assert Launch(url).train("/c") == 3


def test_folders_with_the_time_of_day_are_found_by_their_order(url: str) -> None:
    for hour in ("9h", "10h"):
        launch = Launch(url)
        assert [launch.train(f"/a/{hour}"), launch.train(f"/b/{hour}")] == [1, 2]


def test_a_training_after_an_error_is_the_same_one(url: str) -> None:
    launch = Launch(url)
    assert [launch.train("/a", fails=True), launch.train("/a"), launch.train("/a")] == [1, 1, 2]


def test_a_cell_that_runs_again_is_the_same_training(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbering, "in_notebook", lambda: True)
    launch = Launch(url)
    assert [launch.train("/a"), launch.train("/a"), launch.train("/b")] == [1, 1, 2]


class TestProcessesOfOneLaunch:
    @pytest.fixture(autouse=True)
    def other(self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process that has trained in /a, with a command line of its own."""
        Launch(url).train("/a")
        notes = tmp_path / "notes"
        record = {"number": 1, "output_dir": "/a", "command": "sft.py"}
        notes.write_text(f"1\ttrains\t{json.dumps(record)}\n")
        monkeypatch.setenv(env.LAUNCH_NOTES, str(notes))

    def test_a_later_stage_has_the_next_run(self, url: str) -> None:
        assert Launch(url).train("/b") == 2

    def test_the_same_folder_is_the_same_training(self, url: str) -> None:
        assert Launch(url).train("/a") == 1

    def test_the_same_command_line_is_the_same_training(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.argv", ["sft.py"])
        assert Launch(url).train("/a/10h") == 1

    def test_workers_that_torchrun_restarts_are_the_same_training(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert Launch(url).train("/a/10h") == 1
