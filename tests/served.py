"""The server of `cloudtrain ui` in a thread of the test, and a browser's view of it.

with Served([url]) as served:
    page = browser.open(served.url, 1280)
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterable
from typing import Any

from hf_cloudtrain.runtime.listening import listen
from hf_cloudtrain.ui import app
from tests.browser import Page

SHOWN = "document.documentElement.dataset.shown === 'yes'"
DRAWN = f"{SHOWN} && document.documentElement.dataset.drawn === 'yes'"


class Served:
    """The pages of some runs at a free port."""

    def __init__(self, urls: Iterable[str], token: str | None = None, **settings: Any) -> None:
        self.pages = app.Pages(urls)
        host = settings.pop("host", "127.0.0.1")
        listening = listen("127.0.0.1", 0)
        self.port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._listening = listening
        self._server = app.WebServer(app.Server(self.pages, host, token, **settings))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)

    def __enter__(self) -> Served:  # noqa: PYI034 - typing.Self came with Python 3.11
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._listening.close()
        assert not self._thread.is_alive()

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], str]:
        """Status, headers and text of an answer; `_` in the name of a header is a hyphen."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET" if body is None else "POST", path, body and json.dumps(body), named)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text

    def first(self, kind: str, what: str = "", **headers: str) -> dict[str, Any]:
        """The first document with content of a stream."""
        with Stream(self.port, kind, what, **headers) as stream:
            while stream.document.get("loading") and stream.document.get("trouble") is None:
                stream.next()
            return stream.document


class Stream:
    """A stream as a browser reads it."""

    def __init__(self, port: int, kind: str, what: str = "", variant: str = "", **headers: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request("GET", f"/api/stream/{kind}?id={what}&variant={variant}", headers=named)
        self._answer = self._connection.getresponse()
        self.document: dict[str, Any] = {}
        self.next()

    def __enter__(self) -> Stream:  # noqa: PYI034 - typing.Self came with Python 3.11
        return self

    def __exit__(self, *error: object) -> None:
        self._answer.close()
        self._connection.close()

    def next(self) -> str:
        """Read one message; its text."""
        while not (line := self._answer.readline().decode()).startswith("data: "):
            assert line, "the stream has ended"
        message = json.loads(line[6:])
        self.document = (
            message["document"] if "document" in message else applied(self.document, message["patch"])
        )
        return line

    def until(self, condition: Any, seconds: float = 20.0) -> float:
        """Read until the document fulfils a condition; how long it took."""
        began = time.monotonic()
        while not condition(self.document):
            assert time.monotonic() - began < seconds, self.document
            self.next()
        return time.monotonic() - began


def applied(value: Any, patch: dict[str, Any]) -> Any:
    """What `apply` in page.js does."""
    if "value" in patch:
        return patch["value"]
    if "keep" in patch:
        return [*value[: patch["keep"]], *patch["rest"]]
    for key, change in (patch.get("items") or patch.get("keys") or {}).items():
        index = int(key) if isinstance(value, list) else key
        before = value[index] if isinstance(value, list) else value.get(index)
        value[index] = applied(before, change)
    for key in patch.get("gone", ()):
        del value[key]
    return value


def go(page: Page, address: str) -> None:
    """Follow a link of the page, and wait until what it shows is there."""
    page.ask(f"document.documentElement.dataset.shown = ''; location.hash = {json.dumps(address)}")
    page.wait(SHOWN)
