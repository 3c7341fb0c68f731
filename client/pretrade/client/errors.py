"""What the library raises: one tree of exceptions, and the one table from gRPC statuses to them.

```
PretradeError
├── CallError                   a call, or an order of a batch or stream, that has no decision
│   ├── InvalidOrderError       INVALID_ARGUMENT: an order breaks a rule; `field` and `reason` name it
│   ├── KeyReusedError          ALREADY_EXISTS: the idempotency key was used for another order
│   ├── OverloadedError         RESOURCE_EXHAUSTED: too many calls; `retry_delay_seconds` says when to ask again
│   ├── DeadlineError           DEADLINE_EXCEEDED: no answer within the deadline
│   ├── UnavailableError        UNAVAILABLE, CANCELLED: no server could be reached, or it is stopping
│   ├── UnauthenticatedError    UNAUTHENTICATED: credentials are missing or invalid
│   ├── PermissionDeniedError   PERMISSION_DENIED: the caller lacks the role, or may not use the strategy
│   ├── WrongServerError        UNIMPLEMENTED, NOT_FOUND: no decision service listens there
│   └── ServerError             every other status: a fault of the server
├── CredentialsError            the caller's own credentials cannot be used
└── ClosedError                 the client or the stream was closed, or belongs to the parent of this process
```
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import grpc

from pretrade.client.retries import retry_delay
from pretrade.wire.rpc import status_pb2

if TYPE_CHECKING:
    from pretrade.decision.v1 import decision_pb2 as pb

_DETAILS: Final = "grpc-status-details-bin"
_ERROR_INFO: Final = "/google.rpc.ErrorInfo"
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


_OF_TRANSPORT: Final = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "did not answer in time",
    grpc.StatusCode.UNAVAILABLE: "cannot be reached",
}


class PretradeError(Exception):
    """Base of everything that this library raises by itself."""


class ClosedError(PretradeError):
    """The client or the stream cannot be used any more."""


class CredentialsError(PretradeError):
    """The credentials cannot be used; says why."""


class CallError(PretradeError):
    """A call, or an order of a batch or stream, has no decision. Its `__cause__` is gRPC's own error, if there is one.

    Args:
        message: One or two sentences: what happened, and what to do.
        code: The gRPC status.
        reason: The server's machine-readable reason in UPPER_SNAKE_CASE; empty where it gave none.
        field: The order's field that is to blame; empty where there is none.
        retry_delay_seconds: After how many seconds the same may be asked again; None where nobody said. It is never
            infinite: what must not be asked again has None, too.
        named: Everything that the server's `ErrorInfo` names, by name.
    """

    advice = ""
    """What a caller can do about it, in a sentence; empty where the server's own words say it."""

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode,
        *,
        reason: str = "",
        field: str = "",
        retry_delay_seconds: float | None = None,
        named: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code: Final = code
        self.reason: Final = reason
        self.field: Final = field
        self.retry_delay_seconds: Final = retry_delay_seconds
        self.named: Final[Mapping[str, str]] = dict(named or {})


class InvalidOrderError(CallError):
    """The order breaks a rule of the contract. `field` names the field, and `reason` the rule."""


class KeyReusedError(CallError):
    """The idempotency key was used for another order."""

    advice = "Give every new order a key of its own, or none: the client then makes one."


class OverloadedError(CallError):
    """Too many calls are under way, or more than this caller may make. `retry_delay_seconds` says when to ask again."""

    advice = "Ask less often, or add servers."


class DeadlineError(CallError):
    """There was no answer within the deadline. The order may have been decided; nobody heard the decision."""

    advice = "Allow more time with deadline_seconds."


class UnavailableError(CallError):
    """No server could be reached, or it is about to stop."""

    advice = "Is the server up, and is this its decision port?"


class UnauthenticatedError(CallError):
    """The server asks for credentials, and they are missing or invalid."""

    advice = "Give connect() a token_file, or a certificate and its key."


class PermissionDeniedError(CallError):
    """The credentials are valid, but the caller lacks the role, or may not use the order's strategy."""


class WrongServerError(CallError):
    """What listens there does not know this call."""

    advice = "Is this the decision port? It is 7001 by default; 7002 is for administration."


class ServerError(CallError):
    """A fault of the server; its log explains it."""

    advice = "The server's log explains it."


CLASSES: Final[Mapping[grpc.StatusCode, type[CallError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidOrderError,
    grpc.StatusCode.ALREADY_EXISTS: KeyReusedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNIMPLEMENTED: WrongServerError,
    grpc.StatusCode.NOT_FOUND: WrongServerError,
}
"""By status; every other one is a `ServerError`."""


def error_of(error: grpc.RpcError, address: str) -> CallError:
    """The exception for a call that failed.

    Args:
        error: gRPC's own, of a call that was made.
        address: Of the server that was asked.
    """
    code: grpc.StatusCode = error.code()
    info = _info(error)
    kind = CLASSES.get(code, ServerError)
    details = error.details() or "it gave no reason"
    delay = retry_delay(error)
    # What the server says has a reason; what has none is of gRPC's own transport.
    said = f"answered {code.name}" if info.reason else _OF_TRANSPORT.get(code, f"answered {code.name}")
    return kind(
        _sentence(kind, f"{address} {said}", info.reason, details),
        code,
        reason=info.reason,
        field=info.metadata.get("field", ""),
        retry_delay_seconds=None if delay == math.inf else delay,
        named=dict(info.metadata),
    )


def error_of_order(error: pb.OrderError) -> CallError:
    """The exception for one order of a batch or stream that got no decision."""
    code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    kind = CLASSES.get(code, ServerError)
    return kind(
        _sentence(kind, code.name, error.reason, error.message),
        code,
        reason=error.reason,
        field=error.field,
        retry_delay_seconds=error.retry_delay.ToNanoseconds() / 1e9 if error.HasField("retry_delay") else None,
    )


def says_when(error: grpc.RpcError) -> bool:
    """Whether the server says after how long to ask again."""
    return retry_delay(error) not in (None, math.inf)


def reason_of(error: grpc.RpcError) -> str:
    """The server's machine-readable reason; empty where it gave none."""
    return str(_info(error).reason)


def _sentence(kind: type[CallError], what: str, reason: str, details: str) -> str:
    words = details.rstrip(".")
    return f"{what}{f' ({reason})' if reason else ''}: {words}.{f' {kind.advice}' if kind.advice else ''}"


def _info(error: grpc.RpcError) -> status_pb2.ErrorInfo:
    """The server's `ErrorInfo`; an empty one where it sent none, as in what gRPC's own transport ends."""
    for key, value in getattr(error, "trailing_metadata", tuple)() or ():
        if key == _DETAILS and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                if detail.type_url.endswith(_ERROR_INFO):
                    return status_pb2.ErrorInfo.FromString(detail.value)
    return status_pb2.ErrorInfo()
