"""What a server answers: SageMaker's `/ping` and `/invocations`, and `/metrics`; with limits of size and time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_cloudtrain.errors import MissingExtraError
from hf_cloudtrain.serving.batching import Batcher, BusyError
from hf_cloudtrain.serving.formats import UnknownTypeError, accepted, decode, encode, media_type
from hf_cloudtrain.serving.metrics import Metrics
from hf_cloudtrain.serving.predictor import Predictor, RowError
from hf_cloudtrain.serving.tasks import InputError
from hf_cloudtrain.serving.user_code import UserCode

try:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ModuleNotFoundError:
    raise MissingExtraError(
        "starlette is not installed, which a server needs: pip install 'hf_cloudtrain[serve]'"
    ) from None

logger = logging.getLogger(__name__)

READ_ANYWAY = 256 * 2**20
"""Bytes of a body over the limit that are read and dropped, so that the client reads the answer and not a reset connection."""
ROOM = 10_000
"""Rows that may wait for the model."""
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


class Refusal(Exception):  # noqa: N818 - it is an answer
    """A request that is not answered with predictions."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Service:
    """The application, and what its server asks it.

    Args:
        model: a loaded model, or the code of a checkpoint.
        facts: of the model, for `/metrics`.
    """

    def __init__(self, model: Predictor | UserCode, limits: Limits, facts: dict[str, str]) -> None:
        self._model, self._limits = model, limits
        self._metrics = Metrics(facts)
        self._batcher: Batcher | None = None
        self.is_draining = False
        """Whether the server is about to stop: balancers send nothing new after `/ping` says so."""
        self.app = Starlette(
            routes=[
                Route("/ping", self._ping),
                Route("/invocations", self._invocations, methods=["POST"]),
                Route("/metrics", self._show_metrics),
            ],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        work, largest = (
            (self._model.answers, self._limits.batch)
            if isinstance(self._model, Predictor)
            else (self._code, 1)
        )
        self._batcher = Batcher(work, self._metrics, largest=largest, room=ROOM)
        yield

    async def _ping(self, request: Request) -> Response:
        is_well = self._batcher is None or self._batcher.is_alive
        text = "stopping" if self.is_draining else "ok" if is_well else "the model has ended"
        return self._closing(PlainTextResponse(f"{text}\n", 200 if text == "ok" else 503))

    async def _show_metrics(self, request: Request) -> Response:
        text = self._metrics.text(self._batcher.waiting if self._batcher else 0)
        return self._closing(PlainTextResponse(text, media_type="text/plain; version=0.0.4"))

    async def _invocations(self, request: Request) -> Response:
        begun = time.perf_counter()
        response = await self._answered(request)
        self._metrics.request(response.status_code, time.perf_counter() - begun)
        return self._closing(response)

    def _closing(self, response: Response) -> Response:
        if self.is_draining:
            response.headers["connection"] = "close"
        return response

    async def _answered(self, request: Request) -> Response:
        deadline = time.monotonic() + self._limits.seconds
        try:
            kind = media_type(request.headers.get("content-type", ""))
            accept = request.headers.get("accept", "")
            body = await _in_time(self._body(request), deadline, 408, "The body did not arrive")
            work = self._predicted if isinstance(self._model, Predictor) else self._transformed
            content, kind, status = await _in_time(
                _while_there(request, work(body, kind, accept)), deadline, 504, "The model did not answer"
            )
            return Response(content, status, media_type=kind)
        except UnknownTypeError as error:
            return _refused(415, str(error))
        except InputError as error:
            return _refused(400, str(error))
        except BusyError:
            return _refused(503, "Too many rows wait. Try again.", {"retry-after": "1"})
        except Refusal as refusal:
            # What is left of a body would be read as the next request.
            headers = {"connection": "close"} if refusal.status in (408, 413) else {}
            return _refused(refusal.status, str(refusal), headers)
        except ClientDisconnect:
            return _refused(GONE, "The client has gone away.")

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        size = 0
        async for piece in request.stream():
            size += len(piece)
            if size <= self._limits.body:
                body += piece
            elif size > READ_ANYWAY:
                break
        if size > self._limits.body:
            raise Refusal(413, f"The body is larger than the {self._limits.body} bytes that are read.")
        return bytes(body)

    async def _predicted(self, body: bytes, kind: str, accept: str) -> tuple[bytes, str, int]:
        assert isinstance(self._model, Predictor)
        assert self._batcher is not None
        accepted(accept)  # before the work
        asked = decode(body, kind, self._model.task)
        answers = await self._batcher.answer(asked.rows, self._model.parameters(asked.parameters))
        failed = [answer for answer in answers if isinstance(answer, RowError)]
        self._metrics.rows(len(answers) - len(failed), len(failed))
        if failed and len(failed) == len(answers):
            raise Refusal(400 if all(row.is_input for row in failed) else 500, failed[0].text)
        return (*encode(answers, accept), 200)

    async def _transformed(self, body: bytes, kind: str, accept: str) -> tuple[bytes, str, int]:
        assert self._batcher is not None
        (answer,) = await self._batcher.answer([(body, kind, accept)], {})
        if isinstance(answer, Exception):
            raise answer
        return (*answer, 200)

    def _code(self, requests: Sequence[tuple[bytes, str, str]], _: dict[str, Any]) -> list[Any]:
        """The answer of the code to one request, or its error."""
        assert isinstance(self._model, UserCode)
        try:
            return [self._model.answer(*requests[0])]
        except InputError as error:
            return [error]
        except Exception as error:
            logger.exception("The code of the checkpoint failed.")
            text = f"The code of the checkpoint failed. {type(error).__name__}: {error}"
            return [Refusal(500, text[:500])]


async def _in_time(work: Awaitable[Any], deadline: float, status: int, what: str) -> Any:
    try:
        return await asyncio.wait_for(work, max(0.0, deadline - time.monotonic()))
    except asyncio.TimeoutError:
        raise Refusal(status, f"{what} within the time of a request.") from None


async def _while_there(request: Request, work: Awaitable[Any]) -> Any:
    """The result of the work; it is cancelled if the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(
        request.receive()
    )  # the body is read, so the next message is the end of the connection
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


def _refused(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": text}, status, headers)
