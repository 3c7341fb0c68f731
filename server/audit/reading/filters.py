"""What a question about decisions says, checked and in the words of the columns."""

from __future__ import annotations

import base64
import binascii
import datetime as dt

from pretrade.audit.v1 import audit_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.errors import InvalidRequestError


def instants(wanted: audit_pb2.DecisionFilter) -> tuple[dt.datetime | None, dt.datetime | None]:
    """Since and until, UTC; None for no bound. Raises InvalidRequestError."""
    try:
        return (
            wanted.since.ToDatetime(dt.UTC) if wanted.HasField("since") else None,
            wanted.until.ToDatetime(dt.UTC) if wanted.HasField("until") else None,
        )
    except (ValueError, OverflowError) as error:
        raise InvalidRequestError(f"filter: since and until must be valid instants: {error}") from error


def check_text(wanted: audit_pb2.DecisionFilter) -> None:
    """Raises InvalidRequestError where a text cannot be asked for."""
    for text in (*wanted.instruments, *wanted.strategies, wanted.model):
        if "\0" in text:  # which PostgreSQL cannot store, nor be asked for
            raise InvalidRequestError("filter: no text may hold a NUL character")


def short_names(enum: type[pb.Action] | type[pb.Source], values: object, prefix: str) -> list[str]:
    """What the columns call these values; values of no name are left out."""
    known = enum.DESCRIPTOR.values_by_number
    return [known[value].name.removeprefix(prefix) for value in values if value in known]  # type: ignore[attr-defined]


def token(decision_id: str) -> str:
    """The page token that goes on after a decision."""
    return base64.urlsafe_b64encode(decision_id.encode()).decode()


def read_token(token: str) -> str:
    """The decision id in a page token. Raises InvalidRequestError."""
    try:
        decision_id = base64.b64decode(token, altchars=b"-_", validate=True).decode()
        if "\0" in decision_id:
            raise ValueError("not a decision id")
        return decision_id
    except (ValueError, binascii.Error) as error:
        raise InvalidRequestError("page_token: must be the next_page_token of a page before") from error
