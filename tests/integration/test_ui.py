"""The live pages of `cloudtrain ui` in a real browser: everything is drawn, follows the run, fits, and is accessible."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_cloudtrain.checkpoints import retention
from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.cli import app
from hf_cloudtrain.datasets.store import DatasetStore
from hf_cloudtrain.errors import StorageUnavailableError
from hf_cloudtrain.jobs.records import JobStore
from hf_cloudtrain.storage.client import Storage
from hf_cloudtrain.tracking.history import history_of
from tests.accessibility import findings
from tests.browser import Browser, Page
from tests.faults.runs import wait_until
from tests.integration.test_report import CHARTS, HOSTILE, MARKS, TOO_WIDE
from tests.recorded import BEGAN, record_attempt, record_run, write
from tests.served import DRAWN, SHOWN, Served, go


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


def beat(catalog: Catalog, step: int, **more: object) -> None:
    record = {"attempt": 1, "state": "training", "time": time.time(), "step": step, "total_steps": 400}
    catalog.attempts.write_progress(1, {**record, **more})


def test_a_page_follows_the_run_and_a_zoom_stays_while_data_arrives(store: Path, browser: Browser) -> None:
    catalog = catalog_of(store, "mnli")
    record_attempt(catalog, began=time.time() - 110, steps=range(1, 151))
    beat(catalog, 150)
    with Served([str(store / "runs")]) as served:
        page = browser.open(f"{served.url}#/run/0%2Fmnli", 1280)
        page.wait(DRAWN)
        page.wait("document.querySelector('#facts').textContent.includes('step 150 of 400')")
        page.ask("Plotly.relayout('loss', {'xaxis.range[0]': 20, 'xaxis.range[1]': 60}), 0")
        page.ask("document.querySelector('.bar button').click()")
        page.wait("document.querySelector('#loss').layout.yaxis.type === 'log'")
        lines = [
            {"kind": "log", "step": step, "time": time.time(), "metrics": {"loss": 0.25}}
            for step in (155, 160)
        ]
        write(catalog, 1, lines, 2)
        beat(catalog, 160)
        page.wait("document.querySelector('#facts').textContent.includes('step 160 of 400')")
        page.wait(
            "[...document.querySelectorAll('h2')].some((h) => h.textContent.startsWith('Loss: 0.25 at step 160'))"
        )
        page.wait("document.querySelector('#loss').data[0].x.includes(160)")
        assert page.ask("document.querySelector('#loss').layout.xaxis.range") == [20, 60]
        assert page.ask("document.querySelector('#loss').layout.yaxis.type") == "log"
        page.ask(
            "document.querySelector('#smoothing').value = '0.9'; smoothing.dispatchEvent(new Event('change'))"
        )
        page.wait("document.querySelector('#loss').data.some((trace) => trace.opacity === 0.25)")
        page.ask("[...document.querySelectorAll('.bar button')].at(-1).click()")
        page.wait("document.querySelector('#loss').layout.xaxis.range[1] > 150")
        look = "document.dispatchEvent(new Event('visibilitychange'))"
        page.ask(f"Object.defineProperty(document, 'hidden', {{value: true, configurable: true}}); {look}")
        wait_until(lambda: not served.pages.feed("run", "0/mnli").is_open, "a hidden page to cost no request")
        beat(catalog, 170)
        page.ask(f"delete document.hidden; {look}")
        page.wait("document.querySelector('#facts').textContent.includes('step 170 of 400')")
        assert page.complaints == []
        page.close()


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_compare_jobs_and_datasets_are_drawn_and_fit_and_are_accessible(
    store: Path, browser: Browser, width: int, dark: bool, tmp_path: Path
) -> None:
    for name, rate in (("mnli-a", "1e-4"), ("lr=3e-4,bs=8", "3e-4")):
        facts = {"host": "gpu-07", "command": f"train.py --lr {rate}", "learning rate": rate}
        catalog = catalog_of(store, name)
        record_attempt(catalog, began=BEGAN, steps=range(1, 201), state="finished", facts=facts)
    jobs = JobStore()
    facts_of_job = {"engine": "local", "nodes": 1, "nproc_per_node": 2, "max_restarts": 3}
    record = jobs.create("mnli-a", run_url=str(store / "runs" / "mnli-a"), state="running", **facts_of_job)
    log = jobs.home(record.id) / "log" / "node-0.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"step 1\n{HOSTILE}\n")
    folder = tmp_path / "glue"
    folder.mkdir()
    (folder / "train.csv").write_text("a,b\n")
    DatasetStore().create("glue", str(folder))
    with Served([str(store / "runs")]) as served:
        page = browser.open(served.url, width, dark=dark)
        page.wait(SHOWN)
        boxes = "[...document.querySelectorAll('tbody input')]"
        assert page.ask(f"{boxes}.every((box) => box.checkVisibility())"), (
            "a person can choose on a phone too"
        )
        page.ask(f"{boxes}.forEach((box) => box.click())")
        assert page.ask("document.querySelector('.bar a').textContent") == "Compare 2 runs"
        go(page, page.ask("document.querySelector('.bar a').hash"))
        page.wait(DRAWN)
        marks = page.ask(MARKS)
        assert len(marks) >= 4
        assert min(marks.values()) >= 2, marks
        text = page.ask("document.body.innerText")
        assert "mnli-a 0." in text
        assert "train.py --lr 3e-4" in text
        assert "others are the same" in text
        for address, expected in (
            ("", ""),
            ("#/jobs", "mnli-a-1"),
            ("#/job/mnli-a-1", "step 1"),
            ("#/datasets", "glue"),
        ):
            if address:
                go(page, address)
            assert expected in page.ask("document.body.innerText")
            check_page(page, served, width)
            assert findings(page) == []
        go(page, "#/job/mnli-a-1")
        with log.open("a") as file:
            file.write("step 2\n")
        page.wait("document.querySelector('[data-log=node-0]').textContent.endsWith('step 2')")
        assert page.ask("window.pwned === undefined && document.images.length === 0")
        page.close()


def test_runs_of_one_experiment_are_together_and_cost_is_shown_where_it_is_known(
    store: Path, browser: Browser
) -> None:
    for name, experiment in (("a", "sweep-2"), ("b", None), ("c", "sweep-10"), ("d", "sweep-2")):
        facts = {"experiment": experiment} if experiment else {}
        catalog = catalog_of(store, name)
        record_attempt(
            catalog, began=BEGAN, steps=range(1, 61), state="finished", facts={"host": "h", **facts}
        )
    with Served([str(store / "runs")]) as served:
        page = browser.open(served.url, 1280)
        page.wait("document.querySelectorAll('tr.group').length === 3")
        rows = (
            "[...document.querySelectorAll('tbody tr')].map((row) => row.querySelector('th, a').textContent)"
        )
        assert page.ask(rows) == ["sweep-2", "a", "d", "sweep-10", "c", "without an experiment", "b"]
        cost = "getComputedStyle(document.querySelector('th[data-key=cost]')).display"
        page.wait("document.querySelectorAll('.spark path[d^=M]').length === 4")
        assert page.ask(cost) == "none"
        catalog = catalog_of(store, "b")
        found = catalog.attempts.read_progress(1) or {}
        catalog.attempts.write_progress(1, {**found, "price_per_hour": 60.0, "step": 61})
        page.wait(f"{cost} !== 'none'")
        page.wait(f"document.querySelector('tbody').innerText.includes('{history_of(catalog).cost:.2f}')")
        costs = page.ask(
            "[...document.querySelectorAll('td.cost')].map((cell) => cell.textContent).filter(Boolean)"
        )
        assert costs == [f"{history_of(catalog).cost:.2f}"], "without '≥': the run has ended"
        page.ask("document.querySelector('th[data-key=name] button').click()")
        assert page.ask(rows) == ["sweep-2", "a", "d", "sweep-10", "c", "without an experiment", "b"]
        page.ask("document.querySelector('th[data-key=name] button').click()")
        assert page.ask(rows)[:3] == ["sweep-2", "d", "a"]
        assert findings(page) == []
        assert page.complaints == []
        page.close()


def test_the_keyboard_and_the_place_in_a_table_stay_while_it_changes(store: Path, browser: Browser) -> None:
    catalog = catalog_of(store, "mnli")
    record_attempt(catalog, began=time.time() - 110, steps=range(1, 151))
    beat(catalog, 150)
    with Served([str(store / "runs")]) as served:
        page = browser.open(f"{served.url}#/run/0%2Fmnli", 390)
        page.wait(DRAWN)
        page.ask(
            "window.button = [...document.querySelectorAll('td button')].at(-1); window.area = button.closest('.scroll');"
            "button.focus(); area.scrollLeft = 90; true"
        )
        name = page.ask("button.textContent")
        assert page.ask("area.scrollLeft") == 90
        retention.pin(catalog, catalog.checkpoints()[-1])
        page.wait("!button.isConnected")
        assert page.ask("document.activeElement.textContent") == name
        assert page.ask("[area.isConnected, area.scrollLeft]") == [True, 90]
        page.ask("location.hash = ''; document.documentElement.dataset.shown = ''")
        page.wait(SHOWN)
        page.ask("window.box = document.querySelector('tbody input'); box.focus(); true")
        beat(catalog, 160)
        page.wait("!box.isConnected")
        assert page.ask("document.activeElement.dataset.id") == "0/mnli"
        assert page.complaints == []
        page.close()


def test_a_row_asks_again_for_what_could_not_be_read(store: Path, browser: Browser) -> None:
    catalog = catalog_of(store, "mnli")
    record_attempt(catalog, began=time.time() - 110, steps=range(1, 151))
    beat(catalog, 150)
    with Served([str(store / "runs")]) as served:
        asked: list[str] = []
        details = served.pages.runs.details

        def fails_once(run_id: str) -> dict[str, object]:
            asked.append(run_id)
            if len(asked) == 1:
                raise StorageUnavailableError("The storage does not answer.")
            return details(run_id)

        served.pages.runs.details = fails_once  # type: ignore[method-assign]
        page = browser.open(served.url, 1280)
        page.wait(SHOWN)
        wait_until(lambda: len(asked) == 1, "the row to ask")
        catalog.attempts.write_progress(1, {**(catalog.attempts.read_progress(1) or {}), "loss": 0.125})
        page.wait("document.querySelector('.spark path')?.getAttribute('d')?.startsWith('M')")
        assert len(asked) == 2
        page.close()


def press(page: Page, key: str) -> None:
    number, text = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " "), "Escape": (27, "")}[key]
    given = {"key": key, "windowsVirtualKeyCode": number}
    page.call("Input.dispatchKeyEvent", type="keyDown", text=text, **given)
    page.call("Input.dispatchKeyEvent", type="keyUp", **given)


def tab_to(page: Page, text: str) -> None:
    """Press Tab until the element with that text has the focus."""
    for _ in range(60):
        press(page, "Tab")
        if page.ask("document.activeElement.textContent") == text:
            return
    raise AssertionError(f"Tab does not lead to {text!r}")


def test_the_keyboard_leads_everywhere_and_the_commands_of_a_checkpoint_work(
    store: Path, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    catalog = catalog_of(store, "mnli")
    record_run(catalog)
    with Served([str(store / "runs")]) as served:
        page = browser.open(served.url, 1280)
        page.call("Page.bringToFront")
        page.wait(SHOWN)
        press(page, "Tab")
        assert page.ask("document.activeElement.textContent") == "Skip to content"
        press(page, "Enter")
        assert page.ask("document.activeElement.id") == "main"
        tab_to(page, "mnli")
        press(page, "Enter")
        page.wait(f"location.hash.startsWith('#/run/') && {DRAWN}")
        tab_to(page, "Log scale")
        press(page, " ")
        page.wait("document.querySelector('#loss').layout.yaxis.type === 'log'")
        tab_to(page, "checkpoint-400")
        press(page, "Enter")
        commands = page.ask("[...document.querySelectorAll('dialog code')].map((code) => code.textContent)")
        press(page, "Escape")
        assert not page.ask("document.querySelector('dialog').open")
        assert page.ask("document.activeElement.textContent") == "checkpoint-400"
        results = {}
        for command in commands:
            program, group, verb, *words = shlex.split(command)
            results[verb] = CliRunner().invoke(app, [group, verb, *words])
            assert (program, results[verb].exit_code in (0, 1)) == ("cloudtrain", True), results[verb].output
        assert sorted(results) == ["download", "pin", "verify", "view"]
        assert results["pin"].exit_code == results["view"].exit_code == 0
        page.wait("document.body.innerText.includes('newest, pinned')")
        assert page.complaints == []
        page.close()


def test_hostile_names_and_metrics_are_text(store: Path, browser: Browser) -> None:
    name = "a'\"&lt;b <img src=x onerror=window.pwned=1>"
    catalog = catalog_of(store, name)
    facts = {"host": HOSTILE, "command": HOSTILE, HOSTILE: HOSTILE}
    record_attempt(catalog, began=BEGAN, steps=range(1, 61), state=HOSTILE, facts=facts, save_steps=20)
    log = {"kind": "log", "step": 30, "time": BEGAN, "metrics": {f"eval_{HOSTILE}": 0.5, HOSTILE: 1.0}}
    write(catalog, 1, [log], 2)
    with Served([str(store / "runs")]) as served:
        page = browser.open(served.url, 390)
        page.wait(SHOWN)
        assert name in page.ask("document.body.innerText")
        go(page, page.ask("document.querySelector('tbody a').hash"))
        page.wait(DRAWN)
        assert page.ask("document.body.innerText").count("</script><script>window.pwned = 1") >= 3
        page.ask("Plotly.Fx.hover('metrics', [{curveNumber: 0, pointNumber: 0}])")
        page.ask("document.querySelector('td button').click()")
        assert "cloudtrain checkpoint download" in page.ask("document.querySelector('dialog').innerText")
        page.ask("document.querySelector('dialog').close()")
        go(
            page,
            page.ask("`#/compare/${encodeURIComponent(decodeURIComponent(location.hash.split('/')[2]))}`"),
        )
        page.wait(DRAWN)
        assert page.ask("window.pwned === undefined && document.images.length === 0")
        assert page.ask(TOO_WIDE) == []
        assert page.complaints == []
        page.close()


def test_a_browser_whose_token_has_become_old_is_asked_for_the_new_one(store: Path, browser: Browser) -> None:
    record_run(catalog_of(store, "mnli"))
    token = "a-token-of-24-characters"
    with Served([str(store / "runs")], token, reading=True) as served:
        page = browser.open(f"{served.url}#token={token}", 1280)
        page.wait(SHOWN)
        page.call("Network.clearBrowserCookies")  # as after a start of the server with a new token
        served.pages.end()
        page.wait("document.documentElement.dataset.shown === 'login'")
        page.close()


def test_what_is_not_there_is_said_once_and_the_server_is_not_blamed(store: Path, browser: Browser) -> None:
    record_run(catalog_of(store, "mnli"))
    with Served([str(store / "runs")]) as served:
        for address, words in {
            "#/run/7%2Fx": "There is no run '7/x' on this page.",
            "#/job/absent-1": "No job 'absent-1'",
            "#/run/%": "on this page",
        }.items():
            page = browser.open(f"{served.url}{address}", 1280)
            page.wait("document.querySelector('.trouble') !== null")
            assert words in page.ask("document.querySelector('.trouble').textContent")
            later = "new Promise((done) => setTimeout(() => done(document.getElementById('link').className), 400))"
            assert page.ask(later) == ""
            assert page.complaints == []
            page.close()


def test_trackers_are_linked_and_a_browser_without_the_token_is_told_of_actions(
    store: Path, browser: Browser
) -> None:
    catalog = catalog_of(store, "mnli")
    record_attempt(catalog, began=time.time() - 110, steps=range(1, 151))
    beat(catalog, 150, trackers={"wandb": "https://wandb.example/x", "mlflow": "run 7"})
    with Served([str(store / "runs")], "a-token-of-24-characters", may_act=True) as served:
        page = browser.open(f"{served.url}#/run/0%2Fmnli", 1280)
        page.wait(DRAWN)
        assert page.ask("[...document.querySelectorAll('header .url')].map((line) => line.textContent)")[
            1:
        ] == [
            "wandb: https://wandb.example/x",
            "mlflow: run 7",
        ]
        assert page.ask("document.querySelector('header .url a').href") == "https://wandb.example/x"
        page.ask(
            "[...document.querySelectorAll('.bar button')].find((one) => one.textContent.startsWith('Enter')).click()"
        )
        page.wait("document.documentElement.dataset.shown === 'login'")
        page.close()


def test_a_browser_with_the_token_acts_and_one_without_is_asked_for_it(store: Path, browser: Browser) -> None:
    catalog = catalog_of(store, "mnli")
    record_attempt(catalog, began=time.time() - 110, steps=range(1, 151))
    beat(catalog, 150)
    token = "a-token-of-24-characters"
    with Served([str(store / "runs")], token, reading=True, may_act=True) as served:
        page = browser.open(served.url, 390)
        page.wait("document.documentElement.dataset.shown === 'login'")
        assert findings(page) == []
        page.ask(
            "document.querySelector('#token').value = 'wrong'; document.querySelector('form button').click()"
        )
        page.wait("document.body.innerText.includes('The token is wrong.')")
        page.ask(
            f"document.querySelector('#token').value = {json.dumps(token)}; document.querySelector('form button').click()"
        )
        page.wait(SHOWN)
        page.close()
        page = browser.open(f"{served.url}#token={token}", 1280)
        page.wait(SHOWN)
        assert token not in page.ask("location.href + document.cookie + document.documentElement.outerHTML")
        go(page, "#/run/0%2Fmnli")
        page.wait(DRAWN)
        page.ask(
            "[...document.querySelectorAll('button')].find((one) => one.textContent === 'Save and stop').click()"
        )
        assert findings(page) == []
        page.ask("document.querySelector('dialog .danger').click()")
        page.wait("document.querySelector('dialog').innerText.includes('Asked attempt 1 to save and stop.')")
        assert catalog.attempts.stop_requested(1)
        page.ask("document.querySelector('dialog').close()")
        page.ask(
            "[...document.querySelectorAll('button')].find((one) => one.textContent === 'Prune …').click()"
        )
        page.ask(
            "document.querySelector('#keep').value = '1'; document.querySelector('dialog button').click()"
        )
        page.wait(
            "document.querySelector('dialog').innerText.includes('2 checkpoints (880.0 MB) would be deleted')"
        )
        page.ask("document.querySelector('dialog .danger').click()")
        page.wait("document.querySelector('dialog').innerText.includes('Deleted 2 checkpoints.')")
        assert [key.step for key in catalog.checkpoints()] == [150]
        page.wait("document.body.innerText.includes('deleted 2 checkpoints, all but the newest 1')")
        assert page.complaints == []
        page.close()


def test_a_thousand_runs_are_filtered_and_sorted(store: Path, browser: Browser) -> None:
    for number in range(1_000):
        catalog = catalog_of(store, f"run-{number}")
        catalog.attempts.begin(BEGAN, 0, None, {})
        catalog.attempts.write_progress(1, {"time": BEGAN, "state": "finished", "step": number})
    with Served([str(store / "runs")]) as served:
        page = browser.open(served.url, 1280)
        page.wait(f"{SHOWN} && document.querySelectorAll('tbody tr').length === 100")
        # What the first paint takes: independent of how many runs there are.
        assert page.ask("document.querySelectorAll('*').length") < 2_500
        assert page.ask("typeof Plotly") == "undefined"
        page.ask("document.querySelector('main > button').scrollIntoView()")
        page.wait("document.querySelectorAll('tbody tr').length === 200")
        page.ask("scrollTo(0, 0)")
        assert "1,000 of 1,000 runs" in page.ask("document.body.innerText")
        page.ask("document.querySelector('th[data-key=share] button').click()")
        page.ask("document.querySelector('th[data-key=name] button').click()")
        first = "[...document.querySelectorAll('tbody a')].slice(0, 3).map((link) => link.textContent)"
        assert page.ask(first) == ["run-0", "run-1", "run-2"]
        page.ask("document.querySelector('th[data-key=name] button').click()")
        assert page.ask(first) == ["run-999", "run-998", "run-997"]
        assert page.ask("document.querySelector('th[data-key=name]').ariaSort") == "descending"
        page.ask(
            "const filter = document.querySelector('#filter'); filter.value = 'RUN-77 fin'; filter.dispatchEvent(new Event('input'))"
        )
        assert page.ask("document.querySelectorAll('tbody tr').length") == 11
        assert "11 of 1,000 runs" in page.ask("document.body.innerText")
        assert page.complaints == []
        page.close()
