"""The newest decisions that match a filter, among many millions.

Two ways lead there. Walking the ids downwards finds what is common after a few rows, but would look at every row of a
day for a value that hardly ever occurs. In PostgreSQL an index of summaries (`ix_decisions_filters`) leads to the pages
in which such a value may be, but would read the whole day for one that is everywhere. PostgreSQL's planner cannot tell
in advance which way is shorter, since it does not know how values are spread over the pages. So a walk of limited
length comes first; what it does not find is rare, and is then searched for by the index.

SQLite has no such index. There the rest of the walk is the search, and a time keeps it short.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import sqlalchemy as sa

from server.audit.store.schema import DECISIONS, JOURNAL_ENTRIES
from server.decision.ids import id_bound, made_at

Matching = Callable[[sa.ColumnCollection[str, Any]], Sequence[sa.ColumnElement[bool]]]
"""The conditions of a filter, on columns that have the names of those of `DECISIONS`."""

CLOCK_ERROR: Final = dt.timedelta(minutes=1)
"""A decision gets its id while it is made; more than this lies between only when the wall clock was set."""
_NONE: Final = dt.timedelta()
_WALKS: Final = (50_000, 500_000)
"""Rows that a walk looks at, at most; the second one is worth its time only if the first one found a few."""
_FEW: Final = 5
_REPLY: Final = ("reply_status", "heard_action", "heard_reasons")
_PAGE: Final = ("decision_id", *_REPLY, "journal_id", "journal_position", "journal_row", "shipped_at")
_FILTERED: Final = ("instrument", "strategy", "action", "source", "model_name", "model_version")
"""Columns that a filter restricts, besides those of a page."""
_OLDEST: Final = dt.datetime(1970, 1, 2, tzinfo=dt.UTC)
_NEWEST: Final = dt.datetime(9999, 1, 1, tzinfo=dt.UTC)
"""Instants between which there are ids on both sides of an instant."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Which decisions are looked at.

    An id says when it was made, and decisions are found by their ids. A decision that was made while the wall clock was
    set by more than a minute is therefore not found by its time, but by its id and in lists without bounds.
    """

    before: str = ""
    """All ids are less than this one; empty for no bound."""
    since: dt.datetime | None = None
    """Decided at this instant or later."""
    until: dt.datetime | None = None
    """Decided before this instant."""

    def of_times(self) -> list[sa.ColumnElement[bool]]:
        """Conditions on the time, which choose the partitions."""
        at = DECISIONS.c.decided_at
        since = [] if self.since is None else [at >= self.since]
        return since if self.until is None else [*since, at < self.until]

    def of_ids(self, decision_id: sa.ColumnElement[str] = DECISIONS.c.decision_id) -> list[sa.ColumnElement[bool]]:
        """Conditions on the id, which say where a walk begins and ends; on that of another table if one is named."""
        first, last = self.ids()
        found = [decision_id >= first] if first else []
        return [*found, decision_id < last] if last else found

    def ids(self, disorder: dt.timedelta = _NONE) -> tuple[str, str]:
        """The smallest id that is looked at, and the smallest one beyond; empty for no bound.

        Args:
            disorder: How much later than an id the last of all that are less may be: that far one has to look.
        """
        first, last = "", self.before
        if disorder:
            at = made_at(self.before)
            last = "" if at is None else id_bound(at + disorder)
        if self.since is not None and self.since > _OLDEST:
            first = id_bound(self.since - CLOCK_ERROR)
        if self.until is not None and self.until < _NEWEST:
            until = id_bound(self.until + CLOCK_ERROR)
            last = min(last, until) if last else until
        return first, last


def read(connection: sa.Connection, matching: Matching, limit: int, bounds: Bounds) -> list[sa.Row[Any]]:
    """The rows: what became of the reply, the decision's place, and the evidence: `entry` and `hash`.

    Decisions that stand side by side are mostly in the same entry. Only the first of them brings it.

    Args:
        connection: A new transaction, which is used for nothing else.
        matching: The filter.
        limit: Most rows.
        bounds: Where to look.
    """
    found: list[sa.Row[Any]] = []
    for length in _WALKS:
        found += connection.execute(walk(matching, limit - len(found), bounds, length)).all()
        if len(found) >= limit:
            return found
        end = connection.scalar(walk_end(bounds, length))
        if end is None:
            return found
        bounds = replace(bounds, before=end)
        if len(found) < _FEW:
            break
    if connection.dialect.name == "postgresql":
        prefer_summaries(connection)
        return found + list(connection.execute(search(matching, limit - len(found), bounds)).all())
    return found + list(connection.execute(walk(matching, limit - len(found), bounds, None)).all())


def walk(matching: Matching, limit: int, bounds: Bounds, length: int | None) -> sa.Select[Any]:
    """Those of the newest `length` decisions that match, or of all; reads no further than it has to."""
    columns = (DECISIONS.c[name] for name in (*_PAGE, *_FILTERED))
    newest = sa.select(*columns).where(*bounds.of_times(), *bounds.of_ids()).order_by(DECISIONS.c.decision_id.desc())
    looked_at = newest.limit(length).subquery("looked_at")
    return _with_evidence(sa.select(*(looked_at.c[name] for name in _PAGE)).where(*matching(looked_at.c)), limit)


def walk_end(bounds: Bounds, length: int) -> sa.Select[Any]:
    """The lowest id that a walk looks at; nothing if it comes to the end before."""
    ids = sa.select(DECISIONS.c.decision_id).where(*bounds.of_times(), *bounds.of_ids())
    return ids.order_by(DECISIONS.c.decision_id.desc()).offset(length - 1).limit(1)


def search(matching: Matching, limit: int, bounds: Bounds) -> sa.Select[Any]:
    """All decisions that match, by the pages in which they may be."""
    query = sa.select(*(DECISIONS.c[name] for name in _PAGE)).where(*matching(DECISIONS.c), *bounds.of_times())
    if bounds.before:
        # Not as a plain column: nearly all ids are below, and PostgreSQL must not fetch them by their own index.
        query = query.where(sa.func.concat(DECISIONS.c.decision_id) < bounds.before)
    return _with_evidence(query, limit)


def prefer_summaries(connection: sa.Connection) -> None:
    """Leaves PostgreSQL no way to the rows of this transaction but by the pages that an index names."""
    for way in ("indexscan", "indexonlyscan", "seqscan"):
        connection.exec_driver_sql(f"SET LOCAL enable_{way} = off")


def _with_evidence(decisions: sa.Select[Any], limit: int) -> sa.Select[Any]:
    """The newest decisions of a query, joined with their journal entries: with those of this page and no others."""
    chosen = decisions.order_by(decisions.selected_columns.decision_id.desc()).limit(limit).subquery("chosen")
    of_entry = sa.func.row_number().over(
        partition_by=(chosen.c.journal_id, chosen.c.journal_position), order_by=chosen.c.decision_id.desc()
    )
    page = sa.select(*chosen.c, of_entry.label("of_entry")).subquery("page")
    entries = JOURNAL_ENTRIES.c
    first_of_entry = (
        page.c.of_entry == 1,
        entries.journal_id == page.c.journal_id,
        entries.position == page.c.journal_position,
        entries.shipped_at == page.c.shipped_at,
    )
    columns = (page.c[name] for name in (*_REPLY, "journal_id", "journal_position", "journal_row"))
    return (
        sa.select(*columns, entries.entry, entries.hash)
        .join_from(page, JOURNAL_ENTRIES, sa.and_(*first_of_entry), isouter=True)
        .order_by(page.c.decision_id.desc())
    )
