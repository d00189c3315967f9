"""Servers of this machine: the socket, and which browsers may ask."""

from __future__ import annotations

import socket

import pytest

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.runtime.listening import Doorkeeper, is_loopback, listen

EVERYWHERE = "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)),
        *((EVERYWHERE, False), ("gpu-7", False), ("10.0.0.7", False)),
    ],
)
def test_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("host", "headers", "passes"),
    [
        ("127.0.0.1", {b"host": b"127.0.0.1:8080"}, True),
        ("127.0.0.1", {b"host": b"LOCALHOST:8080"}, True),
        ("127.0.0.1", {b"host": b"localhost:1", b"origin": b"http://localhost:1"}, True),
        ("127.0.0.1", {b"host": b"evil.example:8080"}, False),
        ("127.0.0.1", {b"host": b"localhost.evil.example"}, False),
        ("127.0.0.1", {b"host": b"10.0.0.7"}, False),
        ("127.0.0.1", {}, False),
        ("127.0.0.1", {b"host": b"[::"}, False),
        ("127.0.0.1", {b"host": b"localhost:1", b"origin": b"http://localhost:2"}, False),
        ("127.0.0.1", {b"host": b"localhost:1", b"origin": b"null"}, False),
        (EVERYWHERE, {b"host": b"10.0.0.7"}, True),
        (EVERYWHERE, {b"host": socket.gethostname().encode()}, True),
        ("gpu-7", {b"host": b"GPU-7:80"}, True),
        (EVERYWHERE, {b"host": b"evil.example"}, False),
    ],
)
def test_which_requests_pass(host: str, headers: dict[bytes, bytes], passes: bool) -> None:
    assert (Doorkeeper(host).refusal(headers.items()) is None) is passes


def test_a_port_that_is_taken_is_named() -> None:
    with (
        listen("127.0.0.1", 0) as taken,
        pytest.raises(ConfigurationError, match=r"port \d+: a different program has it\. Choose a different"),
    ):
        listen("127.0.0.1", taken.getsockname()[1])
