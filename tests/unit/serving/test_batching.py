"""Rows of many requests in shared batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from hf_cloudtrain.serving.batching import Batcher
from hf_cloudtrain.serving.metrics import Metrics
from hf_cloudtrain.serving.models.predictor import RowError
from hf_cloudtrain.serving.models.tasks import RequestError


class Model:
    """Answers with the row in capitals; holds its first batch until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.holds = threading.Event()
        self.works = threading.Event()

    def __call__(self, rows: Sequence[Any], parameters: dict[str, Any]) -> list[Any]:
        self.batches.append(list(rows))
        self.works.set()
        self.holds.wait(30)
        if "crash" in rows:
            raise RuntimeError("crash")
        return [row.upper() for row in rows]

    async def is_working(self) -> None:
        await asyncio.to_thread(self.works.wait, 30)


def with_batcher(test: Callable[[Model, Batcher], Any], **how: int) -> Model:
    model = Model()

    async def run() -> None:
        batcher = Batcher(model, Metrics({}), **{"largest": 4, "room": 100, **how})
        await test(model, batcher)

    asyncio.run(run())
    return model


async def turn() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_what_arrives_while_the_model_works_is_one_batch() -> None:
    async def test(model: Model, batcher: Batcher) -> None:
        first = asyncio.ensure_future(batcher.answer(["a"], {}))
        await model.is_working()
        others = [asyncio.ensure_future(batcher.answer([row], {})) for row in "bcd"]
        await turn()
        model.holds.set()
        assert await first == ["A"]
        assert [await other for other in others] == [["B"], ["C"], ["D"]]

    assert with_batcher(test).batches == [["a"], ["b", "c", "d"]]


def test_a_large_request_does_not_hold_up_a_small_one() -> None:
    async def test(model: Model, batcher: Batcher) -> None:
        blocker = asyncio.ensure_future(batcher.answer(["x"], {}))
        await model.is_working()
        large = asyncio.ensure_future(batcher.answer(list("abcdefgh"), {}))
        small = asyncio.ensure_future(batcher.answer(["s"], {}))
        await turn()
        model.holds.set()
        assert await small == ["S"]
        assert await large == list("ABCDEFGH")
        await blocker

    assert with_batcher(test).batches == [["x"], ["a", "s", "b", "c"], ["d", "e", "f", "g"], ["h"]]


def test_a_large_request_does_not_hold_up_a_small_one_with_other_parameters() -> None:
    async def test(model: Model, batcher: Batcher) -> None:
        blocker = asyncio.ensure_future(batcher.answer(["x"], {}))
        await model.is_working()
        large = asyncio.ensure_future(batcher.answer(list("abcdefghij"), {"k": 1}))
        second = asyncio.ensure_future(batcher.answer(list("klmno"), {"k": 1}))
        small = asyncio.ensure_future(batcher.answer(["s"], {"k": 2}))
        await turn()
        model.holds.set()
        assert await small == ["S"]
        assert await large == list("ABCDEFGHIJ")
        assert await second == list("KLMNO")
        await blocker

    batches = with_batcher(test).batches
    assert batches[:4] == [["x"], ["a", "k", "b", "l"], ["s"], ["c", "m", "d", "n"]]


def test_rows_with_different_parameters_share_no_batch() -> None:
    async def test(model: Model, batcher: Batcher) -> None:
        blocker = asyncio.ensure_future(batcher.answer(["x"], {}))
        await model.is_working()
        asked = [
            batcher.answer(["a"], {"k": 1}),
            batcher.answer(["b"], {"k": 2}),
            batcher.answer(["c"], {"k": 1}),
        ]
        waiting = asyncio.gather(*asked)
        await turn()
        model.holds.set()
        assert await waiting == [["A"], ["B"], ["C"]]
        await blocker

    assert with_batcher(test).batches == [["x"], ["a", "c"], ["b"]]


def test_the_rows_of_a_client_that_went_away_are_dropped() -> None:
    async def test(model: Model, batcher: Batcher) -> None:
        blocker = asyncio.ensure_future(batcher.answer(["x"], {}))
        await model.is_working()
        gone = asyncio.ensure_future(batcher.answer(["a", "b"], {}))
        there = asyncio.ensure_future(batcher.answer(["c"], {}))
        await turn()
        assert batcher.waiting == 3
        gone.cancel()
        await turn()
        assert batcher.waiting == 1  # at once, although the model still works
        model.holds.set()
        assert await there == ["C"]
        await blocker

    assert with_batcher(test).batches == [["x"], ["c"]]


def test_a_request_is_refused_when_too_many_rows_wait() -> None:
    async def test(model: Model, batcher: Batcher) -> None:
        blocker = asyncio.ensure_future(batcher.answer(["x"], {}))
        await model.is_working()
        waiting = asyncio.ensure_future(batcher.answer(list("abcd"), {}))
        await turn()
        assert batcher.waiting == 4
        with pytest.raises(RequestError, match="Too many rows wait") as caught:
            batcher.answer(["e"], {})
        assert caught.value.status == 503
        model.holds.set()
        assert (await blocker, await waiting) == (["X"], list("ABCD"))

    with_batcher(test, room=4)


def test_a_model_that_crashes_answers_with_errors_and_works_on() -> None:
    async def test(model: Model, batcher: Batcher) -> None:
        model.holds.set()
        (error,) = await batcher.answer(["crash"], {})
        assert error == RowError("The server failed; its log says why.", is_input=False)
        assert await batcher.answer(["a"], {}) == ["A"]
        assert batcher.is_alive

    with_batcher(test)


def test_rows_that_failed_while_they_were_read_stay_in_their_place() -> None:
    async def test(model: Model, batcher: Batcher) -> None:
        model.holds.set()
        error = RowError("no", is_input=True)
        assert await batcher.answer(["a", error, "b"], {}) == ["A", error, "B"]
        assert await batcher.answer([error], {}) == [error]
        assert await batcher.answer([], {}) == []

    with_batcher(test)
