"""What can keep a call from getting a decision. None of these knows a transport; `rpc/status.py` maps them.

PretradeError
├── InvalidOrderError     the caller must change the order
├── KeyReusedError        the caller must use a new idempotency key
├── OverloadedError       the caller may try again shortly
├── DeadlineError         the caller asked for an answer sooner than one could be given
├── DrainingError         the caller should go to another server
├── UnauthenticatedError  the caller must show better credentials
├── PermissionDeniedError the caller may not do this, whoever asks
├── RateLimitedError      the caller may try again when his bucket has something in it
├── CredentialsUnknownError  nobody can tell at the moment whether the credentials are good
└── InternalError         nobody's fault but ours: logged with its traceback
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fallback.order import Case


class PretradeError(Exception):
    """A call that gets no decision.

    Attributes:
        reason: Stable, machine-readable, UPPER_SNAKE_CASE.
        field: The field to blame; empty when there is none.
        named: What else it is about, by name, for programs.
        case: What was known of the order when it ended, where that is worth telling.
    """

    named: Mapping[str, str] = {}
    case: Case | None = None

    def __init__(self, reason: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field


class InvalidOrderError(PretradeError):
    """The order breaks a rule."""


class KeyReusedError(PretradeError):
    """The idempotency key was used for another order."""


class OverloadedError(PretradeError):
    """Too many decisions are under way."""


class DeadlineError(PretradeError):
    """The deadline had passed on arrival, or passed before an answer could be sent."""


class DrainingError(PretradeError):
    """The server is about to stop."""


class UnauthenticatedError(PretradeError):
    """The credentials are missing or no good."""


class PermissionDeniedError(PretradeError):
    """The credentials are good, and not enough."""

    def __init__(self, reason: str, message: str, field: str = "", named: Mapping[str, str] | None = None) -> None:
        super().__init__(reason, message, field)
        self.named = named or {}


class RateLimitedError(PretradeError):
    """The caller asks too often.

    Attributes:
        retry_after_seconds: When to ask again.
    """

    def __init__(self, reason: str, message: str, retry_after_seconds: float) -> None:
        super().__init__(reason, message)
        self.retry_after_seconds = retry_after_seconds


class CredentialsUnknownError(PretradeError):
    """What the credentials are to be verified with is not known at the moment."""


class InternalError(PretradeError):
    """Something failed that should not have; the caller learns no more than that."""
