"""Feeds: what a follower gets while a turn does not end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from typing import Any

import pytest

from hf_cloudtrain.errors import StorageUnavailableError
from hf_cloudtrain.ui import feeds
from hf_cloudtrain.ui.feeds import Feed


class Slow:
    """A source whose second turn ends when the test lets it."""

    version = 1

    def __init__(self) -> None:
        self.turns = 0
        self.is_in_turn, self.may_end = threading.Event(), threading.Event()

    def turn(self) -> float:
        self.turns += 1
        if self.turns == 2:
            self.is_in_turn.set()
            assert self.may_end.wait(60.0)
        return 0.0 if self.turns == 1 else 60.0

    def document(self, variant: str) -> dict[str, Any]:
        return {"variant": variant}


def test_a_follower_does_not_wait_for_a_turn_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "WAIT_SECONDS", 0.01)
    source = Slow()

    async def follow() -> list[dict[str, Any]]:
        feed = Feed(source)
        async with contextlib.aclosing(feed.follow("a")) as first:
            await anext(first)
            assert await asyncio.to_thread(source.is_in_turn.wait, 60.0)
            async with contextlib.aclosing(feed.follow("b")) as second:
                try:
                    found = [json.loads(await asyncio.wait_for(anext(second), 30.0))]
                finally:
                    source.may_end.set()
                while "patch" not in found[-1]:
                    found.append(json.loads(await asyncio.wait_for(anext(second), 30.0)))
                return found

    found = asyncio.run(follow())
    assert found[0]["document"]["loading"]
    assert "b" in json.dumps(found[-1]["patch"]), "the end of the turn brings the document"


def test_the_time_of_a_turn_is_part_of_its_pause_unless_it_is_slow_or_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a page is as fresh as it says, and a slow storage, or one that fails, is not asked without a pause."""
    now, slept, turns = [0.0], list[float](), [0.3, 1.4, 4.0, 0.3]

    class Timed:
        version = 1

        def turn(self) -> float:
            now[0] += turns[len(slept)]
            if len(slept) == 3:
                raise StorageUnavailableError("The storage does not answer.")
            return 1.5

        def document(self, variant: str) -> dict[str, Any]:
            return {}

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == len(turns):
            raise asyncio.CancelledError

    async def read() -> None:
        feed = Feed(Timed())
        monkeypatch.setattr(feeds.time, "monotonic", lambda: now[0])
        monkeypatch.setattr(feeds.asyncio, "sleep", sleep)
        with contextlib.suppress(asyncio.CancelledError):
            await feed._read()

    asyncio.run(read())
    assert slept == pytest.approx([1.2, feeds.LEAST_PAUSE, 1.5, feeds.RETRY_SECONDS])
