"""Why a call, or an order of it, gets no answer.

No error knows a transport: the table in `rpc/status.py` maps each to its gRPC status.

::

    PretradeError
    ├── InvalidOrderError          the caller must change the request
    ├── KeyReusedError             the caller must use a new idempotency key
    ├── OverloadedError            the caller may try again shortly
    ├── MessageTooLargeError       the caller must send less at once
    ├── DeadlineError              the caller wanted the answer sooner than it could be given
    ├── DrainingError              the caller should go to another server
    ├── UnauthenticatedError       the caller must show better credentials
    ├── PermissionDeniedError      the caller may not do this
    ├── RateLimitedError           the caller may try again after `retry_after_seconds`
    ├── CredentialsUnknownError    the credentials cannot be verified at the moment
    ├── UnknownMethodError         the server has no such method
    ├── HttpMethodError            the caller must use another method of HTTP here
    ├── OriginError                a web page of another site may not call this server
    ├── UnknownServiceError        the server has no such service to ask the health of
    ├── UnknownInstrumentError     the server does not follow this instrument
    ├── TooManyWatchersError       as many watch already as may; the caller may try again
    ├── UnexpectedMessageError     the caller of a WebSocket sends messages, where it may only listen
    ├── SlowReaderError            the caller watches and does not read
    ├── ProtocolError              the caller does not speak gRPC as its specification says
    ├── UnsupportedEncodingError   the caller must compress its messages in another way, or not at all
    ├── InternalError              a fault of this server, logged with its traceback
    ├── ControlError               a change to the control state is not made
    │   ├── UnknownSubjectError    the server has nothing of this name to steer
    │   ├── InvalidChangeError     the caller must change the request
    │   ├── ControlChangedError    another change came first: the caller must look again
    │   ├── ChangeRefusedError     the change does not fit the state that the server is in
    │   └── ChangeInDoubtError     nobody knows yet whether the change was made
    └── AuditError                 a part of the audit failed
        ├── JournalError              this row is not durable: the caller must not act on its decision
        │   ├── JournalFullError         too many rows wait; try again when `depth` or `bytes` falls
        │   ├── JournalUnwritableError   the last write failed; the journal recovers by itself
        │   ├── JournalClosedError       the journal is not started, or is already closed
        │   ├── JournalInUseError        another process holds this journal; the start fails
        │   └── JournalCorruptedError    a row does not fit the chain; the start fails, `position` says where
        ├── SchemaUnknownError        the database is of a newer version; nothing is shipped until the server is too
        ├── KeyUnusableError          the key that signs journal heads, or checks them, cannot be read
        ├── UnknownDecisionError      neither the store nor the journal holds this decision
        ├── NotReplayableError        a decision cannot be recomputed; the message says what is missing
        │   ├── ModelUnknownError        no archive of this version exists, or its content is another
        │   └── ModelFailedError         the model gave no score
        ├── OutcomeConflictError      this reporter said something else about this decision before
        ├── InvalidRequestError       the caller must change the request; the message names field and rule
        ├── AuditUnavailableError     what was asked for may be where the server cannot look now
        │   └── BarsUnavailableError     the database of bars cannot be read now
        └── AuditBusyError            too many requests wait for the audit

Errors that a component raises for its own parts, or for the one that builds it, are defined beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fallback.order import Case


class PretradeError(Exception):
    """A call, or an order of it, that gets no answer.

    Attributes:
        reason: Stable, machine-readable, UPPER_SNAKE_CASE.
        field: The field to blame; empty when there is none.
        named: Further details by name, for programs.
        retry_after_seconds: When to ask again, in seconds; None if that is unknown, infinite if never.
        case: What was known of the order when it ended, if that is worth reporting.
    """

    reason: str
    named: Mapping[str, str] = {}
    retry_after_seconds: float | None = None
    case: Case | None = None

    def __init__(self, reason: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field


class InvalidOrderError(PretradeError):
    """The request, or an order of it, breaks a rule."""


class KeyReusedError(PretradeError):
    """The idempotency key was used for another order."""


class OverloadedError(PretradeError):
    """Too many decisions are under way."""

    retry_after_seconds = 0.05


class MessageTooLargeError(PretradeError):
    """A message is larger than the server takes."""

    retry_after_seconds = math.inf

    def __init__(self, size: int, most: int) -> None:
        # The words of grpc.aio, which refuses such a message by itself.
        super().__init__("MESSAGE_TOO_LARGE", f"Received message larger than max ({size} vs. {most})")


class DeadlineError(PretradeError):
    """The deadline had passed on arrival, or passed before an answer could be sent."""


class DrainingError(PretradeError):
    """The server is about to stop, or has stopped."""


class UnauthenticatedError(PretradeError):
    """The credentials are missing or invalid."""


class PermissionDeniedError(PretradeError):
    """The credentials are good, and do not allow this."""

    def __init__(self, reason: str, message: str, field: str = "", named: Mapping[str, str] | None = None) -> None:
        super().__init__(reason, message, field)
        self.named = named or {}


class RateLimitedError(PretradeError):
    """The caller asks too often."""

    def __init__(self, reason: str, message: str, retry_after_seconds: float) -> None:
        super().__init__(reason, message)
        self.retry_after_seconds = retry_after_seconds


class CredentialsUnknownError(PretradeError):
    """What the credentials are to be verified with is not known at the moment."""


class UnknownMethodError(PretradeError):
    """The server has no such method."""

    def __init__(self, message: str = "Method not found!") -> None:
        super().__init__("UNKNOWN_METHOD", message)


class HttpMethodError(PretradeError):
    """What the path names is called by other methods of HTTP."""

    def __init__(self, used: str, allowed: Sequence[str]) -> None:
        super().__init__("METHOD_NOT_ALLOWED", f"this is called by {' or '.join(allowed)}, not by {used}")
        self.allowed = allowed


class OriginError(PretradeError):
    """A web page asked, of a site that may not."""

    def __init__(self) -> None:
        super().__init__(
            "ORIGIN_NOT_ALLOWED", "web pages of this origin may not call this server: add it to http.cors_origins"
        )


class UnknownServiceError(PretradeError):
    """The server has no such service to ask the health of."""

    def __init__(self) -> None:
        super().__init__("UNKNOWN_SERVICE", "unknown service")


class UnknownInstrumentError(PretradeError):
    """The server does not follow an instrument that was asked about; the message begins with the request's field."""

    def __init__(self, message: str) -> None:
        super().__init__("UNKNOWN_INSTRUMENT", message, message.partition(":")[0])


