"""What a server answers: SageMaker's `/ping` and `/invocations`, and `/metrics`; with limits of size and time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from hf_cloudtrain.runtime.listening import Doorkeeper, is_loopback
from hf_cloudtrain.serving.batching import Batcher
from hf_cloudtrain.serving.formats import MOST_ROWS, accepted, decode, encode, media_type
from hf_cloudtrain.serving.metrics import Metrics
from hf_cloudtrain.serving.models.predictor import Predictor, RowError
from hf_cloudtrain.serving.models.tasks import RequestError
from hf_cloudtrain.serving.user_code import UserCode

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

READ_ANYWAY = 256 * 2**20
"""Bytes of a body over the limit that are read and dropped, so that the client reads the answer and not a reset connection."""
MOST_HELD = 256 * 2**20
"""Bytes of all bodies that are read or wait for the model."""
GONE = 499
"""As nginx counts a request whose client has gone away. No client receives it."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    body: int = 6 * 2**20
    """Bytes of a body; SageMaker's own limit of a real-time endpoint was this for years."""
    seconds: float = 60.0
    """From the head of a request to its answer; SageMaker gives up after the same time."""
    batch: int = 64
    """Rows of a batch."""


class _Body(bytearray):
    """What has arrived of a body."""

    is_whole = False
    """Whether the client has sent all of it, also if it was dropped."""

    def take(self) -> bytes:
        """All of it, which is in memory once: it is empty afterwards."""
        data = bytes(self)
        self.clear()
        return data


