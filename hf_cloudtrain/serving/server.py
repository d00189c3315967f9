"""The HTTP server: uvicorn, with a port that is taken before the model is loaded, and an end that loses no request.

SIGTERM -> /ping says 503, each answer closes its connection -> what has connected is still accepted -> the port is closed
        -> what is under way is answered -> exit code 0
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from hf_cloudtrain.runtime.listening import BACKLOG
from hf_cloudtrain.serving.app import Limits, Service

KEEP_ALIVE = 15
"""Seconds that a connection may be idle, and that the head of a request may take."""
LAME_DUCK = 3.0
"""Seconds after SIGTERM in which clients with open connections still get answers, each with the advice to close."""
SO_ATTACH_FILTER = 26
"""Of Linux's <asm-generic/socket.h>; Python's `socket` does not name it."""
DROP_SYN = (
    (0x30, 0, 0, 13),
    (0x54, 0, 0, 0x12),
    (0x15, 0, 1, 0x02),
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 0xFFFFFFFF),
)
"""Of the flags in byte 13, SYN without ACK: drop; else keep."""
HANDSHAKE = 0.2
"""Seconds in which a connection that is half open may be completed."""


class Server(uvicorn.Server):
    """See the module.

    Args:
        on_ready: called when requests are answered, and a signal is.
    """

    def __init__(self, service: Service, limits: Limits, on_ready: Callable[[], object]) -> None:
        super().__init__(
            uvicorn.Config(
                service.app,
                log_config=None,
                log_level="warning",
                access_log=False,
                backlog=BACKLOG,
                lifespan="on",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(limits.seconds) + 5,
                ws="none",
            )
        )
        self._service, self._on_ready = service, on_ready
        self.was_cut_off = False
        """Whether requests were under way when the time for the end was over."""
        self._heads: dict[Any, tuple[int, float]] = {}
        """By connection without a request under way: the last request, and since when."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a server that was asked to stop ends with exit code 0."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # at the second signal
        self.should_exit = True
        self._service.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: see `_close_idle`."""
        if counter % 10 == 0:
            self._close_idle()
        return await super().on_tick(counter)

    def _close_idle(self) -> None:
        """Close connections on which no request has begun for too long; uvicorn does so only after a first request."""
        now = time.monotonic()
        heads = {}
        for connection in list(self.server_state.connections):
            if _is_idle(connection):
                request = id(getattr(connection, "cycle", None))
                last, since = self._heads.get(connection, (0, now))
                since = since if last == request else now
                heads[connection] = (request, since)
                if now - since > KEEP_ALIVE and connection.transport is not None:
                    connection.transport.close()
        self._heads = heads

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See the module."""
        await self._drain(lambda: bool(self.server_state.connections))
        for listening in sockets or []:
            _drop_new_connections(listening)
        await asyncio.sleep(HANDSHAKE)
        for listening in sockets or []:
            await self._accept_waiting(listening)
        for server in self.servers:
            server.close()
        await self._drain(lambda: any(map(_is_idle, self.server_state.connections)))
        begun = time.monotonic()
        await super().shutdown(sockets)
        self.was_cut_off = time.monotonic() - begun >= (self.config.timeout_graceful_shutdown or 0)

    async def _drain(self, is_busy: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LAME_DUCK
        while is_busy() and time.monotonic() < deadline and not self.force_exit:  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.02)

    async def _accept_waiting(self, listening: socket.socket) -> None:
        """Accept what has connected already: closing the port would reset it."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connected, _ = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            connected.setblocking(False)
            await loop.connect_accepted_socket(self._protocol, connected)

    def _protocol(self) -> Any:
        kind: Any = self.config.http_protocol_class
        return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


def _drop_new_connections(listening: socket.socket) -> None:
    """Let the kernel drop each packet that asks for a new connection: the close would reset what is not accepted by then.

    Its client asks again after a second, and is refused then, before it has sent a request. A connection that is half open may
    be completed. The filter sees TCP headers: https://docs.kernel.org/networking/filter.html
    """
    if sys.platform != "linux":
        return
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in DROP_SYN)
    kept = ctypes.create_string_buffer(program, len(program))
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        pointer = struct.pack("HP", len(DROP_SYN), ctypes.addressof(kept))
        listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, pointer)


def _is_idle(connection: Any) -> bool:
    """Whether no request is under way; both of uvicorn's protocols have a cycle for each request."""
    cycle = getattr(connection, "cycle", None)
    return cycle is None or bool(cycle.response_complete)
