"""From errors to gRPC: the one table of statuses, for all services on both edges.

Every call that the server fails carries a `google.rpc.ErrorInfo` with the error's reason. Where the server knows when
to ask again, it says so three times: in a `RetryInfo`, in the metadata `grpc-retry-pushback-ms`, which gRPC's own
retries obey, and over HTTP in `Retry-After`. What gRPC's own transport ends by itself carries none of this: on
grpc.aio, a message beyond the limit (RESOURCE_EXHAUSTED), a frame that cannot be decompressed, and calls of a flood
(CANCELLED).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from pretrade.decision.v1 import decision_pb2 as pb
from server import errors
from server.errors import OverloadedError, PretradeError

_DOMAIN: Final = "pretrade"
PUSHBACK: Final = "grpc-retry-pushback-ms"
"""Metadata by which a server says after how many milliseconds a call may be made again; a negative number: never.

Source: https://github.com/grpc/proposal/blob/master/A6-client-retries.md#pushback."""
_NEVER: Final = "-1"

Wire = tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]

CODES: Final[dict[type[PretradeError], int]] = {
    errors.InvalidOrderError: code_pb2.INVALID_ARGUMENT,
    errors.KeyReusedError: code_pb2.ALREADY_EXISTS,
    errors.OverloadedError: code_pb2.RESOURCE_EXHAUSTED,
    errors.MessageTooLargeError: code_pb2.RESOURCE_EXHAUSTED,
    errors.DeadlineError: code_pb2.DEADLINE_EXCEEDED,
    errors.DrainingError: code_pb2.UNAVAILABLE,
    errors.UnauthenticatedError: code_pb2.UNAUTHENTICATED,
    errors.PermissionDeniedError: code_pb2.PERMISSION_DENIED,
    errors.RateLimitedError: code_pb2.RESOURCE_EXHAUSTED,
    errors.CredentialsUnknownError: code_pb2.UNAVAILABLE,
    errors.UnknownMethodError: code_pb2.UNIMPLEMENTED,
    errors.HttpMethodError: code_pb2.UNIMPLEMENTED,
    errors.OriginError: code_pb2.PERMISSION_DENIED,
    errors.UnknownServiceError: code_pb2.NOT_FOUND,
    errors.UnknownInstrumentError: code_pb2.NOT_FOUND,
    errors.TooManyWatchersError: code_pb2.RESOURCE_EXHAUSTED,
    errors.UnexpectedMessageError: code_pb2.INVALID_ARGUMENT,
    errors.SlowReaderError: code_pb2.RESOURCE_EXHAUSTED,
    errors.ProtocolError: code_pb2.INTERNAL,
    errors.UnsupportedEncodingError: code_pb2.UNIMPLEMENTED,
    errors.InternalError: code_pb2.INTERNAL,
    errors.ControlError: code_pb2.INTERNAL,
    errors.UnknownSubjectError: code_pb2.NOT_FOUND,
    errors.InvalidChangeError: code_pb2.INVALID_ARGUMENT,
    errors.ControlChangedError: code_pb2.ABORTED,
    errors.ChangeRefusedError: code_pb2.FAILED_PRECONDITION,
    errors.ChangeInDoubtError: code_pb2.DEADLINE_EXCEEDED,
    errors.AuditError: code_pb2.INTERNAL,
    errors.JournalError: code_pb2.UNAVAILABLE,
    errors.UnknownDecisionError: code_pb2.NOT_FOUND,
    errors.NotReplayableError: code_pb2.FAILED_PRECONDITION,
    errors.OutcomeConflictError: code_pb2.ALREADY_EXISTS,
    errors.InvalidRequestError: code_pb2.INVALID_ARGUMENT,
    errors.AuditUnavailableError: code_pb2.UNAVAILABLE,
    errors.BarsUnavailableError: code_pb2.UNAVAILABLE,
    errors.AuditBusyError: code_pb2.RESOURCE_EXHAUSTED,
}
"""By class. An error whose class is not here has the status of its nearest base class that is."""


def code(error: PretradeError) -> int:
    """The `google.rpc.Code` of an error."""
    return next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)


def of(error: PretradeError) -> Wire:
    """Code, message and trailing metadata of a call that ends with this error."""
    return _overload(error.reason, str(error)) if isinstance(error, OverloadedError) else _wire(error)


@lru_cache(maxsize=16)
def _overload(reason: str, message: str) -> Wire:
    """The same for every call that is shed: made once, since what a refusal costs is taken from the answers."""
    return _wire(OverloadedError(reason, message))


def message_of(error: PretradeError) -> status_pb2.Status:
    """Code, message and details of a call that ends with this error."""
    named = {**({"field": error.field} if error.field else {}), **error.named}
    status = status_pb2.Status(code=code(error), message=str(error))
    info = error_details_pb2.ErrorInfo(domain=_DOMAIN, reason=error.reason, metadata=named)
    for detail in (info, *_retry(error.retry_after_seconds)):
        status.details.add().Pack(detail)
    return status


def _wire(error: PretradeError) -> Wire:
    wire = rpc_status.to_status(message_of(error))
    return wire.code, wire.details, (*wire.trailing_metadata, *_pushback(error.retry_after_seconds))


def _retry(after_seconds: float | None) -> Iterable[error_details_pb2.RetryInfo]:
    """When to ask again, where that is known."""
    if after_seconds is not None and after_seconds < math.inf:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(after_seconds * 1e9))
        yield retry


def _pushback(after_seconds: float | None) -> Iterable[tuple[str, str]]:
    """The same for gRPC's own retries."""
    if after_seconds is not None:
        yield PUSHBACK, str(math.ceil(after_seconds * 1e3)) if after_seconds < math.inf else _NEVER


def http_headers(error: PretradeError) -> list[tuple[bytes, bytes]]:
    """The same for callers over HTTP, in whole seconds, as `Retry-After` has them."""
    after_seconds = error.retry_after_seconds
    if after_seconds is None or after_seconds == math.inf:
        return []
    return [(b"retry-after", str(math.ceil(after_seconds)).encode())]


def order_error(error: PretradeError) -> pb.OrderError:
    """The same, for one order of a batch or stream."""
    found = pb.OrderError(code=code(error), reason=error.reason, field=error.field, message=str(error))
    for retry in _retry(error.retry_after_seconds):
        found.retry_delay.CopyFrom(retry.retry_delay)
    return found
