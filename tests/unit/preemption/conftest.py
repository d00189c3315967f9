"""A Checkpointer whose attempt has begun; and no test of this room sends a request beyond this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_cloudtrain.checkpoints.checkpointer import Checkpointer


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to a real metadata service would hang here, and be answered on CI's machines."""
    connect = socket.socket.connect

    def checked(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_INET:
            assert address[0] == "127.0.0.1"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkpointer]:
    monkeypatch.setenv("HF_CLOUDTRAIN_EXIT_FILE", str(tmp_path / "exit.json"))
    checkpointer = Checkpointer(str(tmp_path / "run"), tmp_path / "out")
    checkpointer.begin(0)
    yield checkpointer
    checkpointer.close()
