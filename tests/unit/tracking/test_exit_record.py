"""The exit file of a server. That of a training is tested with its attempts."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_cloudtrain import env
from hf_cloudtrain.tracking.exit_record import read_end, record_served


def test_a_server_says_that_it_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nodes" / "exit-1.json"
    monkeypatch.setenv(env.EXIT_FILE, str(path))
    record_served()
    assert read_end(path) == {"served": True}


@pytest.mark.parametrize("content", ['{"outcome": "finished"}', '{"outcome'], ids=["whole", "damaged"])
def test_a_server_leaves_how_the_training_before_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    path = tmp_path / "exit-1.json"
    path.write_text(content)
    monkeypatch.setenv(env.EXIT_FILE, str(path))
    record_served()
    assert path.read_text() == content


def test_a_server_outside_of_a_job_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.EXIT_FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    record_served()
    assert list(tmp_path.iterdir()) == []
