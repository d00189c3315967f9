"""The S3 operations of the sink: small objects are stored, large ones only counted."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import html
import itertools
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from benchmarks.sink_wire import Link, Request, Wire, frames

SMALL = 2**20
"""Objects below this many bytes are stored; larger ones are only counted."""
BLOCK_SIZE = 2**18
"""Bytes of one send, which fit into the CPU cache; larger sends and sendfile were slower over loopback."""
ZEROS = memoryview(bytes(BLOCK_SIZE))
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
NAMES = {200: "OK", 204: "No Content", 206: "Partial Content", 404: "Not Found", 412: "Precondition Failed"}


class Server:
    """The state, and one method for each S3 operation. Each connection has a thread; the lock protects only the dictionaries."""

    def __init__(self, rate: float, *, keep: bool) -> None:
        self.keep = keep
        self.objects: dict[str, Object] = {}
        self.uploads: dict[str, dict[int, Object]] = {}
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        self.inward, self.outward = Link(rate), Link(rate)
        self.requests: Counter[str] = Counter()
        self.cpu_before = 0.0

    def serve(self, connection: socket.socket) -> None:
        wire = Wire(connection, self.inward)
        with connection, contextlib.suppress(ConnectionError):
            while request := wire.request():
                self.answer(request)

    def answer(self, request: Request) -> None:
        if request.path.startswith("/_sink/"):
            self.control(request)
            return
        name, handler = self.operation(request)
        with self.lock:
            self.requests[name] += 1
        handler(request)

    def operation(self, request: Request) -> tuple[str, Callable[[Request], None]]:
        """Return the S3 name of the operation and its handler."""
        query, has_key = request.query, "/" in request.path.strip("/")
        if not has_key:
            if request.method == "POST" and "delete" in query:
                return "DeleteObjects", self.delete_objects
            if request.method == "GET" and "list-type" in query:
                return "ListObjectsV2", self.list_objects
            return "Bucket", self.bucket
        if request.method == "POST" and "uploads" in query:
            return "CreateMultipartUpload", self.create_multipart
        if "uploadId" in query:
            by_method = {
                "PUT": ("UploadPart", self.upload_part),
                "POST": ("CompleteMultipartUpload", self.complete_multipart),
                "DELETE": ("AbortMultipartUpload", self.abort_multipart),
            }
        else:
            by_method = {
                "PUT": ("PutObject", self.put_object),
                "GET": ("GetObject", self.get_object),
                "HEAD": ("HeadObject", self.get_object),
                "DELETE": ("DeleteObject", self.delete_object),
            }
        return by_method.get(request.method, ("Unknown", self.unknown))

    def put_object(self, request: Request) -> None:
        self.store(request, request.path, self.receive(request))

    def store(self, request: Request, path: str, new: Object, body: bytes = b"") -> None:
        """Store an object unless If-None-Match or If-Match forbid it."""
        with self.lock:
            old = self.objects.get(path)
            none_match, match = request.headers.get("if-none-match"), request.headers.get("if-match")
            allowed = not (none_match == "*" and old) and not (
                match and (not old or match.strip('"') != old.etag)
            )
            if allowed:
                self.objects[path] = new
        if not allowed:
            fail(request, 412, "PreconditionFailed", "<Condition>If-None-Match</Condition>" if old else "")
            return
        send(request, 200, body, {"ETag": f'"{new.etag}"'})

    def receive(self, request: Request) -> Object:
        """Read a body: keep a small one in memory, discard a large one."""
        pieces: list[bytes] | None = []
        size = 0
        for source, length in frames(request):
            size += length
            if pieces is None or (size >= SMALL and not self.keep):
                pieces = None
                source.discard(length)
            else:
                pieces.append(source.read(length))
        digest = f"{next(self.numbers):032x}"
        if pieces is not None and size < SMALL:
            digest = hashlib.md5(b"".join(pieces), usedforsecurity=False).hexdigest()
        return Object(pieces, size, digest)

    def get_object(self, request: Request) -> None:
        with self.lock:
            found = self.objects.get(request.path)
        if found is None:
            fail(request, 404, "NoSuchKey")
            return
        status, start, stop = 200, 0, found.size
        headers = {
            "ETag": f'"{found.etag}"',
            "Last-Modified": email.utils.formatdate(found.modified, usegmt=True),
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", "")):
            start, stop = span(wanted[1], wanted[2], found.size)
            if start >= found.size:
                fail(request, 416, "InvalidRange")
                return
            status, headers["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{found.size}"
        headers["Content-Length"] = str(stop - start)
        request.wire.connection.sendall(head(status, headers))
        if request.method == "GET":
            for block in blocks(found, start, stop):
                self.outward.carry(len(block))
                request.wire.connection.sendall(block)

    def delete_object(self, request: Request) -> None:
        request.wire.drop(request)
        with self.lock:
            self.objects.pop(request.path, None)
        send(request, 204)

    def delete_objects(self, request: Request) -> None:
        body = request.wire.body(request).decode()
        bucket = request.path.rstrip("/")
        keys = re.findall(r"<Key>(.*?)</Key>", body, re.DOTALL)
        with self.lock:
            for key in keys:
                self.objects.pop(f"{bucket}/{html.unescape(key)}", None)
        rows = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        send(request, 200, f'<DeleteResult xmlns="{NAMESPACE}">{rows}</DeleteResult>'.encode())

    def list_objects(self, request: Request) -> None:
        query, start = request.query, request.path.rstrip("/") + "/"
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        as_url = query.get("encoding-type") == "url"
        with self.lock:
            found = {path[len(start) :]: an_object for path, an_object in self.objects.items()
                     if path.startswith(start + prefix)}  # fmt: skip
        rows: dict[str, str] = {}
        for key in sorted(found, key=str.encode):
            folder = folder_of(key, prefix, delimiter)
            name = folder or key
            if name not in rows and name.encode() > after.encode():
                rows[name] = list_row(
                    quote(name) if as_url else html.escape(name), None if folder else found[key]
                )
        limit = min(int(query.get("max-keys", 1000)), 1000)
        page = list(rows)[:limit]
        token = f"<NextContinuationToken>{html.escape(page[-1])}</NextContinuationToken>" if page else ""
        send(request, 200, (
            f'<ListBucketResult xmlns="{NAMESPACE}"><Prefix>{quote(prefix) if as_url else html.escape(prefix)}</Prefix>'
            f"<KeyCount>{len(page)}</KeyCount><MaxKeys>{limit}</MaxKeys>"
            f"{'<EncodingType>url</EncodingType>' if as_url else ''}"
            f"<IsTruncated>{'true' if len(rows) > limit else 'false'}</IsTruncated>{token if len(rows) > limit else ''}"
            f"{''.join(rows[name] for name in page)}</ListBucketResult>"
        ).encode())  # fmt: skip

    def create_multipart(self, request: Request) -> None:
        request.wire.drop(request)
        upload = f"upload-{next(self.numbers)}"
        with self.lock:
            self.uploads[upload] = {}
        bucket, key = request.path[1:].split("/", 1)
        send(request, 200, (
            f"<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{html.escape(key)}</Key>"
            f"<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
        ).encode())  # fmt: skip

    def upload_part(self, request: Request) -> None:
        part = self.receive(request)
        with self.lock:
            parts = self.uploads.get(request.query["uploadId"])
            if parts is not None:
                parts[int(request.query["partNumber"])] = part
        if parts is None:
            fail(request, 404, "NoSuchUpload")
            return
        send(request, 200, b"", {"ETag": f'"{part.etag}"'})

    def complete_multipart(self, request: Request) -> None:
        named = [
            int(number)
            for number in re.findall(rb"<PartNumber>(\d+)</PartNumber>", request.wire.body(request))
        ]
        with self.lock:
            parts = self.uploads.get(request.query["uploadId"])
        if parts is None:
            fail(request, 404, "NoSuchUpload")
            return
        if not named or any(number not in parts for number in named):
            fail(request, 400, "InvalidPart")
            return
        chosen = [parts[number] for number in named]
        size = sum(part.size for part in chosen)
        kept: list[bytes] | None = [piece for part in chosen for piece in part.pieces or []]
        if any(part.pieces is None for part in chosen) or (size >= SMALL and not self.keep):
            kept = None
        etag = f"{next(self.numbers):032x}-{len(chosen)}"
        body = f'<CompleteMultipartUploadResult><Key>k</Key><ETag>"{etag}"</ETag></CompleteMultipartUploadResult>'
        self.store(request, request.path, Object(kept, size, etag), body.encode())
        with self.lock:
            self.uploads.pop(request.query["uploadId"], None)

    def abort_multipart(self, request: Request) -> None:
        with self.lock:
            self.uploads.pop(request.query["uploadId"], None)
        send(request, 204)

    def bucket(self, request: Request) -> None:
        """Create, find or locate a bucket: all exist."""
        request.wire.drop(request)
        send(
            request, 200, b"<LocationConstraint></LocationConstraint>" if "location" in request.query else b""
        )

    def unknown(self, request: Request) -> None:
        request.wire.drop(request)
        fail(request, 501, "NotImplemented")

    def control(self, request: Request) -> None:
        what = request.path.removeprefix("/_sink/")
        if what == "limit":
            self.inward.rate = self.outward.rate = float(request.query["rate"])
        if what == "reset":
            with self.lock:
                self.requests.clear()
                self.inward.bytes = self.outward.bytes = 0
                self.cpu_before = time.process_time()
        send(request, 200, json.dumps(self.stats()).encode())

    def stats(self) -> dict[str, Any]:
        with self.lock:
            return {
                "requests": dict(self.requests),
                "bytes_in": self.inward.bytes,
                "bytes_out": self.outward.bytes,
                "cpu_seconds": round(time.process_time() - self.cpu_before, 4),
            }


@dataclass
class Object:
    """One object, or one part of an object."""

    pieces: list[bytes] | None
    """The content, or None if it was discarded."""
    size: int
    etag: str
    modified: float = field(default_factory=time.time)


def blocks(found: Object, start: int, stop: int) -> Iterator[memoryview]:
    """Yield the bytes from `start` to `stop` in blocks of one send."""
    if found.pieces is None:
        for at in range(start, stop, BLOCK_SIZE):
            yield ZEROS[: stop - at]
        return
    for piece in found.pieces:
        for at in range(max(start, 0), min(stop, len(piece)), BLOCK_SIZE):
            yield memoryview(piece)[at : min(at + BLOCK_SIZE, stop)]
        start, stop = start - len(piece), stop - len(piece)


def span(first: str, last: str, size: int) -> tuple[int, int]:
    """Return start and stop of a Range: `5-9`, `5-` or `-5` (the last five)."""
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size


def folder_of(key: str, prefix: str, delimiter: str) -> str:
    """Return the common prefix that a listing shows instead of `key`, or an empty text."""
    at = key.find(delimiter, len(prefix)) if delimiter else -1
    return key[: at + len(delimiter)] if at >= 0 else ""


def list_row(key: str, found: Object | None) -> str:
    if found is None:
        return f"<CommonPrefixes><Prefix>{key}</Prefix></CommonPrefixes>"
    modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.modified))
    return (
        f"<Contents><Key>{key}</Key><LastModified>{modified}</LastModified><ETag>&quot;{found.etag}&quot;</ETag>"
        f"<Size>{found.size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {NAMES.get(status, 'Error')}", "x-amz-request-id: sink"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode()


def send(request: Request, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
    described = {"Content-Length": str(len(body)), **(headers or {})}
    if body:
        described["Content-Type"] = "application/xml"
    request.wire.connection.sendall(head(status, described) + (b"" if request.method == "HEAD" else body))


def fail(request: Request, status: int, code: str, details: str = "") -> None:
    error = f"<Error><Code>{code}</Code><Message>{code}</Message>{details}</Error>"
    send(request, status, error.encode())
