"""How the port of a server closes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from hf_cloudtrain.runtime.listening import listen
from hf_cloudtrain.serving import server
from hf_cloudtrain.serving.app import Limits


@pytest.mark.parametrize("is_slow", [True, False], ids=["slow", "idle"])
def test_requests_that_are_cut_off_at_the_end_are_noticed(
    monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    monkeypatch.setattr(server, "LAME_DUCK", 0.0)
    monkeypatch.setattr(server.Server, "capture_signals", lambda self: contextlib.nullcontext())
    asked = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        await asyncio.sleep(600)

    service: Any = SimpleNamespace(app=app, is_draining=False)
    found = server.Server(service, Limits(), lambda: None)
    found.config.lifespan = "off"
    found.config.timeout_graceful_shutdown = 1
    with listen("127.0.0.1", 0) as listening, contextlib.ExitStack() as clients:
        thread = threading.Thread(target=found.run, kwargs={"sockets": [listening]})
        thread.start()
        if is_slow:
            client = clients.enter_context(socket.create_connection(listening.getsockname(), timeout=10))
            client.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert asked.wait(10)
        found.should_exit = True
        thread.join(30)
    assert found.was_cut_off is is_slow


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
def test_a_connection_that_comes_while_the_port_closes_is_refused_and_not_reset() -> None:
    listening = listen("127.0.0.1", 0)
    address = listening.getsockname()
    with socket.create_connection(address, timeout=10) as early, socket.socket() as late:
        server._drop_new_connections(listening)
        closing = threading.Timer(0.3, listening.close)
        early.sendall(b"request")
        accepted, _ = listening.accept()
        closing.start()
        late.settimeout(10)
        with pytest.raises(ConnectionRefusedError):
            late.connect(address)
        with accepted:
            assert accepted.recv(7) == b"request"
        closing.join()
