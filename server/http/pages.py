"""The paths that are no methods of the contract: health, version, and what describes the others."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from importlib import metadata

from server.http.application import Page, Question, Reply
from server.http.document import document_of


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
    return {**pages, "/openapi.json": Page(_always(Reply(described)))}


def _always(reply: Reply) -> Callable[[Question], Awaitable[Reply]]:
    async def answer(_: Question) -> Reply:
        return reply

    return answer


def _dumped(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
