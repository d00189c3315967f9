"""Training processes that start quickly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration._zygote import Zygote


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Forks processes that know all scripts of the corpus."""
    with Zygote(tmp_path_factory.mktemp("scripts"), "tests.corpus._attempt") as running:
        yield running
