"""How the port of a server closes."""

from __future__ import annotations

import socket
import sys
import threading

import pytest

from hf_cloudtrain.runtime.listening import listen
from hf_cloudtrain.serving import server


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
