"""Training processes that start in no time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration._lab import Lab
from tests.integration._zygote import Zygote


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with Zygote(tmp_path_factory.mktemp("zygote"), "tests.integration._attempts") as running:
        yield running


@pytest.fixture
def lab(zygote: Zygote, tmp_path: Path) -> Lab:
    return Lab(zygote, tmp_path)
