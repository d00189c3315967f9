"""Servers on this machine: the socket, and which browsers may ask.

A page of any site can send requests to a server on this machine: to its address, or to a name of its own that it lets lead
here (DNS rebinding). A browser names both in its headers, `Host` and `Origin`.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from hf_cloudtrain.errors import ConfigurationError

BACKLOG = 2048
"""Connections that may wait to be accepted."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at once: a second server can bind, but not listen.

    Args:
        host: an address or a name of this machine.
        port: 0 takes a free one.

    Raises:
        ConfigurationError: it cannot; with what to do.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            reason = "a different program has it"
        raise ConfigurationError(
            f"Cannot listen on {host!r}, port {port}: {reason}. Choose a different port with --port, or any free one with "
            "--port 0."
        ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    Args:
        host: an address or a name.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Doorkeeper:
    """Refuses requests that name a different server, and those of pages of other sites.

    Args:
        host: the address that the server listens on.
    """

    def __init__(self, host: str) -> None:
        names = {host, "localhost"}
        if not is_loopback(host):
            names |= {socket.gethostname(), socket.getfqdn()}
        self._names = {name.lower() for name in names}

    def refusal(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Why a request is refused; None if it is not.

        Args:
            headers: of the request, with names in lower case, as ASGI has them.
        """
        found = {name: value.decode("latin-1") for name, value in headers}
        host = found.get(b"host", "")
        if not self._is_ours(host):
            return (
                f"The host {host[:200]!r} is not this server's. A name that leads here by DNS may be an attack; use the address "
                "that the server printed, or start it with --host and that name."
            )
        origin = found.get(b"origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return f"Requests from the origin {origin[:200]!r} are not answered."
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names us: an IP address (which no DNS answer can forge), or one of our names, with any port."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not all(map(is_loopback, self._names))