class Service:
    """The application, and what its server asks it.

    Args:
        model: a loaded model, or the code of a checkpoint.
        facts: of the model, for `/metrics`.
        host: the address that the server listens on. Where only this machine reaches it, pages of other sites are refused.
    """

    def __init__(self, model: Predictor | UserCode, limits: Limits, facts: dict[str, str], host: str) -> None:
        self._model, self._limits = model, limits
        self._metrics = Metrics(facts)
        self._batcher: Batcher | None = None
        self._held = 0
        self.is_draining = False
        """Whether the server is about to stop: balancers send nothing new after `/ping` says so."""
        self.app = Starlette(
            routes=[
                Route("/ping", self._ping),
                Route("/invocations", self._invocations, methods=["POST"]),
                Route("/metrics", self._show_metrics),
            ],
            middleware=[Middleware(_guarded, Doorkeeper(host))] if is_loopback(host) else [],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        work, largest = (
            (self._model.answers, self._limits.batch)
            if isinstance(self._model, Predictor)
            else (self._code, 1)
        )
        self._batcher = Batcher(work, self._metrics, largest=largest, room=MOST_ROWS)
        self._metrics.waiting.set_function(lambda: self._ready.waiting)
        yield

    @property
    def _ready(self) -> Batcher:
        assert self._batcher is not None
        return self._batcher

    async def _ping(self, request: Request) -> Response:
        text = "stopping" if self.is_draining else "ok" if self._ready.is_alive else "the model has ended"
        return self._closing(PlainTextResponse(f"{text}\n", 200 if text == "ok" else 503))

    async def _show_metrics(self, request: Request) -> Response:
        return self._closing(Response(self._metrics.text(), media_type="text/plain; version=0.0.4"))

    async def _invocations(self, request: Request) -> Response:
        begun = time.perf_counter()
        response = await self._answered(request)
        self._metrics.requests.labels(response.status_code).inc()
        self._metrics.request_seconds.observe(time.perf_counter() - begun)
        return self._closing(response)

    def _closing(self, response: Response) -> Response:
        if self.is_draining:
            response.headers["connection"] = "close"
        return response

    async def _answered(self, request: Request) -> Response:
        body, size = _Body(), 0
        try:
            with anyio.fail_after(self._limits.seconds):
                kind = media_type(request.headers.get("content-type", ""))
                await self._read(request, body)
                size = len(body)
                work = self._predicted if isinstance(self._model, Predictor) else self._transformed
                content, kind = await work(request, body.take(), kind, request.headers.get("accept", ""))
                return Response(content, media_type=kind)
        except RequestError as error:
            return _refused(error.status, str(error), is_read=body.is_whole)
        except TimeoutError:
            status, what = (
                (504, "The model did not answer") if body.is_whole else (408, "The body did not arrive")
            )
            return _refused(status, f"{what} within the time of a request.")
        except ClientDisconnect:
            return _refused(GONE, "The client has gone away.")
        finally:
            self._held -= max(size, len(body))

    async def _read(self, request: Request, body: _Body) -> None:
        """Read a body. One that would not fit, by its size or by what it says of that, is dropped at once."""
        size, is_full, room = 0, False, max(MOST_HELD, self._limits.body)
        length = request.headers.get("content-length", "")
        coming = int(length) if length.isdecimal() else 0
        async for piece in request.stream():
            size += len(piece)
            is_full = is_full or self._held - len(body) + max(size, coming) > room
            if max(size, coming) <= self._limits.body and not is_full:
                body += piece
                self._held += len(piece)
                continue
            self._held -= len(body)
            body.clear()
            if size > READ_ANYWAY:
                break
        else:
            body.is_whole = True
        if size > self._limits.body:
            raise RequestError(f"The body is larger than the {self._limits.body} bytes that are read.", 413)
        if is_full:
            text = f"Too many request bodies are waiting (limit {room // 2**20} MB). Try again later."
            raise RequestError(text, 503)

    async def _predicted(self, request: Request, body: bytes, kind: str, accept: str) -> tuple[bytes, str]:
        assert isinstance(self._model, Predictor)
        accepted(accept)  # before the work
        asked = decode(body, kind, self._model.task)
        del body
        work = self._ready.answer(asked.rows, self._model.parameters(asked.parameters))
        del asked  # if the model does not answer in time, the rows go
        answers = await _while_there(request, work)
        failed = [answer for answer in answers if isinstance(answer, RowError)]
        self._metrics.rows.labels("answered").inc(len(answers) - len(failed))
        self._metrics.rows.labels("failed").inc(len(failed))
        if failed and len(failed) == len(answers):
            raise RequestError(failed[0].text, 400 if all(row.is_input for row in failed) else 500)
        return encode(answers, accept)

    async def _transformed(self, request: Request, body: bytes, kind: str, accept: str) -> tuple[bytes, str]:
        (answer,) = await _while_there(request, self._ready.answer([(body, kind, accept)], {}))
        if isinstance(answer, RequestError):
            raise answer
        content, kind = answer
        return content, kind

    def _code(self, requests: Sequence[tuple[bytes, str, str]], _: dict[str, Any]) -> list[Any]:
        """The answer of the code to one request, or its error."""
        assert isinstance(self._model, UserCode)
        try:
            return [self._model.answer(*requests[0])]
        except RequestError as error:
            return [error]
        except Exception as error:
            logger.exception("The code of the checkpoint failed.")
            text = f"The code of the checkpoint failed. {type(error).__name__}: {error}"
            return [RequestError(text[:500], 500)]


async def _while_there(request: Request, work: asyncio.Future[list[Any]]) -> list[Any]:
    """The result of the work; it is cancelled if the client goes away."""
    # The body is read, so the next message is the end of the connection.
    gone: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        gone.cancel()
        work.cancel()


def _refused(status: int, text: str, *, is_read: bool = False) -> Response:
    headers = {"retry-after": "1"} if status == 503 else {}
    if status in (408, 413, 503) and not is_read:  # what is left of a body would be read as the next request
        headers["connection"] = "close"
    return JSONResponse({"error": text}, status, headers)


def _guarded(app: ASGIApp, doorkeeper: Doorkeeper) -> ASGIApp:
    """The application behind a doorkeeper."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        refusal = doorkeeper.refusal(scope["headers"]) if scope["type"] == "http" else None
        await (app if refusal is None else _refused(403, refusal))(scope, receive, send)

    return answer
