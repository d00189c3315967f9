"""Feeds: one reader of storage for all browsers that show the same page, and none while no browser shows it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from hf_cloudtrain.errors import CloudTrainError
from hf_cloudtrain.report.page import shown
from hf_cloudtrain.runtime.patches import patch

SLOW_SECONDS = 4.0
"""Seconds after which a page says that the storage does not answer."""
RETRY_SECONDS = 5.0
"""Seconds until a source is read again after an error."""
LEAST_PAUSE = 0.2
"""Shortest pause between two turns, in seconds."""
WAIT_SECONDS = 1.0
"""That a follower waits for a turn: the threads are shared by all pages."""
ALIVE_SECONDS = 15.0
"""Between two messages without content: the server sees from a failed one that a browser is gone."""


class Source(Protocol):
    """What one page shows. A feed calls `turn` and `document` in threads, never two of them at the same time."""

    @property
    def version(self) -> int:
        """Changes whenever the document does."""

    def turn(self) -> float:
        """Read what is due; returns the seconds until the next turn."""

    def document(self, variant: str) -> dict[str, Any]:
        """What the page shows, as JSON; `variant` is a setting of the page."""


class Feed:
    """The versions of one page, for any number of browsers.

    Example:
        >>> async for text in Feed(source).follow("0.6"):
        ...     print(text)      # first the document, then patches
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._followers = 0
        self._reader: asyncio.Task[None] | None = None
        self._lock = threading.Lock()
        """Held while the source is used: the turn of a reader that was cancelled may still run."""
        self._version: int | None = None
        self._trouble: str | None = None
        self._known: tuple[object, dict[str, Any]] | None = None
        self._is_over = False
        self._told: object = None
        self._changed = asyncio.Event()
        """Of the next change; each change has its own."""

    @property
    def is_open(self) -> bool:
        """Whether any browser follows it."""
        return self._followers > 0

    def end(self) -> None:
        """End all streams."""
        self._is_over = True
        self._tell()

    async def follow(self, variant: str = "") -> AsyncGenerator[str, None]:
        """The document, and then each change of it, as JSON; the first follower starts the reader, the last one ends it.

        After some seconds without a change it yields "".
        """
        self._followers += 1
        self._reader = self._reader or asyncio.create_task(self._read())
        sent: dict[str, Any] | None = None
        try:
            while not self._is_over:
                changed = self._changed  # set by what happens from here on
                sent, text = await asyncio.to_thread(self._next, variant, sent)
                if text is not None:
                    yield text
                while not changed.is_set():
                    try:
                        await asyncio.wait_for(changed.wait(), ALIVE_SECONDS)
                    except asyncio.TimeoutError:
                        yield ""
        finally:
            self._followers -= 1
            if not self._followers and self._reader is not None:
                self._reader.cancel()
                self._reader = None

    async def _read(self) -> None:
        while True:
            began = time.monotonic()
            turn = asyncio.create_task(asyncio.to_thread(self._turn))
            while not (await asyncio.wait({turn}, timeout=SLOW_SECONDS))[0]:
                self._trouble = f"The storage has not answered for {time.monotonic() - began:.0f} s."
                self._tell()
            self._tell()
            pause, took = turn.result(), time.monotonic() - began
            is_short = took < pause and self._trouble is None
            await asyncio.sleep(max(min(pause, LEAST_PAUSE), pause - took) if is_short else pause)

    def _tell(self) -> None:
        told = self._version, self._trouble, self._is_over
        if told != self._told:
            self._told, changed, self._changed = told, self._changed, asyncio.Event()
            changed.set()

    def _turn(self) -> float:
        with self._lock:
            try:
                pause = self._source.turn()
                self._version, self._trouble = self._source.version, None
                return pause
            except CloudTrainError as error:
                self._trouble = shown(error)
            except Exception as error:  # noqa: BLE001 - of a client, say: the next turn tries again
                self._trouble = shown(f"{type(error).__name__}: {error}")
            return RETRY_SECONDS

    def _next(self, variant: str, sent: dict[str, Any] | None) -> tuple[dict[str, Any], str | None]:
        """The document, and the message that makes it of what was sent; no message where they are equal."""
        try:
            document = {**self._document(variant, sent), "trouble": self._trouble}
            if sent is None:
                return document, message(document=document)
            change = patch(sent, document)
            return document, None if change is None else message(patch=change)
        except Exception as error:  # noqa: BLE001 - a record of a form that was not foreseen
            document = {"gone": shown(f"The page cannot be built: {error}"), "trouble": self._trouble}
            return document, message(document=document)

    def _document(self, variant: str, sent: dict[str, Any] | None) -> dict[str, Any]:
        if self._version is None:
            return {"loading": True}
        known = self._known
        if known is None or known[0] != (variant, self._version):
            if not self._lock.acquire(timeout=WAIT_SECONDS):
                self._told = None  # so that the end of the turn wakes this follower, even without a change
                return sent or {"loading": True}
            try:
                known = self._known = (variant, self._version), self._source.document(variant)
            finally:
                self._lock.release()
        return known[1]


def message(**content: Any) -> str:
    """One message to a browser: JSON with the time here, as that of the browser may be wrong."""
    return json.dumps({**content, "now": time.time()}, allow_nan=False)
