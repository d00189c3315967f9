"""Who may ask the server for what: hosts, origins, the token, and what a page may load."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from typing import TYPE_CHECKING

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, Response

from hf_cloudtrain.errors import ConfigurationError
from hf_cloudtrain.runtime.listening import Doorkeeper

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/", "/api/session", "/static/")
"""Paths without anything from storage: a browser without the token loads the page that asks for it."""
LEAST_TOKEN = 16
"""Characters of a token."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def content_policy(library: str) -> str:
    """What the page may load: our own files, and the style elements that plotly.js adds, each by its digest.

    One of them is empty, and filled by insertRule, which needs no permission; one is for maps. `new Function` is used by
    its WebGL charts only; ours are SVG, so there is no 'unsafe-eval'. Attributes named `style` are not allowed.
    """
    styles = ["", *re.findall(r"""createElement\("style"\);[^']{0,120}\.textContent='([^'\\]*)'""", library)]
    digests = [base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() for style in styles]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src 'self'; style-src 'self' {allowed}; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Guard:
    """Answers what may not pass with 401 or 403, and adds the headers of security to every answer.

    Args:
        host: the address that the server listens on.
        token: the token; None where none is needed.
        reading: whether reading needs it too.
        policy: the content security policy.
    """

    def __init__(self, host: str, token: str | None, reading: bool, policy: str) -> None:
        if token is not None and len(token) < LEAST_TOKEN:
            raise ConfigurationError(
                f"The token has {len(token)} characters. It needs at least {LEAST_TOKEN}."
            )
        self._token = token
        self._reading = reading
        self._headers = {"content-security-policy": policy, **HEADERS}
        self._session = secrets.token_urlsafe(32)
        self._doorkeeper = Doorkeeper(host)

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application with the guard before it."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_with_headers(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = MutableHeaders(scope=message)
                    headers.update(self._headers)
                    headers.setdefault("cache-control", "no-store")
                await send(message)

            await (self._refusal(HTTPConnection(scope)) or app)(scope, receive, send_with_headers)

        return guarded

    def cookie(self, request: HTTPConnection, given: str) -> str | None:
        """The cookie for a browser that has given the token; None where it is wrong."""
        if self._token is None or not _same(given, self._token):
            return None
        return f"{_cookie_name(request)}={self._session}; Path=/; HttpOnly; SameSite=Strict"

    def has_token(self, request: HTTPConnection) -> bool:
        """Whether a request has the token, as a header or by its cookie."""
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.cookie(request, bearer) is not None:
            return True
        return _same(request.cookies.get(_cookie_name(request), ""), self._session)

    def _refusal(self, request: HTTPConnection) -> Response | None:
        scope, path = request.scope, request.scope["path"]
        is_open = path in OPEN or path.startswith(OPEN[-1])
        needs_token = not is_open and (self._reading or scope["method"] not in ("GET", "HEAD"))
        status, text = 403, self._doorkeeper.refusal(scope["headers"])
        site = request.headers.get("sec-fetch-site")
        if text is None and site in ("cross-site", "same-site") and path != "/":
            text = "Requests from the page of a different site are not answered."
        elif text is None and needs_token and not self.has_token(request):
            status = 401
            text = "The token is missing or wrong. `cloudtrain ui` printed it with the address of the page."
        return None if text is None else PlainTextResponse(text, status)


def _cookie_name(request: HTTPConnection) -> str:
    """With the port: a browser sends a cookie to every port of a host."""
    return f"cloudtrain-{(request.scope.get('server') or ('', 0))[1]}"


def _same(given: str, secret: str) -> bool:
    # JSON may hold half of a surrogate pair, which UTF-8 does not.
    return hmac.compare_digest(given.encode(errors="surrogatepass"), secret.encode())
