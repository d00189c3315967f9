"""A fast S3 endpoint that discards uploads, to measure the cost of a client without that of a server.

It runs as a separate process and reports its CPU time, so that a benchmark can exclude it:

    with Sink() as sink:                                # or Sink(bytes_per_second=125e6): a 1 Gbit/s link
        upload(sink.endpoint)
        print(sink.stats()["requests"], sink.stats()["cpu_seconds"])

By hand: `python -m benchmarks.sink --port 9000 --rate 125e6` (Ctrl-C stops it and prints the counters).

Objects under 1 MiB (manifests, pointers) are stored, and conditional PUT is supported. Of larger objects only the size is stored, and
a GET returns that many zero bytes, so files of zeros keep their digest (`--keep` stores everything in memory instead). All buckets
exist. Signatures and checksums are not checked.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.sink_server import Server

REPOSITORY = Path(__file__).resolve().parent.parent


class Sink:
    """The endpoint as a child process on a free loopback port; it ends with its parent.

    Args:
        bytes_per_second: limit of the link in each direction, shared by all connections; None: without a limit.
        keep: store large objects in memory and return their bytes.
    """

    def __init__(self, bytes_per_second: float | None = None, *, keep: bool = False) -> None:
        self._command = [sys.executable, "-m", "benchmarks.sink", "--with-parent"]
        self._command += ["--rate", repr(float(bytes_per_second or 0))] + ["--keep"] * keep
        self.endpoint = ""
        self.pid = 0

    def __enter__(self) -> Sink:  # noqa: PYI034 - typing.Self came with Python 3.11
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY)
        assert self._process.stdout is not None
        first_line = self._process.stdout.readline()
        if not first_line:
            raise RuntimeError(f"The sink exited at its start with code {self._process.wait()}.")
        self.endpoint, self.pid = json.loads(first_line)["endpoint"], self._process.pid
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._process.communicate(timeout=10)  # closes stdin, so the process ends
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"key": "sink", "secret": "sink", "endpoint_url": self.endpoint}

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "sink",
            "AWS_SECRET_ACCESS_KEY": "sink",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def stats(self) -> dict[str, Any]:
        """Counters since the start or the last reset: `requests` by kind, `bytes_in`, `bytes_out`, `cpu_seconds`."""
        return self._ask("stats")

    def reset(self) -> None:
        """Set the counters to zero; keep the objects."""
        self._ask("reset")

    def limit(self, bytes_per_second: float | None) -> None:
        """Change the limit of the link."""
        self._ask(f"limit?rate={bytes_per_second or 0}")

    def _ask(self, what: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.endpoint}/_sink/{what}", timeout=30) as answer:
            return dict(json.load(answer))


def main() -> None:
    parser = argparse.ArgumentParser(description="A fast S3 endpoint that throws uploads away.")
    parser.add_argument("--port", type=int, default=0, help="0: a free port")
    parser.add_argument(
        "--rate", type=float, default=0, help="bytes per second in each direction; 0: no limit"
    )
    parser.add_argument("--keep", action="store_true", help="store large objects in memory too")
    parser.add_argument("--with-parent", action="store_true", help="end when stdin is closed")
    options = parser.parse_args()
    server = Server(options.rate, keep=options.keep)
    listener = socket.create_server(("127.0.0.1", options.port), backlog=256)
    print(
        json.dumps({"endpoint": f"http://127.0.0.1:{listener.getsockname()[1]}", "pid": os.getpid()}),
        flush=True,
    )
    threading.Thread(target=accept, args=(listener, server), name="accept", daemon=True).start()
    wait_for_the_end(with_parent=options.with_parent)
    print(json.dumps(server.stats()), flush=True)
    os._exit(0)  # connection threads are blocked in recv


def accept(listener: socket.socket, server: Server) -> None:
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if server.inward.rate:  # a large kernel buffer would accept megabytes at full speed
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**19)
        threading.Thread(target=server.serve, args=(connection,), name="connection", daemon=True).start()


def wait_for_the_end(*, with_parent: bool) -> None:
    stop, wake = os.pipe()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.write(wake, b"x"))
    select.select([stop, sys.stdin] if with_parent else [stop], [], [])


if __name__ == "__main__":
    main()
