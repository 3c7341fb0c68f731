"""What can keep a call from getting a decision. None of these knows a transport; `rpc/status.py` maps them.

PretradeError
├── InvalidOrderError     the caller must change the order
├── KeyReusedError        the caller must use a new idempotency key
├── OverloadedError       the caller may try again shortly
├── DeadlineError         the caller asked for an answer sooner than one could be given
├── DrainingError         the caller should go to another server
└── InternalError         nobody's fault but ours: logged with its traceback
"""

from __future__ import annotations


class PretradeError(Exception):
    """A call that gets no decision.

    Attributes:
        reason: Stable, machine-readable, UPPER_SNAKE_CASE.
        field: The field to blame; empty when there is none.
    """

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


class InternalError(PretradeError):
    """Something failed that should not have; the caller learns no more than that."""
