"""`cloudtrain endpoint`: what the server of a local endpoint is called with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest  # noqa: TC002 - as every test
from typer.testing import CliRunner

from hf_cloudtrain.cli import app
from hf_cloudtrain.cli.commands import endpoint
from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.serving.endpoints import local


def test_only_models_become_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
    for name in ("run", "base", "step-3", "fill-mask"):
        Path(name).mkdir()
    called: list[list[str]] = []

    def refuse(endpoints: object, made: object, words: list[str], *more: Any) -> None:
        called.append(words)
        raise ConfigurationError("Enough.")

    monkeypatch.setattr(endpoint, "found_model", lambda *given: SimpleNamespace(title="run"))
    monkeypatch.setattr(local, "create_local", refuse)
    options = ["--checkpoint", "step-3", "--task", "fill-mask", "--base", "base", "--processor", "on-the-hub"]
    CliRunner().invoke(app, ["endpoint", "create", "nsmc", "run", *options])
    (words,) = called
    assert words[0] == str(tmp_path / "run")
    given = dict(zip(words[1::2], words[2::2], strict=True))
    assert given == {
        "--checkpoint": "step-3",
        "--task": "fill-mask",
        "--base": str(tmp_path / "base"),
        "--processor": "on-the-hub",
    }
