"""The server: its routes, and how it listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from hf_cloudtrain.errors import CloudTrainError, ConfigurationError, NoCheckpointError, NoJobError
from hf_cloudtrain.report import page
from hf_cloudtrain.report.page import packed_plotly, plotly_script, shown
from hf_cloudtrain.ui import actions
from hf_cloudtrain.ui.feeds import Feed, Source, message
from hf_cloudtrain.ui.guard import Guard, content_policy
from hf_cloudtrain.ui.places import Places
from hf_cloudtrain.ui.runs import CompareSource, RunSource, RunsSource
from hf_cloudtrain.ui.store import DatasetsSource, JobSource, JobsSource

if TYPE_CHECKING:
    from starlette.requests import Request

logger = logging.getLogger(__name__)

OURS, REPORT = Path(__file__).with_name("static"), Path(page.__file__).parent
FILES = {path.name: path for path in (*OURS.iterdir(), REPORT / "charts.js", REPORT / "page.css")}
MOST_FEEDS = 12
"""Pages whose records stay in memory without a browser, so that going back is fast."""
MOST_BODY = 64 * 2**10
DETAILS_AT_ONCE = 4
THREADS = 64
GUESS_SECONDS = 0.5
"""That a wrong token costs."""


class Pages:
    """The feeds of all pages, by what they show.

    Args:
        urls: of runs, or of folders with runs below them.
    """

    def __init__(self, urls: Iterable[str]) -> None:
        self.places = Places(urls)
        self.runs = RunsSource(self.places)
        self._feeds: WeakValueDictionary[tuple[str, str], Feed] = WeakValueDictionary()
        self._recent: deque[Feed] = deque(maxlen=MOST_FEEDS)
        self._sources: dict[str, Callable[[str], Source]] = {
            "runs": lambda what: self.runs,
            "run": lambda what: RunSource(self.places, what),
            "compare": lambda what: CompareSource(self.places, what.split("\n")),
            "jobs": lambda what: JobsSource(self.places),
            "job": lambda what: JobSource(self.places, what),
            "datasets": lambda what: DatasetsSource(),
        }

    def feed(self, kind: str, what: str) -> Feed:
        """The feed that all browsers of a page share. Raises NoCheckpointError, NoJobError, ConfigurationError."""
        if kind not in self._sources:
            raise NoCheckpointError(f"There is no page {kind[:40]!r}.")
        key = (kind, what if kind in ("run", "compare", "job") else "")
        found = self._feeds.get(key) or Feed(self._sources[kind](what))
        found = self._feeds.setdefault(key, found)  # a different thread may have been first
        with contextlib.suppress(ValueError):
            self._recent.remove(found)
        self._recent.append(found)
        return found

    def end(self) -> None:
        """End all streams."""
        for feed in list(self._feeds.values()):
            feed.end()


class Server:
    """The answers to requests.

    Args:
        pages: what is shown.
        host: the address that the server listens on.
        token: what a browser needs for actions, and for reading if `reading`; None without either.
        reading: whether reading needs the token as well.
        may_act: whether actions are answered.
    """

    def __init__(
        self, pages: Pages, host: str, token: str | None, *, reading: bool = False, may_act: bool = False
    ) -> None:
        self.pages = pages
        self._reading, self._may_act = reading, may_act
        self._guard = Guard(host, token, reading, content_policy(plotly_script()))
        self._busy = asyncio.Semaphore(DETAILS_AT_ONCE)

    @property
    def app(self) -> Starlette:
        """As an ASGI application."""
        routes = [
            Route("/", self.file),
            Route("/static/{name}", self.file),
            Route("/api/session", self.session, methods=["GET", "POST"]),
            Route("/api/details", self.details),
            Route("/api/act", self.act, methods=["POST"]),
            Route("/api/stream/{kind}", self.stream),
        ]
        return Starlette(routes=routes, middleware=[Middleware(self._guard.around)])

    async def file(self, request: Request) -> Response:
        """The page, a script or a style: nothing from storage."""
        name = request.path_params.get("name", "page.html")
        if name == "plotly.js":
            headers = {"cache-control": "max-age=86400", "content-encoding": "gzip"}
            return Response(packed_plotly(), 200, headers, "text/javascript")
        if name not in FILES:
            return PlainTextResponse("There is no such file.", 404)
        return FileResponse(FILES[name], headers={"cache-control": "no-cache"})

    async def stream(self, request: Request) -> Response:
        """The document of a page and its changes, as server-sent events."""
        query, kind = request.query_params, request.path_params["kind"]
        try:
            feed = await asyncio.to_thread(self.pages.feed, kind, query.get("id", "")[:4_000])
        except (CloudTrainError, OSError) as error:
            is_final = isinstance(error, (NoCheckpointError, NoJobError, ConfigurationError))
            gone = f"retry: 5000\ndata: {message(document={'gone': shown(error)}, final=is_final)}\n\n"
            return Response(gone, media_type="text/event-stream")
        lines = _lines(feed, query.get("variant", "")[:20])
        return StreamingResponse(lines, 200, {"x-accel-buffering": "no"}, "text/event-stream")

    async def details(self, request: Request) -> Response:
        """What a row of the list shows beside the heartbeat."""
        async with self._busy:
            return await self._answer(self.pages.runs.details, request.query_params.get("id", ""))

    async def session(self, request: Request) -> Response:
        """What this browser may do; or the token in exchange for a cookie."""
        if request.method == "GET":
            has = self._guard.has_token(request)
            may = {"read": has or not self._reading, "act": self._may_act and has, "actions": self._may_act}
            return JSONResponse(may)
        given = (await _body(request)).get("token")
        cookie = self._guard.cookie(request, given) if isinstance(given, str) else None
        if cookie is None:
            await asyncio.sleep(GUESS_SECONDS)
            return JSONResponse({"error": "The token is wrong."}, 401)
        return Response(status_code=204, headers={"set-cookie": cookie})

    async def act(self, request: Request) -> Response:
        """An action; the guard has checked the token."""
        if not self._may_act:
            return JSONResponse({"error": "Actions are off. `cloudtrain ui --actions` allows them."}, 403)
        return await self._answer(actions.act, self.pages.places, await _body(request))

    async def _answer(self, call: Callable[..., dict[str, Any]], *given: Any) -> Response:
        try:
            return JSONResponse(await asyncio.to_thread(call, *given))
        except (CloudTrainError, OSError) as error:
            status = 404 if isinstance(error, (NoCheckpointError, NoJobError)) else 400
            return JSONResponse({"error": shown(error)}, status)
        except Exception as error:  # a record with an unexpected structure
            logger.debug("A request failed.", exc_info=True)
            return JSONResponse({"error": shown(f"{type(error).__name__}: {error}")}, 500)


class WebServer(uvicorn.Server):
    """Answers until Ctrl-C: `run(sockets=[…])`."""

    def __init__(self, server: Server) -> None:
        super().__init__(
            uvicorn.Config(server.app, log_level="warning", access_log=False, lifespan="off", ws="none")
        )
        self._pages = server.pages

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As it is, with more threads, so that pages that wait for a storage do not block the others."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As it is, after the streams have ended: it would wait for browsers that never hang up."""
        self._pages.end()
        await super().shutdown(sockets)


async def _lines(feed: Feed, variant: str) -> AsyncGenerator[str, None]:
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html); JSON has no line breaks."""
    async with contextlib.aclosing(feed.follow(variant)) as messages:
        async for text in messages:
            yield f"data: {text}\n\n" if text else ": alive\n\n"


async def _body(request: Request) -> dict[str, Any]:
    """A JSON object; an empty one for anything else, which no answer accepts."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MOST_BODY:
            return {}
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(data)
        return found if isinstance(found, dict) else {}
    return {}
