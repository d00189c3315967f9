"""The sharded example trains and resumes from its command line; `tests/integration/test_fsdp.py` kills it on several ranks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from examples.fsdp import train
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.storage.client import Storage
from tests.servers import free_port

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_trains_saves_and_resumes_from_its_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    for steps in (10, 20):
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        monkeypatch.setattr(sys, "argv", ["train.py", "--run-url", "run", "--steps", str(steps)])
        train.main()
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()] == ["step 10", "step 20"]
    catalog = Catalog(Storage("run"))
    assert catalog.checkpoints() == [CheckpointKey(1, 10), CheckpointKey(2, 20)]
    files = {entry.path for entry in catalog.read(CheckpointKey(2, 20)).files}
    assert files == {".metadata", "__0_0.distcp"}
