"""The history of changes: what the database holds, and what only the journals hold yet."""

from __future__ import annotations

import base64
import binascii
import datetime as dt
from collections.abc import Iterator
from typing import Final

import sqlalchemy as sa

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import packet_pb2
from server.audit.reading.journals import Journals, unshipped_others
from server.audit.store.schema import CONTROL_CHANGES, JOURNAL_ENTRIES
from server.audit.store.store import Store
from server.control.recorded import recorded
from server.errors import AuditUnavailableError, InvalidRequestError
from server.journal.entries import entry_of
from server.journal.journal_file import Head, JournalReader, Kind

_DEFAULT_PAGE: Final = 50
_LARGEST_PAGE: Final = 1_000
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

_Place = tuple[int, str]
"""A change's place in the history: microseconds since the Unix epoch, and its id."""


def list_changes(
    request: admin_pb2.ListChangesRequest,
    store: Store | None,
    journals: Journals,
    shipped: dict[str, Head],
) -> admin_pb2.ListChangesResponse:
    """One page of the changes, the newest first.

    Raises:
        InvalidRequestError: Size, token or instant break a rule.
        AuditUnavailableError: There is nothing that can be read.
    """
    size = request.page_size or _DEFAULT_PAGE
    if size > _LARGEST_PAGE:
        raise InvalidRequestError(f"page_size: must be 1 to {_LARGEST_PAGE}, or 0 for {_DEFAULT_PAGE}, not {size}")
    if "\0" in request.subject:
        raise InvalidRequestError("subject: must not hold a NUL character")
    before, since = _read_token(request.page_token), _since(request)
    problems: list[str] = []

    def read(journal: JournalReader) -> list[admin_pb2.Change]:
        rows = unshipped_others(journal, shipped, (Kind.CONTROL_CHANGE,))
        entries = (entry_of(row.entry) for row in rows)
        return [recorded(entry.control_change) for entry in entries if entry.HasField("control_change")]

    tails = list(journals.each(read, problems))
    stored: list[admin_pb2.Change] = []
    try:
        if store is not None:
            with store.connect() as connection:
                stored = list(_stored(connection, request.subject, since, before, size + 1))
    except sa.exc.SQLAlchemyError as error:
        problems.append(f"the database: {str(error.__cause__ or error).splitlines()[0]}")
        if not tails:
            raise AuditUnavailableError("; ".join(problems)) from error
    found = {_place(change): change for changes in (stored, *tails) for change in changes}
    places = sorted(
        (
            place
            for place, change in found.items()
            if place < before and place[0] >= since and _is_below(change.subject, request.subject)
        ),
        reverse=True,
    )
    return admin_pb2.ListChangesResponse(
        changes=[found[place] for place in places[:size]],
        next_page_token=_token(places[size - 1]) if len(places) > size else "",
        problems=problems,
    )


def _stored(
    connection: sa.Connection, subject: str, since: int, before: _Place, limit: int
) -> Iterator[admin_pb2.Change]:
    columns = CONTROL_CHANGES.c
    instant = _EPOCH + dt.timedelta(microseconds=before[0])
    query = (
        sa.select(CONTROL_CHANGES, JOURNAL_ENTRIES.c.entry)
        .join_from(
            CONTROL_CHANGES,
            JOURNAL_ENTRIES,
            sa.and_(
                JOURNAL_ENTRIES.c.journal_id == columns.journal_id,
                JOURNAL_ENTRIES.c.position == columns.journal_position,
            ),
            isouter=True,  # evidence may be gone with its day; changes are kept for ever
        )
        .where(
            sa.or_(columns.changed_at < instant, sa.and_(columns.changed_at == instant, columns.change_id < before[1])),
            columns.changed_at >= _EPOCH + dt.timedelta(microseconds=since),
        )
        .order_by(columns.changed_at.desc(), columns.change_id.desc())
        .limit(limit)
    )
    if subject:
        query = query.where(
            sa.or_(columns.subject == subject, columns.subject.startswith(f"{subject}/", autoescape=True))
        )
    for row in connection.execute(query).mappings():
        if row["entry"] is not None:
            yield recorded(entry_of(row["entry"]).control_change)
            continue
        changed_at = row["changed_at"]
        if changed_at.tzinfo is None:
            changed_at = changed_at.replace(tzinfo=dt.UTC)
        microseconds = (changed_at - _EPOCH) // dt.timedelta(microseconds=1)
        names = ("change_id", "subject", "previous", "value", "author", "reason", "instance_id")
        kept = {name: row[name] for name in names}
        yield recorded(packet_pb2.ControlChange(**kept, changed_at_ns=microseconds * 1_000))


def _place(change: admin_pb2.Change) -> _Place:
    return change.changed_at.ToMicroseconds(), change.change_id


def _is_below(subject: str, wanted: str) -> bool:
    return not wanted or subject == wanted or subject.startswith(f"{wanted}/")


def _since(request: admin_pb2.ListChangesRequest) -> int:
    if not request.HasField("since"):
        return 0
    try:
        request.since.ToDatetime(dt.UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidRequestError(f"since: must be a valid instant: {error}") from error
    return max(0, request.since.ToMicroseconds())


_NEWEST: Final = 9_000 * 365 * 86_400 * 1_000_000 // 4
"""Microseconds after which nothing was changed yet, and which is an instant still."""


def _token(place: _Place) -> str:
    return base64.urlsafe_b64encode(f"{place[0]}:{place[1]}".encode()).decode()


def _read_token(token: str) -> _Place:
    if not token:
        return _NEWEST, ""
    try:
        microseconds, _, change_id = base64.b64decode(token, altchars=b"-_", validate=True).decode().partition(":")
        if "\0" in change_id or not 0 <= int(microseconds) <= _NEWEST:
            raise ValueError("not a place in the history")
        return int(microseconds), change_id
    except (ValueError, binascii.Error) as error:
        raise InvalidRequestError("page_token: must be the next_page_token of a page before") from error
