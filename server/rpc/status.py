"""From domain errors to gRPC statuses: one table for every edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import (
    CredentialsUnknownError,
    DeadlineError,
    DrainingError,
    InternalError,
    InvalidOrderError,
    KeyReusedError,
    OverloadedError,
    PermissionDeniedError,
    PretradeError,
    RateLimitedError,
    UnauthenticatedError,
)

_DOMAIN = "pretrade"
_RETRY_AFTER_NANOS = 50_000_000

Wire = tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]

_CODES: dict[type[PretradeError], int] = {
    InvalidOrderError: code_pb2.INVALID_ARGUMENT,
    KeyReusedError: code_pb2.ALREADY_EXISTS,
    OverloadedError: code_pb2.RESOURCE_EXHAUSTED,
    DeadlineError: code_pb2.DEADLINE_EXCEEDED,
    DrainingError: code_pb2.UNAVAILABLE,
    UnauthenticatedError: code_pb2.UNAUTHENTICATED,
    PermissionDeniedError: code_pb2.PERMISSION_DENIED,
    RateLimitedError: code_pb2.RESOURCE_EXHAUSTED,
    CredentialsUnknownError: code_pb2.UNAVAILABLE,
    InternalError: code_pb2.INTERNAL,
}


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: PretradeError) -> NoReturn:
    """Ends a call with an error's status and its `google.rpc.ErrorInfo`."""
    await context.abort(*of(error))


def of(error: PretradeError) -> Wire:
    """Code, message and trailing metadata of a call that ends with this error."""
    return _overload(error.reason, str(error)) if isinstance(error, OverloadedError) else _wire(error)


@lru_cache(maxsize=16)
def _overload(reason: str, message: str) -> Wire:
    """The same for every call that is shed: made once, since what a refusal costs is taken from the answers."""
    return _wire(OverloadedError(reason, message))


def _wire(error: PretradeError) -> Wire:
    details = []
    if isinstance(error, OverloadedError | RateLimitedError):
        retry = error_details_pb2.RetryInfo()
        nanos = int(error.retry_after_seconds * 1e9) if isinstance(error, RateLimitedError) else _RETRY_AFTER_NANOS
        retry.retry_delay.FromNanoseconds(nanos)
        details.append(retry)
    metadata = {**({"field": error.field} if error.field else {}), **error.named}
    return with_reason(code(error), str(error), error.reason, metadata, details)


def with_reason(
    status_code: int, text: str, reason: str, metadata: Mapping[str, str], details: Sequence[Message] = ()
) -> Wire:
    """Code, message and trailing metadata of a call that ends with a `google.rpc.ErrorInfo` and further details."""
    status = status_pb2.Status(code=status_code, message=text)
    info = error_details_pb2.ErrorInfo(domain=_DOMAIN, reason=reason, metadata=metadata)
    for detail in (info, *details):
        status.details.add().Pack(detail)
    wire = rpc_status.to_status(status)
    return wire.code, wire.details, wire.trailing_metadata


def code(error: PretradeError) -> int:
    """The `google.rpc.Code` of an error."""
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)


def order_error(error: PretradeError) -> pb.OrderError:
    """The same, for one order of a batch or stream."""
    return pb.OrderError(code=code(error), reason=error.reason, field=error.field, message=str(error))