class TooManyWatchersError(PretradeError):
    """As many callers watch already as may at once."""

    retry_after_seconds = 5.0

    def __init__(self, most: int) -> None:
        super().__init__("TOO_MANY_WATCHERS", f"{most} watch already, and no more may in this process")


class UnexpectedMessageError(PretradeError):
    """The caller of a WebSocket sent a message."""

    def __init__(self) -> None:
        super().__init__("UNEXPECTED_MESSAGE", "nothing is expected on this WebSocket: what is wanted is in its URL")


class SlowReaderError(PretradeError):
    """The caller of a watch does not read it, and loses it."""

    def __init__(self, seconds: float) -> None:
        super().__init__("SLOW_READER", f"nothing of the watch was read for {seconds:g} s")


class ProtocolError(PretradeError):
    """The caller does not speak gRPC as its specification says."""

    def __init__(self, message: str) -> None:
        super().__init__("PROTOCOL_ERROR", message)


class UnsupportedEncodingError(PretradeError):
    """Messages are compressed in a way that the server does not know."""

    def __init__(self, message: str) -> None:
        super().__init__("UNSUPPORTED_ENCODING", message)


class InternalError(PretradeError):
    """Something failed that should not have; the caller learns no more than that."""

    def __init__(self, message: str) -> None:
        super().__init__("INTERNAL", message)


class ControlError(PretradeError):
    """A change that is not made, or not known to be."""

    reason = "CONTROL_FAILED"

    def __init__(self, message: str) -> None:
        super().__init__(type(self).reason, message)


class UnknownSubjectError(ControlError):
    """The server has nothing of this name to steer."""

    reason = "UNKNOWN_SUBJECT"


