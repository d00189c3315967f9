"""The metadata services of three clouds on one loopback port, as documented, with failures on request.

with MetadataServer() as server:
    source = Ec2(server.endpoint)
    server.reclaim("terminate", left=120)
    source.look()
"""

from __future__ import annotations

import json
import threading
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Reply(NamedTuple):
    status: int
    body: str = ""
    headers: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple's default; it is never changed


class MetadataServer:
    """Answers as EC2, GCE and Azure do. `asked` lists all requests: method, path, status."""

    def __init__(self) -> None:
        self.now = datetime.now(timezone.utc).replace(microsecond=0)
        """The service's clock, which does not advance."""
        self.dated = True
        """Whether an answer has a Date header."""
        self.tokens: set[str] = set()
        self.values: dict[str, str] = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.action: dict[str, Any] | None = None
        self.events: list[Any] = []
        self.name = "worker_3"
        self.instead: Reply | None = None
        """If set, the answer to all requests."""
        self.asked: list[tuple[str, str, int]] = []
        self._hung = threading.Event()
        self._hung.set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def reclaim(self, action: str, left: float) -> None:
        """EC2 reclaims its instance in `left` seconds."""
        self.action = {"action": action, "time": f"{self.now + timedelta(seconds=left):%Y-%m-%dT%H:%M:%SZ}"}

    def schedule(self, kind: str, *names: str, left: float | None = None) -> None:
        """Azure schedules an event for machines in `left` seconds; None: it has started."""
        later = "" if left is None else format_datetime(self.now + timedelta(seconds=left), usegmt=True)
        status = "Started" if left is None else "Scheduled"
        event = {
            "EventId": "1",
            "EventType": kind,
            "ResourceType": "VirtualMachine",
            "Resources": list(names),
        }
        self.events.append({**event, "EventStatus": status, "NotBefore": later})

    def hang(self) -> None:
        """Accept requests and answer none of them until `go_on`, or until the server ends."""
        self._hung.clear()

    def go_on(self) -> None:
        self._hung.set()

    def reply(self, method: str, path: str, headers: Any) -> Reply:
        self._hung.wait()
        if self.instead is not None:
            return self.instead
        if path.startswith("/latest/"):
            return self._ec2(method, path, headers)
        if path.startswith("/computeMetadata/v1/instance/"):
            return self._gce(path.rpartition("/")[2], headers)
        return self._azure(path, headers)

    def _ec2(self, method: str, path: str, headers: Any) -> Reply:
        if path == "/latest/api/token":
            if method != "PUT" or not headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").isdecimal():
                return Reply(400)
            token = f"token-{len(self.asked)}"
            self.tokens.add(token)  # earlier tokens stay valid
            return Reply(200, token)
        if headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return Reply(401)
        if path == "/latest/meta-data/spot/instance-action" and self.action is not None:
            return Reply(200, json.dumps(self.action))
        return Reply(404, "<html>")

    def _gce(self, key: str, headers: Any) -> Reply:
        if headers.get("Metadata-Flavor") != "Google":
            return Reply(403)
        if key not in self.values:
            return Reply(404)
        return Reply(200, self.values[key], {"Metadata-Flavor": "Google"})

    def _azure(self, path: str, headers: Any) -> Reply:
        if headers.get("Metadata") != "true" or "api-version=20" not in path:
            return Reply(400)
        if path.startswith("/metadata/scheduledevents?"):
            return Reply(200, json.dumps({"DocumentIncarnation": 1, "Events": self.events}))
        if path.startswith("/metadata/instance/compute/name?") and "format=text" in path:
            return Reply(200, self.name)
        return Reply(404)

    def __enter__(self) -> MetadataServer:  # noqa: PYI034 - typing.Self came with Python 3.11
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                reply = service.reply(self.command, self.path, self.headers)
                service.asked.append((self.command, urlsplit(self.path).path, reply.status))
                self.send_response_only(reply.status)
                if service.dated:
                    self.send_header("Date", format_datetime(service.now, usegmt=True))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body.encode())

            do_PUT = do_GET  # noqa: N815 - the names that http.server calls

            def log_message(self, *_: object) -> None: ...

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """The client has closed the connection."""

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
