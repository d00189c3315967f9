"""What a server holds of the bodies of its clients, and for how long."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from hf_cloudtrain.serving import app
from hf_cloudtrain.serving.app import Limits, Service
from hf_cloudtrain.serving.user_code import UserCode

SIZE = 8 * 2**20
BODY = {"type": "http.request", "body": b" " * SIZE, "more_body": False}
GONE = {"type": "http.disconnect"}


class Code(UserCode):
    """Answers once it is let go."""

    def __init__(self) -> None:
        self.goes_on, self.works = threading.Event(), threading.Event()

    def answer(self, body: bytes, kind: str, accept: str) -> tuple[bytes, str]:
        self.works.set()
        self.goes_on.wait(120)
        return b"{}", kind


class Client:
    """One request, which sends what the test gives it."""

    def __init__(self, service: Service, *messages: dict[str, Any], length: int | None = None) -> None:
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.headers: dict[bytes, bytes] = {}
        self.status = 0
        for message in messages:
            self.send(dict(message))
        scope = {"type": "http", "method": "POST", "path": "/invocations", "query_string": b""}
        scope["headers"] = [(b"host", b"localhost")]
        if length is not None:
            scope["headers"].append((b"content-length", b"%d" % length))
        self.answered = asyncio.ensure_future(service.app(scope, self._messages.get, self._receive))

    def send(self, message: dict[str, Any]) -> None:
        self._messages.put_nowait(message)

    async def _receive(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])


def with_service(test: Callable[[Service, Code], Awaitable[None]], limits: Limits | None = None) -> None:
    code = Code()
    service = Service(code, limits or Limits(body=2 * SIZE), {}, "127.0.0.1")

    async def run() -> None:
        async with service._lifespan(service.app):
            try:
                await test(service, code)
            finally:
                code.goes_on.set()

    tracemalloc.start()
    try:
        asyncio.run(run())
    finally:
        tracemalloc.stop()


async def until(is_so: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not is_so():  # noqa: ASYNC110 - a thread has no event of asyncio
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), 30)


def held() -> float:
    """Bodies in memory."""
    return tracemalloc.get_traced_memory()[0] / SIZE


def test_a_body_is_in_memory_once_and_gone_after_its_answer() -> None:
    async def test(service: Service, code: Code) -> None:
        before = held()
        client = Client(service, {**BODY, "body": bytes(SIZE)})
        await until(code.works.is_set)
        assert service._held == SIZE
        assert held() - before < 1.5
        code.goes_on.set()
        await client.answered
        assert (client.status, service._held) == (200, 0)
        del client
        await until(lambda: held() - before < 0.5)

    with_service(test)


@pytest.mark.parametrize(("how", "status"), [("gone", 499), ("late", 504)])
def test_a_body_that_waits_is_gone_with_its_client_while_the_model_works(how: str, status: int) -> None:
    async def test(service: Service, code: Code) -> None:
        busy = Client(service, {**BODY, "body": b"1"})
        await until(code.works.is_set)
        before = held()
        client = Client(service, {**BODY, "body": bytes(SIZE)})
        await until(lambda: service._ready.waiting == 1)
        assert (service._held, held() - before > 0.9) == (SIZE + 1, True)
        if how == "gone":
            client.send(GONE)
        await client.answered
        assert client.status == status
        del client
        await until(lambda: held() - before < 0.5)
        assert service._held == (1 if how == "gone" else 0)
        code.goes_on.set()
        await busy.answered

    with_service(test, Limits(body=2 * SIZE, seconds=30.0 if how == "gone" else 1.0))


@pytest.mark.parametrize(("last", "status"), [(GONE, 499), (None, 408)], ids=["gone", "late"])
def test_half_a_body_is_gone_with_its_client(last: dict[str, Any] | None, status: int) -> None:
    async def test(service: Service, code: Code) -> None:
        client = Client(service, {**BODY, "more_body": True}, *([last] if last else []))
        await client.answered
        assert (client.status, service._held) == (status, 0)
        assert client.headers.get(b"connection") == (b"close" if status == 408 else None)

    with_service(test, Limits(body=2 * SIZE, seconds=0.2))


def test_a_body_that_will_not_fit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MOST_HELD", 2 * SIZE)

    async def test(service: Service, code: Code) -> None:
        first = Client(service, {**BODY, "body": bytes(2 * SIZE - 2)})
        await until(code.works.is_set)
        second = Client(service, {**BODY, "body": b"1", "more_body": True}, length=3)
        await until(second._messages.empty)
        assert service._held == 2 * SIZE - 2
        second.send({**BODY, "body": b"23"})
        await second.answered
        assert (second.status, second.headers.get(b"connection")) == (503, None)
        code.goes_on.set()
        await first.answered

    with_service(test)


@pytest.mark.parametrize("size", [3 * SIZE, 5 * SIZE])
def test_a_connection_is_closed_only_if_a_body_was_not_read(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(app, "READ_ANYWAY", 4 * SIZE)

    async def test(service: Service, code: Code) -> None:
        client = Client(
            service, *[{**BODY, "more_body": number < size} for number in range(SIZE, size + 1, SIZE)]
        )
        await client.answered
        assert (client.status, service._held) == (413, 0)
        assert client.headers.get(b"connection") == (b"close" if size > 4 * SIZE else None)

    with_service(test)
