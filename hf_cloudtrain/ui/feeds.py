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
from hf_cloudtrain.ui.patches import patch

SLOW_SECONDS = 4.0
"""Seconds after which a page says that the storage does not answer."""
RETRY_SECONDS = 5.0
"""Seconds until a source is read again after an error."""
QUEUE = 50
"""Messages that wait for a slow browser; beyond, it receives the whole document again."""


class Source(Protocol):
    """What one page shows. A feed calls `turn` and `document` in a thread, never both at the same time."""

    @property
    def version(self) -> int:
        """Changes whenever the document does."""

    def turn(self) -> float:
        """Read what is due; returns the seconds until the next turn."""

    def document(self, variant: str) -> dict[str, Any]:
        """What the page shows, as JSON; `variant` is a setting of the page."""


class _View:
    def __init__(self) -> None:
        self.document: dict[str, Any] | None = None
        self.version: object = None
        self.queues: set[asyncio.Queue[str]] = set()

    def send(self, text: str) -> None:
        for queue in self.queues:
            if queue.full():
                while not queue.empty():
                    queue.get_nowait()
                text = message(document=self.document)
            queue.put_nowait(text)


class Feed:
    """The versions of one page, for any number of browsers.

    Example:
        >>> async for text in Feed(source).follow("0.6"):
        ...     print(text)      # first the document, then patches
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._views: dict[str, _View] = {}
        self._reader: asyncio.Task[None] | None = None
        self._turn_lock = threading.Lock()
        self._trouble: str | None = None
        self._version: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether any browser follows it."""
        return bool(self._views)

    async def follow(self, variant: str = "") -> AsyncGenerator[str, None]:
        """The document, and then each change of it, as JSON; the first follower starts the reader, the last one ends it."""
        queue: asyncio.Queue[str] = asyncio.Queue(QUEUE)
        view = self._views.setdefault(variant, _View())
        view.queues.add(queue)
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        try:
            if view.document is None and self._version is not None:  # a new variant of what is known
                view.document = await asyncio.to_thread(self._document, variant)
            yield message(document=view.document or {"loading": True})
            while True:
                yield await queue.get()
        finally:
            view.queues.discard(queue)
            if not view.queues:
                self._views.pop(variant, None)
            if not self._views and self._reader is not None:
                self._reader.cancel()
                self._reader = None

    async def _read(self) -> None:
        while True:
            began = time.monotonic()
            turn = asyncio.create_task(asyncio.to_thread(self._turn))
            while not (await asyncio.wait({turn}, timeout=SLOW_SECONDS))[0]:
                self._trouble = f"The storage has not answered for {time.monotonic() - began:.0f} s."
                await self._publish()
            pause = turn.result()
            await self._publish()
            await asyncio.sleep(pause)

    def _turn(self) -> float:
        with self._turn_lock:  # the turn of a reader that was cancelled may still run
            try:
                pause = self._source.turn()
                self._version, self._trouble = self._source.version, None
                return pause
            except CloudTrainError as error:
                self._trouble = shown(error)
            except Exception as error:  # noqa: BLE001 - of a client, say: the next turn tries again
                self._trouble = shown(f"{type(error).__name__}: {error}")
            return RETRY_SECONDS

    async def _publish(self) -> None:
        version = (self._version, self._trouble)
        for variant, view in list(self._views.items()):
            if view.version == version:
                continue
            before, view.version = view.document, version
            after = await asyncio.to_thread(self._document, variant)
            change = patch(before, after) if before else {"value": after}
            view.document = after
            if change is not None:
                view.send(message(patch=change))

    def _document(self, variant: str) -> dict[str, Any]:
        if self._version is None:
            return {"loading": True, "trouble": self._trouble}
        try:
            known = self._source.document(variant)
            message(document=known)  # a value that JSON does not know would end the reader
            return {**known, "trouble": self._trouble}
        except Exception as error:  # noqa: BLE001 - a record of a form that was not foreseen
            return {"gone": shown(f"The page cannot be built: {error}"), "trouble": self._trouble}


def message(**content: Any) -> str:
    """One message to a browser: JSON with the time here, as that of the browser may be wrong."""
    return json.dumps({**content, "now": time.time()}, allow_nan=False)
