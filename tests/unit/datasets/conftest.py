"""Stores and caches of a test's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from hf_cloudtrain import env
from hf_cloudtrain.datasets.store import DatasetStore
from tests.unit.datasets._stores import (
    FILES,
    fill,
)


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> Iterator[None]:
    monkeypatch.setenv(env.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(env.STORE, str(tmp_path / "store"))
    yield
    for folder, _, _ in os.walk(tmp_path):
        os.chmod(folder, 0o700)


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DatasetStore]:
    if request.param == "file":
        yield DatasetStore()
        return
    yield DatasetStore("memory://store")
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    return fill(tmp_path / "glue", FILES)
