"""Connections of the sink: request heads, bodies in all framings that S3 clients use, and a link of limited speed."""

from __future__ import annotations

import mmap
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

BURST = 0.005
"""Seconds of unused bandwidth that a link may use later, because sleeps end late."""
SCRATCH = mmap.mmap(-1, 16 * 2**20)
"""Buffer for discarded bytes. On Linux MSG_TRUNC drops them in the kernel, so these pages are never touched."""
DISCARD = socket.MSG_WAITALL | (socket.MSG_TRUNC if sys.platform == "linux" else 0)


class Link:
    """A token bucket that all connections share, and the number of its bytes."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.bytes = 0
        self._free_at = 0.0
        self._lock = threading.Lock()

    @property
    def step(self) -> int:
        """Bytes to move at a time: about 2 ms of the link, so that connections share it evenly."""
        return len(SCRATCH) if not self.rate else int(min(max(self.rate * 0.002, 64 * 2**10), 2**20))

    def carry(self, count: int) -> None:
        """Wait until the link could have carried `count` more bytes."""
        with self._lock:
            self.bytes += count
            if not self.rate:
                return
            now = time.monotonic()
            self._free_at = max(self._free_at, now - BURST) + count / self.rate
            wait = self._free_at - now
        if wait > 0:
            time.sleep(wait)


@dataclass
class Request:
    """The head of a request; its body is not read yet."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    wire: Wire


class Wire:
    """The bytes that a client sends: lines, bytes to keep and bytes to discard."""

    def __init__(self, connection: socket.socket, link: Link) -> None:
        self.connection = connection
        self._link = link
        self._ahead = bytearray()  # received together with a head, not consumed yet

    def request(self) -> Request | None:
        """Return the head of the next request, or None if the client closed the connection."""
        while (end := self._ahead.find(b"\r\n\r\n")) < 0:
            received = self.connection.recv(2**16)
            if not received:
                return None
            self._ahead += received
        first, *lines = self._ahead[:end].decode("latin-1").split("\r\n")
        del self._ahead[: end + 4]
        method, target, _ = first.split(" ", 2)
        fields = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        path, _, query = target.partition("?")
        if headers.get("expect", "").lower() == "100-continue":
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(method, unquote(path), dict(parse_qsl(query, keep_blank_values=True)), headers, self)

    def line(self) -> bytes:
        while (end := self._ahead.find(b"\r\n")) < 0:
            self._ahead += self._receive(2**16)
        line = bytes(self._ahead[:end])
        del self._ahead[: end + 2]
        return line

    def read(self, count: int) -> bytes:
        ahead = bytes(self._ahead[:count])
        del self._ahead[:count]
        self._link.carry(len(ahead))
        if len(ahead) == count:
            return ahead
        content = bytearray(count)
        content[: len(ahead)] = ahead
        at = len(ahead)
        with memoryview(content) as view:
            while at < count:
                step = min(count - at, self._link.step)
                self._link.carry(step)
                got = self.connection.recv_into(view[at : at + step], step, socket.MSG_WAITALL)
                if not got:
                    raise ConnectionResetError("the client closed the connection in the middle of a body")
                at += got
        return bytes(content)

    def discard(self, count: int) -> None:
        ahead = min(len(self._ahead), count)
        del self._ahead[:ahead]
        self._link.carry(ahead)
        count -= ahead
        while count:
            step = min(count, self._link.step)
            self._link.carry(step)
            while step:  # WAITALL returns early on a signal
                got = self.connection.recv_into(SCRATCH, step, DISCARD)
                if not got:
                    raise ConnectionResetError("the client closed the connection in the middle of a body")
                step -= got
                count -= got

    def body(self, request: Request) -> bytes:
        return b"".join(source.read(length) for source, length in frames(request))

    def drop(self, request: Request) -> None:
        for source, length in frames(request):
            source.discard(length)

    def _receive(self, count: int) -> bytes:
        received = self.connection.recv(count)
        if not received:
            raise ConnectionResetError("the client closed the connection in the middle of a body")
        return received


class Chunks:
    """The bytes in HTTP chunks, for the aws-chunked frames that some clients put into them."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._frames = chunks(wire)
        self._left = 0

    def line(self) -> bytes:
        line = bytearray()
        while not line.endswith(b"\r\n"):
            line += self.read(1)
        return bytes(line[:-2])

    def read(self, count: int) -> bytes:
        return b"".join(self._wire.read(length) for length in self._spans(count))

    def discard(self, count: int) -> None:
        for length in self._spans(count):
            self._wire.discard(length)

    def finish(self) -> None:
        for _, length in self._frames:
            self._wire.discard(length)

    def _spans(self, count: int) -> Iterator[int]:
        while count:
            if not self._left:
                self._left = next(self._frames)[1]
            length = min(count, self._left)
            self._left -= length
            count -= length
            yield length


def frames(request: Request) -> Iterator[tuple[Wire | Chunks, int]]:
    """Yield the source and length of each piece of the payload: one, or one for each chunk."""
    headers, wire = request.headers, request.wire
    chunked = "chunked" in headers.get("transfer-encoding", "").lower()
    aws_chunked = headers.get("x-amz-content-sha256", "").startswith("STREAMING-")
    if chunked and aws_chunked:
        inside = Chunks(wire)
        yield from chunks(inside)
        inside.finish()
    elif chunked or aws_chunked:  # both framings are the same: size;extension, bytes, trailers
        yield from chunks(wire)
    elif length := int(headers.get("content-length", 0)):
        yield wire, length


def chunks(source: Wire | Chunks) -> Iterator[tuple[Wire | Chunks, int]]:
    while length := int(source.line().split(b";")[0], 16):
        yield source, length
        source.line()
    while source.line():
        pass
