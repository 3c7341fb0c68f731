"""What stands in front of every page: no other site uses a person's session, and no page runs what is not ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pretrade.console.reach import Reach

_HEADERS: Final[Mapping[str, str]] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "same-origin",  # with "no-referrer" browsers would not say where a form comes from
    "x-content-type-options": "nosniff",
}
_SAFE: Final = ("GET", "HEAD")
HEALTH: Final = "/health"
"""Whoever asks whether the console serves may call it by any name: a kubelet has the address of the pod and no other.
The answer is the same for all."""
_LONGEST_BODY: Final = 65_536
"""Bytes of a form: a token and a reason fit many times."""


class Guard:
    """Refuses calls that come by another name or from another site, and adds headers that keep pages to our own files.

    A page of another site that makes a browser send a form here is refused thrice: the browser keeps the cookie back
    (SameSite=Strict), it says where the form comes from (Origin), and the form lacks the session's secret. The name of
    the host is checked because a name of somebody else's domain may be made to lead to this machine.

    Args:
        application: What answers.
        reach: How the console may be called.
    """

    def __init__(self, application: ASGIApp, reach: Reach) -> None:
        self._application = application
        self._reach = reach

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one call."""
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._application)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if scope["path"] == HEALTH and scope["method"] in _SAFE:
            return None
        if _name_of(host) not in self._reach.names:
            return PlainTextResponse(
                f"This console is not called {_name_of(host)!r}. Whoever starts it may allow it: --allow-host\n",
                421,
            )
        if scope["method"] in _SAFE:
            return None
        if not _is_same_origin(headers, {self._reach.origin, f"{scope['scheme']}://{host}".lower()} - {""}):
            return PlainTextResponse("This form comes from another site.\n", 403)
        length = headers.get("content-length", "")
        if not length.isdigit() or int(length) > _LONGEST_BODY:
            return PlainTextResponse(f"A form has at most {_LONGEST_BODY} bytes.\n", 413)
        return None


def _is_same_origin(headers: Headers, ours: Collection[str]) -> bool:
    """Whether a page of ours sends this; a browser always says."""
    origin = headers.get("origin")
    if origin is not None:
        return origin.lower() in ours
    return headers.get("sec-fetch-site") == "same-origin"


def _name_of(host: str) -> str:
    """The name or address in `host:port`; empty when it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
