"""Headless Chromium, driven over a pipe by the DevTools protocol: https://chromedevtools.github.io/devtools-protocol/

with Browser(folder) as browser:
    page = browser.open(path, width=390)
    assert page.complaints == []
    assert page.ask("document.title") == "mrpc"
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.servers import ServerMissingError, clean_environment, dies_with_us

INSTALL = "apt-get install chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome")
ANSWER_SECONDS = 60.0
"""A loaded machine takes many times the half second of a free one."""
QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"),
    *(
        "--no-first-run",
        "--no-default-browser-check",
        "--disable-extensions",
        "--disable-sync",
        "--disable-breakpad",
    ),
    *("--disable-background-networking", "--disable-component-update", "--disable-default-apps"),
    *("--disable-features=Translate,OptimizationHints,MediaRouter", "--proxy-server=127.0.0.1:9"),
    *("--hide-scrollbars", "--force-color-profile=srgb"),
)
"""Chromium stays on this machine: any request that it still makes goes to a proxy that does not exist."""


class Browser:
    """One Chromium with its own profile; pages are opened one after the other."""

    def __init__(self, folder: Path) -> None:
        found = next((path for path in map(shutil.which, NAMES) if path), None)
        if found is None:
            raise ServerMissingError(f"Chromium is not installed ({INSTALL})")
        self._program = found
        self._folder = folder
        self._calls = 0
        self._buffer = b""
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:  # noqa: PYI034 - typing.Self came with Python 3.11
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # It reads from descriptor 3 and writes to 4: a shell puts them there, after Popen has made its own.
        moved = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        profile = f"--user-data-dir={self._folder / 'profile'}"
        command = [self._program, *QUIET, "--remote-debugging-pipe", profile, "about:blank"]
        with open(self._folder / "chromium.log", "wb") as log:
            self._process = subprocess.Popen(
                [*dies_with_us(), "bash", "-c", moved, "bash", *command],
                pass_fds=(to_browser, from_browser),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=clean_environment(),
            )
        os.close(to_browser)
        os.close(from_browser)
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        os.close(self._write)
        os.close(self._read)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def open(self, path: Path | str, width: int, height: int = 900, *, dark: bool = False) -> Page:
        """Load a file or a URL in a window of that many CSS pixels; returns when its scripts have run."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=path if isinstance(path, str) else path.as_uri())
        page.wait("document.readyState === 'complete'")
        return page

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The answer to one call; events that arrive before it are kept."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._calls:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)
        raise RuntimeError(f"Chromium is gone:\n{self._log()}")

    def events(self, session: str, method: str) -> list[dict[str, Any]]:
        return [
            event["params"]
            for event in self._events
            if event.get("sessionId") == session and event.get("method") == method
        ]

    def _messages(self) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            while b"\0" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\0")
                yield json.loads(line)
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium is silent for {ANSWER_SECONDS:.0f} s:\n{self._log()}")
            data = os.read(self._read, 2**20)
            if not data:
                return
            self._buffer += data

    def _log(self) -> str:
        return (self._folder / "chromium.log").read_text(errors="replace")[-2000:]


class Page:
    """One page that is open."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    @property
    def complaints(self) -> list[str]:
        """Everything on the console: errors, warnings and other messages."""
        self.ask("1")  # reads the events up to now
        thrown = [
            event["exceptionDetails"]
            for event in self._browser.events(self._session, "Runtime.exceptionThrown")
        ]
        told = [event["args"] for event in self._browser.events(self._session, "Runtime.consoleAPICalled")]
        entries = [event["entry"] for event in self._browser.events(self._session, "Log.entryAdded")]
        return [json.dumps(item)[:1600] for item in (*thrown, *told, *entries)]

    @property
    def requests(self) -> list[str]:
        """URLs that it requested, including its own."""
        self.ask("1")
        sent = self._browser.events(self._session, "Network.requestWillBeSent")
        return [event["request"]["url"] for event in sent]

    def ask(self, expression: str) -> Any:
        """The value of an expression, or of its promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:600])
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while not self.ask(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression!r} stays false: {self.complaints}")
            time.sleep(0.05)

    def close(self) -> None:
        """Close the tab."""
        self.call("Page.close")

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """The page as a PNG: the whole of it, however long it is, or what the window shows."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)


def main(path: Path, width: int, picture: Path, scheme: str = "light") -> None:
    """python -m tests.browser report.html 390 picture.png [dark]: to see a page."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder)) as browser:
        page = browser.open(path.absolute(), width, dark=scheme == "dark")
        page.wait("document.documentElement.dataset.drawn === 'yes'")
        page.picture(picture)
        print(*page.complaints, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
