"""What is saved in one folder is found by whoever goes on in another, in the same process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer
from hf_cloudtrain.checkpoints.retention import Policy
from hf_cloudtrain.integrations.loop import loop
from hf_cloudtrain.integrations.trainer.session import Session


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders whose uploads were waited for."""
    found: list[str] = []
    monkeypatch.setattr(Checkpointer, "finish_uploads", lambda self: found.append(self.output_dir.name))
    return found


def test_a_trainer_in_another_folder_waits_for_the_uploads_of_the_first(
    tmp_path: Path, waited: list[str]
) -> None:
    session = Session(str(tmp_path / "run"), None, fresh=False)
    for name in ("one", "one", "two"):
        args: Any = SimpleNamespace(device="cpu", world_size=1, output_dir=tmp_path / name)
        assert session.open(args).output_dir == tmp_path / name
    assert waited == ["one"]


def test_a_loop_in_another_folder_waits_for_the_uploads_of_the_first(
    tmp_path: Path, waited: list[str]
) -> None:
    for run, name in (("run", "one"), ("run", "one"), ("other", "three"), ("run", "two")):
        found = loop._checkpointer_of(str(tmp_path / run), tmp_path / name, None, False)
        assert found.output_dir == tmp_path / name
    assert waited == ["one"]


def test_a_loop_says_what_stays_on_storage(tmp_path: Path) -> None:
    class NoModels:
        _models: tuple[Any, ...] = ()

        def __getattr__(self, name: str) -> Any:
            return None

    made = loop.TrainLoop(
        NoModels(),  # type: ignore[arg-type]
        str(tmp_path / "run"),
        num_epochs=1,
        output_dir=tmp_path / "out",
        save_total_limit=2,
        keep_every_n_steps=5,
    )
    assert made._checkpointer.policy == Policy(2, 5)
