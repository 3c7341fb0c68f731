"""Errors as problem details (RFC 9457), with the reasons that the same errors have over gRPC.

A problem names its `reason`, which is stable and for programs, and `field`, where one is to blame. Its `type` is that
reason as a URN; nobody can open it, and docs/http.md explains it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from google.rpc import code_pb2

from server import errors
from server.errors import PretradeError
from server.rpc import status
from server.rpc.framing import Header

CONTENT_TYPE: Final = b"application/problem+json"
TYPE: Final = "urn:pretrade:reason:"
"""Before the reason."""
HTTP: Final[Mapping[int, int]] = {
    code_pb2.CANCELLED: 499,
    code_pb2.UNKNOWN: 500,
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.DEADLINE_EXCEEDED: 504,
    code_pb2.NOT_FOUND: 404,
    code_pb2.ALREADY_EXISTS: 409,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.FAILED_PRECONDITION: 400,
    code_pb2.ABORTED: 409,
    code_pb2.OUT_OF_RANGE: 400,
    code_pb2.UNIMPLEMENTED: 501,
    code_pb2.INTERNAL: 500,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DATA_LOSS: 500,
    code_pb2.UNAUTHENTICATED: 401,
}
"""HTTP statuses by code. Source: https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto."""
_HTTP_OF: Final[Mapping[type[PretradeError], int]] = {
    errors.MessageTooLargeError: 413,
    errors.UnknownMethodError: 404,
    errors.HttpMethodError: 405,
    errors.UnsupportedEncodingError: 415,
    errors.ProtocolError: 400,
}
"""HTTP has better ones for these."""


class Refusal(NamedTuple):
    """An error as an HTTP answer."""

    http_status: int
    headers: list[Header]
    body: bytes
    """A problem as JSON."""


def status_of(error: PretradeError) -> int:
    """The HTTP status of an error."""
    return _HTTP_OF.get(type(error)) or HTTP[status.code(error)]


def refusal(error: PretradeError) -> Refusal:
    """The answer to a call that ends with this error."""
    http_status = status_of(error)
    headers = [(b"content-type", CONTENT_TYPE), *status.http_headers(error)]
    if isinstance(error, errors.HttpMethodError):
        headers.append((b"allow", ", ".join(error.allowed).encode()))
    if http_status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    return Refusal(http_status, headers, json.dumps(problem(error, http_status), separators=(",", ":")).encode())


def problem(error: PretradeError, http_status: int) -> dict[str, Any]:
    """An error as an object."""
    code = code_pb2.Code.Name(status.code(error))
    found: dict[str, Any] = {
        "type": f"{TYPE}{error.reason}",
        "title": code.replace("_", " ").capitalize(),
        "status": http_status,
        "detail": str(error),
        "code": code,
        "reason": error.reason,
    }
    if error.field:
        found["field"] = error.field
    if error.named:
        found["metadata"] = dict(error.named)
    if error.retry_after_seconds is not None and error.retry_after_seconds < math.inf:
        found["retry_after_seconds"] = error.retry_after_seconds
    return found
