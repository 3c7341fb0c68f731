"""The paths that are no methods of the contract: health, version, and what describes the others."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

from server.http.application import Page, Question, Reply
from server.http.document import document_of
from server.rpc.framing import Header

_STATIC: Final = Path(__file__).parent / "static"
_GUARDED: Final[tuple[Header, ...]] = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-cache"),
)
"""A page into which a token is typed runs no script but ours, talks to nobody but us, and is in no frame."""


def open_pages(is_serving: Callable[[], bool], paths: Collection[str]) -> Mapping[str, Page]:
    """The pages that are for everybody.

    Args:
        is_serving: Whether the server as a whole takes decisions.
        paths: The paths of the port's methods.
    """
    version = _dumped({"version": metadata.version("pretrade-server"), "contract": "v1"})

    async def health(_: Question) -> Reply:
        if is_serving():
            return Reply(_dumped({"status": "SERVING"}))
        return Reply(_dumped({"status": "NOT_SERVING"}), http_status=503)

    pages = {"/health": Page(health), "/version": Page(_always(Reply(version)))}
    described = document_of({*paths, *pages})
    return {
        **pages,
        "/openapi.json": Page(_always(Reply(described))),
        "/docs": _static("docs.html", b"text/html; charset=utf-8"),
        "/docs/try.js": _static("try.js", b"text/javascript; charset=utf-8"),
    }


def _static(name: str, content_type: bytes) -> Page:
    """A file of the page on which a person tries the calls."""
    return Page(_always(Reply((_STATIC / name).read_bytes(), content_type, headers=_GUARDED)))


def _always(reply: Reply) -> Callable[[Question], Awaitable[Reply]]:
    async def answer(_: Question) -> Reply:
        return reply

    return answer


def _dumped(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
