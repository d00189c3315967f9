"""A recording HTTP proxy in front of a test server: what did a client send, and what if the answer had been another?

    with Proxy(server.endpoint) as proxy:
        proxy.rules.append(lost_answer("PUT"))         # stored, but the client hears 500
        Storage(url, {**server.storage_options, "endpoint_url": proxy.endpoint}).write("a", b"1")
        assert [call.method for call in proxy.calls] == ["PUT", "PUT"]

Without a target it answers by its rules alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http
import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "date", "server"}
TIMEOUT = 30.0


@dataclass
class Answer:
    status: int
    """0 hangs up without an answer."""
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    promised: int | None = None
    """Content-Length where it is more than the body has: the connection ends before the rest."""


@dataclass
class Call:
    """One request as it arrived, and the status it got."""

    method: str
    path: str
    headers: dict[str, str]
    """By lower-case name."""
    size: int
    """Bytes of the body."""
    status: int = 0
    sent: int = 0
    """Bytes of the answer's body."""

    @property
    def access_key(self) -> str:
        """Whose signature it bears; empty where it has none."""
        return self.headers.get("authorization", "").partition("Credential=")[2].partition("/")[0]

    @property
    def native(self) -> bool:
        """Whether obstore sent it."""
        return "object_store" in self.headers.get("user-agent", "")


Forward = Callable[[], Answer]
Rule = Callable[[Call, Forward], "Answer | None"]
"""Given the call and what would forward it, the answer to send; None leaves it to the next rule."""


class Proxy:
    """A thread a connection, on a free loopback port."""

    def __init__(self, target: str | None = None) -> None:
        self.calls: list[Call] = []
        self.rules: list[Rule] = []
        self._target = target
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.proxy = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="proxy", daemon=True
        )

    def __enter__(self) -> Proxy:  # noqa: PYI034 - typing.Self came with Python 3.11
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(TIMEOUT)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, call: Call, body: bytes) -> Answer:
        self.calls.append(call)

        def forward() -> Answer:
            return self._forward(call, body)

        answers = (rule(call, forward) for rule in list(self.rules))
        answer = next((answer for answer in answers if answer is not None), None) or forward()
        call.status, call.sent = answer.status, len(answer.body)
        return answer

    def _forward(self, call: Call, body: bytes) -> Answer:
        if self._target is None:
            return Answer(501)
        connection = http.client.HTTPConnection(self._target.removeprefix("http://"), timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.putrequest(call.method, call.path, skip_host=True, skip_accept_encoding=True)
            for name, value in call.headers.items():  # the Host header too: it is signed
                if name not in HOP_BY_HOP | {"expect"}:
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            headers = {name: value for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP}
            return Answer(response.status, response.read(), headers)


def once(answer: Answer, method: str, path: str = "") -> Rule:
    """The first request with this method and this text in its path is not served, but answered so."""
    return _first(method, path, lambda _: answer)


def lost_answer(method: str, path: str = "") -> Rule:
    """The first such request is served, but the client hears an error."""

    def serve(forward: Forward) -> Answer:
        served = forward()
        assert served.status < 300, served
        return Answer(500)

    return _first(method, path, serve)


def cut_short(method: str, path: str = "") -> Rule:
    """The first such request is answered by half, and the connection ends."""

    def serve(forward: Forward) -> Answer:
        whole = forward()
        assert whole.body
        return dataclasses.replace(whole, body=whole.body[: len(whole.body) // 2], promised=len(whole.body))

    return _first(method, path, serve)


def _first(method: str, path: str, answer: Callable[[Forward], Answer]) -> Rule:
    seen: list[Call] = []

    def rule(call: Call, forward: Forward) -> Answer | None:
        if seen or call.method != method or path not in call.path:
            return None
        seen.append(call)
        return answer(forward)

    return rule


def s3_error(status: int, code: str, **headers: str) -> Answer:
    """An error as S3 words it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    return Answer(status, body, {"Content-Type": "application/xml", **headers})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        call = Call(self.command, self.path, headers, len(body))
        answer = self.server.proxy.answer(call, body)  # type: ignore[attr-defined]
        if not answer.status:
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        shown = answer.headers.get("Content-Length") if self.command == "HEAD" else None
        if answer.status != http.HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", shown or str(answer.promised or len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
        self.close_connection = self.close_connection or answer.promised is not None

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815 - the base class calls them so

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle_one_request()
            return
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
