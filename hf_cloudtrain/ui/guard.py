"""Who may ask the server for what: hosts, origins, the token, and what a page may load."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from http.cookies import SimpleCookie
from typing import TYPE_CHECKING

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
            await self._pass(app, scope, receive, send)

        return guarded

    async def _pass(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in self._headers.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await app(scope, receive, send_with_headers)
            return
        status, text = refusal
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
        await send_with_headers({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    def cookie(self, scope: Scope, given: str) -> str | None:
        """The cookie for a browser that has given the token; None where it is wrong."""
        # JSON may hold half of a surrogate pair, which UTF-8 does not.
        given_bytes = given.encode(errors="surrogatepass")
        if self._token is None or not hmac.compare_digest(given_bytes, self._token.encode()):
            return None
        return f"{_cookie_name(scope)}={self._session}; Path=/; HttpOnly; SameSite=Strict"

    def has_token(self, scope: Scope) -> bool:
        """Whether a request has the token, as a header or by its cookie."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        scheme, _, bearer = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.cookie(scope, bearer) is not None:
            return True
        try:
            found = SimpleCookie(headers.get(b"cookie", "")).get(_cookie_name(scope))
        except Exception:  # noqa: BLE001 - a cookie of a different program may have any form
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), self._session.encode())

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        if (refusal := self._doorkeeper.refusal(scope["headers"])) is not None:
            return 403, refusal
        is_open = scope["path"] in OPEN or scope["path"].startswith(OPEN[-1])
        site = dict(scope["headers"]).get(b"sec-fetch-site")
        if site in (b"cross-site", b"same-site") and scope["path"] != "/":
            return 403, "Requests from the page of a different site are not answered."
        is_action = scope["method"] not in ("GET", "HEAD")
        if (self._reading or is_action) and not is_open and not self.has_token(scope):
            return (
                401,
                "The token is missing or wrong. `cloudtrain ui` printed it with the address of the page.",
            )
        return None


def _cookie_name(scope: Scope) -> str:
    """With the port: a browser sends a cookie to every port of a host."""
    return f"cloudtrain-{(scope.get('server') or ('', 0))[1]}"
