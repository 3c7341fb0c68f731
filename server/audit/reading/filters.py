"""What a question about decisions says, checked and in the words of the columns."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from pretrade.audit.v1 import audit_pb2
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store.newest import Matching
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


def conditions(wanted: audit_pb2.DecisionFilter) -> Matching:
    """What the columns of a decision must be; the time is not among it."""

    def matching(columns: sa.ColumnCollection[str, Any]) -> list[sa.ColumnElement[bool]]:
        decided = _short_names(pb.Action, wanted.decided_actions)
        heard = _short_names(audit_pb2.HeardAction, wanted.heard_actions)
        sources = _short_names(pb.Source, wanted.sources)
        restrictions: tuple[tuple[object, sa.ColumnElement[bool]], ...] = (
            (wanted.instruments, columns.instrument.in_(wanted.instruments)),
            (wanted.strategies, columns.strategy.in_(wanted.strategies)),
            (wanted.decided_actions, columns.action.in_(decided)),
            (wanted.heard_actions, columns.heard_action.in_(heard)),
            (wanted.sources, columns.source.in_(sources)),
            (wanted.model, sa.or_(columns.model_name == wanted.model, columns.model_version == wanted.model)),
        )
        return [condition for given, condition in restrictions if given]

    return matching


def _short_names(
    enum: type[pb.Action] | type[pb.Source] | type[audit_pb2.HeardAction], values: Iterable[int]
) -> list[str]:
    """What the columns call these values; values of no name are left out."""
    known = enum.DESCRIPTOR.values_by_number
    return [enum_name(enum, value) for value in values if value in known]


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
