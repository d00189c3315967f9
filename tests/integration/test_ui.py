"""The live pages of `cloudtrain ui` in a real browser: everything is drawn, follows the run, fits, and is accessible."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.storage.client import Storage
from tests.browser import Browser, Page
from tests.conftest import missing
from tests.integration.test_report import CHARTS, MARKS, TOO_WIDE
from tests.recorded import record_attempt, record_run
from tests.served import DRAWN, SHOWN, Served, go
from tests.servers import ServerMissingError

AXE = Path(__file__).resolve().parents[2] / ".servers" / "node_modules" / "axe-core" / "axe.min.js"
FINDINGS = """axe.run(document, {resultTypes: ["violations"]}).then((found) => found.violations
  .filter((rule) => ["serious", "critical"].includes(rule.impact))
  .map((rule) => `${rule.id}: ${rule.nodes.map((node) => node.html.slice(0, 200)).join(" | ")}`))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with contextlib.ExitStack() as until_the_end:
        try:
            found = until_the_end.enter_context(Browser(tmp_path_factory.mktemp("browser")))
        except ServerMissingError as error:
            missing(str(error))
        yield found


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_CLOUDTRAIN_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


def catalog_of(store: Path, name: str) -> Catalog:
    return Catalog(Storage(str(store / "runs" / name)))


def check_page(page: Page, served: Served, width: int) -> None:
    """No message, no request elsewhere, nothing wider than the window."""
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith((served.url, "data:", "blob:"))] == []
    assert page.ask(TOO_WIDE) == []
    assert page.ask("document.scrollingElement.scrollWidth") == width


def findings(page: Page) -> list[str]:
    """Serious findings of axe-core (https://github.com/dequelabs/axe-core)."""
    if not AXE.is_file():
        missing("axe-core is not installed (make test installs it into .servers)")
    page.ask(AXE.read_text() + "; true")
    found: list[str] = page.ask(FINDINGS)
    return found


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_list_and_a_run_are_drawn_and_fit_and_are_accessible(
    store: Path, browser: Browser, width: int, dark: bool
) -> None:
    record_run(catalog_of(store, "mnli"))
    record_attempt(catalog_of(store, "mrpc"), began=time.time() - 100, steps=range(1, 121))
    with Served([str(store / "runs")]) as served:
        page = browser.open(served.url, width, dark=dark)
        page.wait(SHOWN)
        page.wait("document.querySelectorAll('.spark path[d^=M]').length === 2")
        text = page.ask("document.body.innerText")
        assert "mnli" in text
        assert "2 of 2 runs" in text
        assert ("rgb(17, 21, 27)" if dark else "rgb(246, 247, 249)") == page.ask(
            "getComputedStyle(document.body).backgroundColor"
        )
        check_page(page, served, width)
        assert findings(page) == []
        go(page, "#/run/0%2Fmnli")
        page.wait(DRAWN)
        marks = page.ask(MARKS)
        assert set(marks) == CHARTS
        assert min(marks.values()) >= 3, marks
        text = page.ask("document.body.innerText")
        assert "Loss: 0.3386 at step 400" in text
        assert "checkpoint-400" in text
        check_page(page, served, width)
        assert findings(page) == []
        page.close()
