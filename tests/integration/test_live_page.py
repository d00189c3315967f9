"""The page beside a run, in a real browser: it reloads itself when the storage has a newer one, and says how old it is."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_cloudtrain.checkpoints.catalog import Catalog
from hf_cloudtrain.report import page as page_module
from hf_cloudtrain.report.live import write_page
from hf_cloudtrain.storage.client import Storage
from tests.accessibility import findings
from tests.browser import Browser, Page
from tests.recorded import record_attempt, record_run

DRAWN = "document.documentElement?.dataset.drawn === 'yes'"
NOTE = "(document.getElementById('live')?.textContent ?? '')"
LOOK = "document.dispatchEvent(new Event('visibilitychange'))"
"""What a browser does when a person comes back to the tab; else the page looks once a minute."""


class Bucket(http.server.ThreadingHTTPServer):
    """Serves one page as object stores do: with an ETag, and parts of it on request."""

    def __init__(self) -> None:
        self.page = b""
        self.status = 200
        self.has_tag = True
        super().__init__(("127.0.0.1", 0), Answer)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/runs/mnli/index.html?X-Amz-Signature=0"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Bucket

    def do_GET(self) -> None:
        data = self.server.page if self.server.status == 200 else b"<Error/>"
        tag = hashlib.sha256(data).hexdigest()
        part = self.headers.get("Range") == "bytes=0-0" and self.server.status == 200
        self.send_response(206 if part else self.server.status)
        for name, value in {
            "Content-Type": "text/html; charset=utf-8",
            "Cache-Control": "no-cache",
            "ETag": f'"{tag}"',
            "Content-Length": str(1 if part else len(data)),
        }.items():
            if name != "ETag" or self.server.has_tag:
                self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data[:1] if part else data)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with Bucket() as found:
        yield found
        found.shutdown()


@pytest.fixture
def catalog(tmp_path: object) -> Catalog:
    return Catalog(Storage(f"file://{tmp_path}/mnli"))


def train(catalog: Catalog, bucket: Bucket, steps: int, **more: object) -> None:
    """A run that has come so far, and its page."""
    number = catalog.attempts.numbers()
    began = time.time() - 3600 if "state" in more else time.time() - 0.5 * steps - 20
    if not number:
        record_attempt(catalog, began=began, steps=range(1, steps + 1), lag=0.1, **more)  # type: ignore[arg-type]
    else:
        record_run(catalog)
    write_page(catalog)
    bucket.page = catalog.storage.read("index.html")


def open_page(browser: Browser, bucket: Bucket, width: int = 1280, *, dark: bool = False) -> Page:
    page = browser.open(bucket.url, width, dark=dark)
    page.wait(DRAWN)
    page.wait(f"{NOTE}.startsWith('Live: last written') || {NOTE}.startsWith('Last written')")
    return page


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_a_new_page_is_loaded_and_the_last_one_is_complete(
    catalog: Catalog, bucket: Bucket, browser: Browser, width: int, dark: bool
) -> None:
    train(catalog, bucket, 60)
    page = open_page(browser, bucket, width, dark=dark)
    assert "60 / 400" in page.ask("document.body.innerText")
    assert page.ask("document.scrollingElement.scrollWidth") == width
    assert page.ask("document.documentElement.dataset.stale") == "no"
    assert findings(page) == []
    page.ask("window.before = true")
    train(catalog, bucket, 400)  # three more attempts, the last of which finishes
    page.ask(LOOK)
    page.wait(f"window.before === undefined && {DRAWN}")
    assert "The run is complete." in page.ask("document.body.innerText")
    assert page.ask("document.getElementById('live')") is None
    assert page.complaints == []
    asked = len(page.requests)
    page.ask(LOOK)
    assert len(page.requests) == asked


@pytest.mark.parametrize("kind", ["file", "a server without ETag"])
def test_where_nothing_tells_a_new_page_from_an_old_one_it_is_loaded_once_a_look(
    catalog: Catalog, bucket: Bucket, browser: Browser, tmp_path: Path, kind: str
) -> None:
    train(catalog, bucket, 60)
    bucket.has_tag = False
    page = browser.open(tmp_path / "mnli" / "index.html" if kind == "file" else bucket.url, 1280)
    page.wait(DRAWN)
    page.ask("window.before = true")
    assert page.ask("new Promise((done) => setTimeout(() => done(window.before), 500))") is True
    page.ask(LOOK)
    page.wait(f"window.before === undefined && {DRAWN}")


@pytest.mark.slow
def test_what_is_zoomed_into_stays(catalog: Catalog, bucket: Bucket, browser: Browser) -> None:
    train(catalog, bucket, 60)
    page = open_page(browser, bucket)
    page.ask(
        "Plotly.relayout('loss', {'xaxis.range[0]': 10, 'xaxis.range[1]': 20}).then(() => { window.before = true; })"
    )
    page.wait(f"{NOTE}.includes('until you zoom out')")
    train(catalog, bucket, 400)
    page.ask(LOOK)
    assert page.ask("new Promise((done) => setTimeout(() => done(window.before), 300))") is True
    page.ask("document.getElementById('loss').emit('plotly_doubleclick')")
    page.wait(f"{NOTE}.includes('It reloads itself.')")
    page.ask(LOOK)
    page.wait(f"window.before === undefined && {DRAWN}")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "The storage refuses this address (403): it has expired"),
        pytest.param(404, "The page is no longer there: the run was deleted.", marks=pytest.mark.slow),
        pytest.param(503, "The storage answers with 503.", marks=pytest.mark.slow),
        pytest.param(0, "The storage cannot be reached now; trying again.", marks=pytest.mark.slow),
    ],
)
def test_an_address_that_expires_or_a_storage_that_goes_leaves_the_page_in_place(
    catalog: Catalog, bucket: Bucket, browser: Browser, status: int, words: str
) -> None:
    train(catalog, bucket, 60)
    page = open_page(browser, bucket)
    if status:
        bucket.status = status
    else:
        bucket.shutdown()
        bucket.server_close()
    page.ask(LOOK)
    page.wait(f"{NOTE}.includes({words!r})")
    assert "60 / 400" in page.ask("document.body.innerText")
    if status == 503:  # and comes back
        bucket.status = 200
        page.ask(LOOK)
        page.wait(f"{NOTE}.includes('It reloads itself.')")


def test_the_page_of_a_killed_run_says_when_it_was_last_written(
    catalog: Catalog, bucket: Bucket, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(page_module.time, "time", lambda: now - 7200)
    train(catalog, bucket, 60)
    page = open_page(browser, bucket)
    assert page.ask(NOTE).startswith("Last written 2 h ago (")
    assert "should be renewed every 10 min: the run was probably killed" in page.ask(NOTE)
    assert page.ask("document.documentElement.dataset.stale") == "yes"
    # A page that still changes is alive: the clock of the training machine is two hours slow.
    monkeypatch.setattr(page_module.time, "time", lambda: now - 7190)
    write_page(catalog)
    bucket.page = catalog.storage.read("index.html")
    page.ask("window.before = true")
    page.ask(LOOK)
    page.wait(f"window.before === undefined && {DRAWN}")
    page.wait(f"{NOTE}.startsWith('Live: last written')")
    # And one that is two hours fast.
    monkeypatch.setattr(page_module.time, "time", lambda: now + 7200)
    write_page(catalog)
    bucket.page = catalog.storage.read("index.html")
    assert open_page(browser, bucket).ask(NOTE).startswith("Live: last written 0 s ago")
