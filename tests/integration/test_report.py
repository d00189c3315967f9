"""The page of `cloudtrain run report`, in a real browser: it draws, logs no error, fits, and makes no request."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.checkpoints.manifest import CheckpointKey
from hf_cloudtrain.cli import app
from hf_cloudtrain.storage.client import Storage
from tests.accessibility import findings
from tests.browser import Browser, Page
from tests.recorded import BEGAN, commit, record_attempt, record_run, write

CHARTS = {"loss", "timeline", "goodput", "rate", "steptime", "commits", "metrics"}
DRAWN = "document.documentElement.dataset.drawn === 'yes'"
MARKS = """Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) => [chart.id,
  [...chart.querySelectorAll(".trace path, .point path, path.js-line, path.point")].filter((path) => {
    const box = path.getBoundingClientRect();
    return box.width + box.height > 2;
  }).length]))"""
"""Lines, bars and points of each chart that a person can see."""
TOO_WIDE = """[...document.querySelectorAll("body *")].filter((element) =>
  !element.closest(".scroll table") && element.getBoundingClientRect().right > window.innerWidth + 0.5
).map((element) => element.outerHTML.slice(0, 120))"""
"""Tables may be wider: they scroll in their box."""

HOSTILE = (
    "</script><script>window.pwned = 1</script><img src=http://127.0.0.1:9/x onerror='window.pwned = 1'>"
)


def report(run: Path, output: Path) -> Path:
    result = CliRunner().invoke(app, ["run", "report", str(run), "-o", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}\n"
    return output


def check_no_errors_or_requests(page: Page, path: Path) -> None:
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_every_chart_is_drawn_and_nothing_is_wider_than_the_page(
    tmp_path: Path, browser: Browser, width: int, dark: bool
) -> None:
    record_run(Catalog(Storage(f"file://{tmp_path}/mnli")))
    path = report(tmp_path / "mnli", tmp_path / "report.html")
    page = browser.open(path, width, dark=dark)
    page.wait(DRAWN)
    marks = page.ask(MARKS)
    assert set(marks) == CHARTS
    assert findings(page) == []
    assert min(marks.values()) >= 3, marks
    assert page.ask("window.innerWidth") == width
    assert page.ask(TOO_WIDE) == []
    assert page.ask("document.scrollingElement.scrollWidth") == width
    assert page.ask("document.body.innerText").count("checkpoint-400") >= 1
    assert "Loss: 0.3386 at step 400" in page.ask("document.body.innerText")
    check_no_errors_or_requests(page, path)


def test_long_metrics_leave_what_a_checkpoint_is_in_sight(tmp_path: Path, browser: Browser) -> None:
    catalog = Catalog(Storage(f"file://{tmp_path}/mnli"))
    number = record_attempt(catalog, began=BEGAN, steps=range(1, 61), save_steps=999)
    metrics = {f"eval_accuracy_of_the_validation_set_{index}": 0.123456 for index in range(4)}
    commit(
        catalog, CheckpointKey(number, 60), BEGAN, metrics=metrics, exact=False, inexact_reason="why " * 30
    )
    catalog.point("best", CheckpointKey(number, 60), 0.4)
    catalog.storage.write(".cloudtrain/pins/000001-0000000060.json", b"{}")
    page = browser.open(report(tmp_path / "mnli", tmp_path / "report.html"), 1280)
    page.wait(DRAWN)
    found = page.ask("""(() => {
      const cells = [...document.querySelectorAll("td")];
      const cell = cells.find((cell) => cell.textContent.startsWith("newest, best, pinned"));
      const table = cell.closest(".scroll");
      return [cell.getBoundingClientRect().right, table.scrollWidth - table.clientWidth];
    })()""")
    assert found[0] < 640
    assert found[1] <= 0  # and nothing of the table is out of sight


def test_a_legend_shows_the_symbols_of_its_chart(tmp_path: Path, browser: Browser) -> None:
    record_run(Catalog(Storage(f"file://{tmp_path}/mnli")))
    page = browser.open(report(tmp_path / "mnli", tmp_path / "report.html"), 1280)
    page.wait(DRAWN)
    found = page.ask("""Object.fromEntries([...document.querySelectorAll("#timeline")].flatMap((chart) =>
      [...chart.closest("section").querySelectorAll(".legend li")].map((item) => {
        const style = getComputedStyle(item.firstChild);
        return [item.textContent, [style.clipPath.split("(")[0], style.clipPath.split(",").length, style.width]];
      })))""")
    assert found["save"] == ["polygon", 3, "10px"]
    assert found["failed, killed or overtaken"] == ["polygon", 12, "10px"]
    assert found["finished"] == ["none", 1, "10px"]


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_that_compares_runs_is_drawn_and_fits(tmp_path: Path, browser: Browser, width: int) -> None:
    record_run(Catalog(Storage(f"file://{tmp_path}/mnli")))
    other = Catalog(Storage(f"file://{tmp_path}/other"))
    record_attempt(other, began=BEGAN, steps=range(1, 101), facts={"host": HOSTILE}, state="finished")
    path = tmp_path / "compare.html"
    words = ["run", "compare", str(tmp_path / "mnli"), str(tmp_path / "other"), "-o", str(path)]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = browser.open(path, width)
    page.wait(DRAWN)
    assert min(page.ask(MARKS).values()) >= 2, "a line for each run"
    assert page.ask(TOO_WIDE) == []
    assert page.ask("window.pwned === undefined && document.images.length === 0")
    check_no_errors_or_requests(page, path)


def test_texts_from_storage_are_shown_as_text_and_never_run(tmp_path: Path, browser: Browser) -> None:
    catalog = Catalog(Storage(f"file://{tmp_path}/mnli"))
    facts = {"host": HOSTILE, "command": HOSTILE, HOSTILE: HOSTILE}
    number = record_attempt(
        catalog, began=BEGAN, steps=range(1, 61), state=HOSTILE, facts=facts, save_steps=20, total=60
    )
    write(
        catalog, number, [{"kind": "log", "step": 30, "time": BEGAN, f"eval_{HOSTILE}": 0.5, "loss": 1.0}], 2
    )
    path = report(tmp_path / "mnli", tmp_path / "report.html")
    page = browser.open(path, 390)
    page.wait(DRAWN)
    assert page.ask("window.pwned === undefined && document.images.length === 0")
    assert page.ask("document.body.innerText").count("</script><script>window.pwned = 1") >= 3
    assert page.ask(TOO_WIDE) == []
    page.ask("Plotly.Fx.hover('metrics', [{curveNumber: 0, pointNumber: 0}])")
    assert "window.pwned" in page.ask("document.querySelector('#metrics .hoverlayer').textContent")
    assert page.ask("window.pwned === undefined && document.images.length === 0")
    check_no_errors_or_requests(page, path)


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path: Path, browser: Browser) -> None:
    catalog = Catalog(Storage(f"file://{tmp_path}/mnli"))
    catalog.attempts.begin(BEGAN, 0, None, {})
    path = report(tmp_path / "mnli", tmp_path / "report.html")
    page = browser.open(path, 390, dark=True)
    page.wait("document.querySelectorAll('.chart').length === 0 || " + DRAWN)
    assert "None is committed" in page.ask("document.body.innerText")
    assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(17, 21, 27)"
    check_no_errors_or_requests(page, path)
