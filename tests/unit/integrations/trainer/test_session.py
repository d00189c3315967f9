"""Callbacks that name the same run share a session; a training in a different folder finds what the first one saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.integrations.trainer.session import Session


def args_of(output_dir: Path) -> Any:
    return SimpleNamespace(device="cpu", world_size=1, output_dir=output_dir)


def test_a_trainer_in_a_different_folder_waits_for_the_uploads_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str] = []
    monkeypatch.setattr(Checkpointer, "finish_uploads", lambda self: waited.append(self.output_dir.name))
    session = Session(str(tmp_path / "run"), None, fresh=False)
    for name in ("one", "one", "two"):
        assert session.open(args_of(tmp_path / name)).checkpointer.output_dir == tmp_path / name
    assert waited == ["one"]


def test_callbacks_of_one_run_add_to_one_session(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    first = Session.of(url, None, fresh=False, policy=Policy(3))
    assert not first.listens
    assert Session.of(url, None, fresh=False, listens=True) is first
    assert first.listens
    assert first.open(args_of(tmp_path / "out")).checkpointer.policy == Policy(3)
    assert Session.of(url, None, fresh=True) is not first
    assert Session.of(str(tmp_path / "other"), None, fresh=False) is not first


def test_before_a_training_or_a_restore_the_error_says_what_to_call(tmp_path: Path) -> None:
    session = Session(str(tmp_path / "run"), None, fresh=False)
    assert not session.is_leaving
    assert session.preemption is None
    with pytest.raises(ConfigurationError, match=r"call restore\(args\) or trainer\.train\(\) first"):
        _ = session.checkpointer
