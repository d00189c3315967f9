"""Training processes that start quickly, a browser, and a folder to submit jobs from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser
from tests.conftest import missing
from tests.integration._jobs import REPOSITORY, Desk
from tests.integration._lab import Lab
from tests.integration._zygote import Zygote
from tests.servers import ServerMissingError


@pytest.fixture(autouse=True)
def every_save_is_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """How busy the machine is must not decide which checkpoints there are; tests/unit/test_uploader.py has that."""
    monkeypatch.setattr("hf_cloudtrain.checkpoints.upload_queue.MAX_WAITING", 1000)


@pytest.fixture
def lab(zygote: Zygote, tmp_path: Path) -> Lab:
    return Lab(zygote, tmp_path)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with contextlib.ExitStack() as until_the_end:
        try:
            found = until_the_end.enter_context(Browser(tmp_path_factory.mktemp("browser")))
        except ServerMissingError as error:
            missing(str(error))
        yield found


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """Where jobs are submitted; what they start finds this package, and ends with the test."""
    desk = Desk(tmp_path)
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", desk.store.url)
    monkeypatch.setenv("HF_CLOUDTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield desk
    desk.close()
