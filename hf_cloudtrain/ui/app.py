"""The server: its routes, and how it listens."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_cloudtrain.errors import CloudTrainError, NoCheckpointError, NoJobError
from hf_cloudtrain.report import page
from hf_cloudtrain.report.page import check_extra_installed, plotly_script, shown
from hf_cloudtrain.ui import actions
from hf_cloudtrain.ui.feeds import Feed, Source, message
from hf_cloudtrain.ui.guard import Guard, content_policy
from hf_cloudtrain.ui.places import Places
from hf_cloudtrain.ui.runs import CompareSource, RunSource, RunsSource
from hf_cloudtrain.ui.store import DatasetsSource, JobSource, JobsSource

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

OURS, REPORT = Path(__file__).with_name("static"), Path(page.__file__).parent
FILES = {
    "page.html": (OURS / "page.html", "text/html"),
    "page.js": (OURS / "page.js", "text/javascript"),
    "page.css": (OURS / "page.css", "text/css"),
    "charts.js": (REPORT / "charts.js", "text/javascript"),
    "report.css": (REPORT / "page.css", "text/css"),
}
MOST_FEEDS = 12
"""Pages without a browser whose records stay in memory, so that going back is fast."""
MOST_BODY = 64 * 2**10
DETAILS_AT_ONCE = 4
ALIVE_SECONDS = 15.0
"""Between two empty lines of a stream: the server sees from a failed one that a browser is gone."""
GUESS_SECONDS = 0.5
"""That a wrong token costs."""
FRESH = {"cache-control": "no-store"}


class Pages:
    """The feeds of all pages, by what they show.

    Args:
        urls: of runs, or of folders with runs below them.
    """

    def __init__(self, urls: Iterable[str]) -> None:
        self.places = Places(urls)
        self.runs = RunsSource(self.places)
        self._feeds: dict[tuple[str, str], Feed] = {("runs", ""): Feed(self.runs)}

    def feed(self, kind: str, what: str) -> Feed:
        """The feed that all browsers of a page share. Raises NoCheckpointError, NoJobError, ConfigurationError."""
        key = (kind, what)
        found = self._feeds.pop(key, None) or Feed(self._source(kind, what))
        self._feeds[key] = found  # the last one that was used is the last one to go
        spare = [
            other
            for other, feed in list(self._feeds.items())  # other threads add to it
            if not feed.is_open and other not in (key, ("runs", ""))
        ]
        for other in spare[:-MOST_FEEDS]:
            self._feeds.pop(other, None)
        return found

    def _source(self, kind: str, what: str) -> Source:
        makers: dict[str, Callable[[], Source]] = {
            "run": lambda: RunSource(self.places, what),
            "compare": lambda: CompareSource(self.places, what.split("\n")),
            "jobs": lambda: JobsSource(self.places),
            "job": lambda: JobSource(self.places, what),
            "datasets": DatasetsSource,
        }
        if kind not in makers:
            raise NoCheckpointError(f"There is no page {kind[:40]!r}.")
        return makers[kind]()


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
        self._pages = pages
        self._reading, self._may_act = reading, may_act
        self._guard = Guard(host, token, reading, content_policy(plotly_script()))
        self._busy = asyncio.Semaphore(DETAILS_AT_ONCE)
        self._packed: bytes | None = None
        self.closing = asyncio.Event()
        """Set when all streams are to end."""

    @property
    def app(self) -> Starlette:
        """As an ASGI application."""
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.routing import Route

        routes = [
            Route("/", self.page),
            Route("/static/{name}", self.static),
            Route("/api/session", self.session, methods=["GET", "POST"]),
            Route("/api/details", self.details),
            Route("/api/act", self.act, methods=["POST"]),
            Route("/api/stream/{kind}", self.stream),
        ]
        return Starlette(routes=routes, middleware=[Middleware(self._guard.around)])

    async def page(self, request: Request) -> Response:
        """The page, without anything from storage."""
        return self._file(request, "page.html")

    async def static(self, request: Request) -> Response:
        """A script or a style."""
        return self._file(request, request.path_params["name"])

    async def stream(self, request: Request) -> Response:
        """The document of a page and its changes, as server-sent events."""
        from starlette.responses import StreamingResponse

        query, kind = request.query_params, request.path_params["kind"]
        try:
            feed = await asyncio.to_thread(self._pages.feed, kind, query.get("id", "")[:4_000])
            lines = self._lines(feed.follow(query.get("variant", "")[:20]))
        except (CloudTrainError, OSError) as error:
            lines = _lines_of_error(error)
        return StreamingResponse(lines, 200, {**FRESH, "x-accel-buffering": "no"}, "text/event-stream")

    async def details(self, request: Request) -> Response:
        """What a row of the list shows beside the heartbeat."""
        return await self._answer(self._pages.runs.details, request.query_params.get("id", ""))

    async def session(self, request: Request) -> Response:
        """What this browser may do; or the token in exchange for a cookie."""
        from starlette.responses import JSONResponse, Response

        if request.method == "GET":
            has = self._guard.has_token(request.scope)
            may = {"read": has or not self._reading, "act": self._may_act and has, "actions": self._may_act}
            return JSONResponse(may, 200, FRESH)
        given = (await _body(request)).get("token")
        cookie = self._guard.cookie(request.scope, given) if isinstance(given, str) else None
        if cookie is None:
            await asyncio.sleep(GUESS_SECONDS)
            return JSONResponse({"error": "The token is wrong."}, 401, FRESH)
        return Response(status_code=204, headers={**FRESH, "set-cookie": cookie})

    async def act(self, request: Request) -> Response:
        """An action; the guard has checked the token."""
        from starlette.responses import JSONResponse

        if not self._may_act:
            text = "Actions are off. `cloudtrain ui --actions` allows them."
            return JSONResponse({"error": text}, 403, FRESH)
        return await self._answer(actions.act, self._pages.places, await _body(request))

    async def _lines(self, messages: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html); JSON has no line breaks."""
        closing = asyncio.ensure_future(self.closing.wait())
        waiting: asyncio.Future[str] | None = None
        try:
            while not closing.done():
                waiting = waiting or asyncio.ensure_future(anext(messages))
                await asyncio.wait(
                    (waiting, closing), timeout=ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                yield f"data: {waiting.result()}\n\n" if waiting.done() else ": alive\n\n"
                waiting = None if waiting.done() else waiting
        finally:
            closing.cancel()
            if waiting is not None:
                waiting.cancel()
                await asyncio.wait((waiting,))
            await messages.aclose()

    async def _answer(self, call: Callable[..., dict[str, Any]], *given: Any) -> Response:
        from starlette.responses import JSONResponse

        try:
            async with self._busy:
                return JSONResponse(await asyncio.to_thread(call, *given), 200, FRESH)
        except (CloudTrainError, OSError) as error:
            status = 404 if isinstance(error, (NoCheckpointError, NoJobError)) else 400
            return JSONResponse({"error": shown(error)}, status, FRESH)

    def _file(self, request: Request, name: str) -> Response:
        from starlette.responses import Response

        if name == "plotly.js":
            headers = {"cache-control": "max-age=86400", "vary": "accept-encoding"}
            if "gzip" not in request.headers.get("accept-encoding", ""):
                return Response(plotly_script(), 200, headers, "text/javascript")
            self._packed = self._packed or gzip.compress(plotly_script().encode(), 4, mtime=0)
            return Response(self._packed, 200, {**headers, "content-encoding": "gzip"}, "text/javascript")
        if name not in FILES:
            return Response("There is no such file.", 404, media_type="text/plain")
        path, kind = FILES[name]
        return Response(path.read_bytes(), 200, {"cache-control": "no-cache"}, kind)


def web_server(server: Server) -> uvicorn.Server:
    """What answers; `run(sockets=[…])` returns after Ctrl-C."""
    import uvicorn

    class EndsStreams(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            server.closing.set()  # it would wait for browsers that never hang up
            await super().shutdown(sockets)

    return EndsStreams(
        uvicorn.Config(server.app, log_level="warning", access_log=False, lifespan="off", ws="none")
    )


def check_installed() -> None:
    """Raise MissingExtraError where a package is missing."""
    check_extra_installed("The web page", "ui", "starlette", "uvicorn", "plotly")


async def _lines_of_error(error: Exception) -> AsyncGenerator[str, None]:
    yield f"retry: 60000\ndata: {message(document={'gone': shown(error)})}\n\n"


async def _body(request: Request) -> dict[str, Any]:
    """A JSON object; an empty one for anything else, which no answer accepts."""
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MOST_BODY:
            return {}
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}
