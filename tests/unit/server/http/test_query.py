"""The query of a GET as a request."""

from __future__ import annotations

import pytest

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2
from server.errors import InvalidOrderError
from server.http import transcoding
from server.http.query import document_of
from server.rpc.events import dumped

_WATCH = audit_pb2.WatchDecisionsRequest


async def test_lists_parts_and_booleans_become_the_request() -> None:
    query = b"filter.instruments=A&filter.instruments=B%2F&from_oldest=true&filter.sources=primary&filter.model=m"
    document = document_of(query, _WATCH.DESCRIPTOR)
    request = await transcoding.request_of(dumped(document), _WATCH)
    assert list(request.filter.instruments) == ["A", "B/"]
    assert (request.from_oldest, list(request.filter.sources), request.filter.model) == (True, [1], "m")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (b"cursor=a&cursor=b", "MALFORMED_REQUEST"),
        (b"filter=a&filter.model=b", "MALFORMED_REQUEST"),
        (b"filter.model=%ff", "MALFORMED_REQUEST"),
        (b"\xff=1", "MALFORMED_REQUEST"),
        (b"from_oldest=perhaps", "MALFORMED_REQUEST"),
        (b"cursr=a", "UNKNOWN_FIELD"),
        (b"filter.modle=a", "UNKNOWN_FIELD"),
        (b"filter.sources=guesses", "UNKNOWN_ENUM_VALUE"),
        (b"cursor.part=1", "MALFORMED_REQUEST"),
        (b"cursor=a&cursor.part=1", "MALFORMED_REQUEST"),
        (b"cursor.part=1&cursor=a", "MALFORMED_REQUEST"),
        (b"filter.instruments.part=1&filter.instruments=A", "MALFORMED_REQUEST"),
        (b"filter.instruments=A&filter.instruments.part=1", "MALFORMED_REQUEST"),
        (b"filtre.model=a", "UNKNOWN_FIELD"),
        (b"filter" + b".model" * 10_000 + b"=a", "MALFORMED_REQUEST"),
        (b"&".join(b"filter.instruments=A" for _ in range(1_001)), "MALFORMED_REQUEST"),
    ],
)
async def test_what_is_no_request_is_refused(query: bytes, reason: str) -> None:
    with pytest.raises(InvalidOrderError) as caught:
        await transcoding.request_of(dumped(document_of(query, _WATCH.DESCRIPTOR)), _WATCH)
    assert caught.value.reason == reason


def test_nothing_is_asked_without_a_query() -> None:
    assert document_of(b"", admin_pb2.ListSignalsRequest.DESCRIPTOR) == {}