class InvalidChangeError(ControlError):
    """The change breaks a rule; the message names the field and the rule."""

    reason = "INVALID_CHANGE"


class ControlChangedError(ControlError):
    """The control state is not the one that the change was meant for."""

    reason = "CONTROL_CHANGED"

    def __init__(self, version: int, expected: int) -> None:
        super().__init__(f"the control state's version is {version}, not {expected}")


class ChangeRefusedError(ControlError):
    """The change does not fit the state that the server is in."""

    reason = "CHANGE_REFUSED"


class ChangeInDoubtError(ControlError):
    """The change was sent to Redis, and no answer said whether it was made.

    It may be in force, now or in a moment. If it is, it is recorded with its id, by this process or any other.

    Attributes:
        change_id: The change's id, to look for in the history.
    """

    reason = "CHANGE_IN_DOUBT"

    def __init__(self, change_id: str, why: str) -> None:
        super().__init__(
            f"it is not known whether the change was made ({why}); change id {change_id}; "
            "if it was, it is recorded under that id as soon as that is known"
        )
        self.change_id = change_id
        self.named = {"change_id": change_id}


class AuditError(PretradeError):
    """A part of the audit failed."""

    reason = "AUDIT_FAILED"

    def __init__(self, message: str = "") -> None:
        super().__init__(type(self).reason, message)


class JournalError(AuditError):
    """The row was not made durable."""

    reason = "JOURNAL_FAILED"


class JournalFullError(JournalError):
    """As many rows wait as `JournalSettings` allows: `queue_rows` to be written, `max_mebibytes` to be shipped."""

    reason = "JOURNAL_FULL"


class JournalUnwritableError(JournalError):
    """The last write failed and no probe has succeeded since."""

    reason = "JOURNAL_UNWRITABLE"


class JournalClosedError(JournalError):
    """The journal was not started, or is closed."""

    reason = "JOURNAL_CLOSED"


class JournalInUseError(JournalError):
    """Another process writes this journal: two writers would fork the chain."""

    reason = "JOURNAL_IN_USE"


class JournalCorruptedError(JournalError):
    """A row is missing, or is not what was written.

    Attributes:
        position: The first position that does not fit.
        problem: What is wrong there.
    """

    reason = "JOURNAL_CORRUPTED"

    def __init__(self, position: int, problem: str, journal_id: str = "") -> None:
        super().__init__(f"{f'journal {journal_id}, ' if journal_id else ''}position {position}: {problem}")
        self.position = position
        self.problem = problem


class SchemaUnknownError(AuditError):
    """The tables of the audit database are of a newer version of pretrade."""

    reason = "SCHEMA_UNKNOWN"


class KeyUnusableError(AuditError):
    """The key that signs journal heads, or checks them, cannot be read."""

    reason = "KEY_UNUSABLE"


class UnknownDecisionError(AuditError):
    """Neither the store nor the journal holds this decision."""

    reason = "UNKNOWN_DECISION"


class NotReplayableError(AuditError):
    """A decision cannot be recomputed; the message says what is missing."""

    reason = "NOT_REPLAYABLE"


class ModelUnknownError(NotReplayableError):
    """No archive of this model version can be found, or its content is not what its version says."""

    reason = "MODEL_UNKNOWN"


class ModelFailedError(NotReplayableError):
    """The model gave no score."""

    reason = "MODEL_FAILED"


class OutcomeConflictError(AuditError):
    """The reporter recorded another outcome of this decision before."""

    reason = "OUTCOME_CONFLICT"


class InvalidRequestError(AuditError):
    """A request breaks a rule; the message names the field and the rule."""

    reason = "INVALID_REQUEST"


class AuditUnavailableError(AuditError):
    """What was asked for may be in the database or the journal, which cannot be read now."""

    reason = "AUDIT_UNAVAILABLE"


class BarsUnavailableError(AuditUnavailableError):
    """The database of bars, which is read by the process that reads the audit, cannot be read now."""

    reason = "BARS_UNAVAILABLE"


class AuditBusyError(AuditError):
    """Too many requests wait for the audit."""

    reason = "AUDIT_BUSY"
