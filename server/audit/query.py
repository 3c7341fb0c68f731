"""Reading the audit wherever it is by now: the database, and what only the journal holds yet.

Decisions come newest first, by id: ids are time-ordered. The journal's part are the rows after the last one shipped,
so a page is the merge of two descending sequences, and nothing is missing while rows move from one to the other: the
journal is read first, and what is shipped meanwhile is in both.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import heapq
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from google.protobuf.message import DecodeError

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit import outcomes
from server.audit.columns import REPLIED, unconfirmed_status
from server.audit.errors import AuditUnavailable, InvalidRequest, JournalError, OutcomeConflict, UnknownDecision
from server.audit.journal_file import JournalReader, Row
from server.audit.labels import Label, LabelledDecision
from server.audit.schema import DECISIONS, ENTRY_OF_DECISION, JOURNAL_ENTRIES
from server.audit.store import Store

DEFAULT_PAGE: Final = 50
LARGEST_PAGE: Final = 500
_WATCHED_ROWS: Final = 250
"""Rows of the journal that one step of a watch looks at, so that no step is long."""
_CHUNK: Final = 1_000


@dataclass(frozen=True, slots=True)
class _Tail:
    """The journal's part of the audit."""

    decisions: list[audit_pb2.AuditedDecision]
    """The newest that match."""
    unconfirmed: dict[str, str]
    """Decision id → reply status, also of decisions that are in the database."""


class AuditQuery:
    """Answers questions about the audit; used by one thread.

    A database that cannot be reached leaves the journal, and the other way round.

    Args:
        database_url: SQLAlchemy URL; None for the journal alone.
        journal_path: None for the database alone.

    Raises:
        ValueError: The URL is malformed.
    """

    def __init__(self, database_url: str | None, journal_path: Path | None) -> None:
        self._store = None if database_url is None else Store(database_url)
        self._journal_path = journal_path

    def close(self) -> None:
        """Closes every connection."""
        if self._store is not None:
            self._store.close()

    def get(self, decision_id: str) -> audit_pb2.AuditedDecision:
        """One decision.

        Raises:
            UnknownDecision: It is not there.
            AuditUnavailable: It may be where we cannot look.
        """
        problems: list[str] = []
        found = self._get_stored(decision_id, problems)
        if found is None:
            found = self._get_recent(decision_id, problems)
        if found is not None:
            return found
        if problems:
            raise AuditUnavailable("; ".join(problems))
        raise UnknownDecision(f"no decision {decision_id} in the audit")

    def page(self, wanted: audit_pb2.DecisionFilter, size: int, token: str) -> audit_pb2.ListDecisionsResponse:
        """One page of the decisions that match, the newest first.

        Raises:
            InvalidRequest: Filter, size or token break a rule.
            AuditUnavailable: There is nothing that can be read.
        """
        if not 0 <= size <= LARGEST_PAGE:
            raise InvalidRequest(f"page_size: must be 1 to {LARGEST_PAGE}, or 0 for {DEFAULT_PAGE}, not {size}")
        size = size or DEFAULT_PAGE
        before = _read_token(token)
        since, until = _instants(wanted)
        problems: list[str] = []
        tail = self._tail(wanted, before, size + 1, problems)
        stored = self._stored(wanted, since, until, before, size + 1, problems)
        if len(problems) == (self._store is not None) + (self._journal_path is not None):
            raise AuditUnavailable("; ".join(problems) or "there is neither database nor journal")
        found = {one.packet.decision.decision_id: one for one in (*(tail.decisions if tail else ()), *stored)}
        for decision_id, status in (tail.unconfirmed if tail else {}).items():
            if decision_id in found:
                found[decision_id].reply_status = status
        ids = sorted(found, reverse=True)
        return audit_pb2.ListDecisionsResponse(
            decisions=[found[one] for one in ids[:size]],
            next_page_token=_token(ids[size - 1]) if len(ids) > size else "",
            incomplete="; ".join(problems),
        )

    def after(
        self, position: int, wanted: audit_pb2.DecisionFilter
    ) -> tuple[list[audit_pb2.WatchDecisionsResponse], int]:
        """What the journal holds after a position, some rows of it.

        Returns:
            The events that match, and the position up to which rows were looked at.

        Raises:
            AuditUnavailable: The journal cannot be read.
        """
        events: list[audit_pb2.WatchDecisionsResponse] = []
        try:
            if self._journal_path is None:
                raise JournalError("there is no journal here")
            with closing(JournalReader(self._journal_path)) as journal:
                anchor = journal.anchor().position
                if position < anchor:
                    missed = audit_pb2.Missed(first_position=position + 1, last_position=anchor)
                    events.append(audit_pb2.WatchDecisionsResponse(missed=missed, position=anchor))
                    position = anchor
                rows = journal.rows_after(position, _WATCHED_ROWS)
                journal_id = journal.journal_id
        except (JournalError, OSError) as error:
            raise AuditUnavailable(f"the journal: {error}") from error
        for row in rows:
            entry = _entry(row)
            if entry.HasField("decision") and matches(wanted, entry.decision):
                decision = _audited(entry.decision, row, REPLIED, "journal", journal_id)
                events.append(audit_pb2.WatchDecisionsResponse(decision=decision, position=row.position))
            elif entry.HasField("reply_unconfirmed"):
                events.append(
                    audit_pb2.WatchDecisionsResponse(reply_unconfirmed=entry.reply_unconfirmed, position=row.position)
                )
        return events, rows[-1].position if rows else position

    def settings(self, config_hash: str) -> packet_pb2.SettingsInForce | None:
        """The settings with this hash, or None."""
        if self._store is not None:
            with suppress(sa.exc.SQLAlchemyError), self._store.connect() as connection:
                found = outcomes.find_settings(connection, config_hash)
                if found is not None:
                    return found
        wanted = config_hash.encode()
        return next(
            (
                entry.settings
                for row in self._journal_rows()
                if wanted in row.entry and (entry := _entry(row)).settings.config_hash == config_hash
            ),
            None,
        )

    def packet(self, decision_id: str) -> packet_pb2.DecisionPacket | None:
        """The packet of a decision, or None."""
        try:
            return self.get(decision_id).packet
        except (UnknownDecision, AuditUnavailable):
            return None

    def outcomes(self, decision_id: str) -> list[packet_pb2.Outcome]:
        """What was reported of a decision, the oldest first.

        Raises:
            AuditUnavailable: There may be more where we cannot look.
        """
        found: dict[str, packet_pb2.Outcome] = {}
        try:
            if self._store is not None:
                with self._store.connect() as connection:
                    found = {one.reporter: one for one in outcomes.find_outcomes(connection, decision_id)}
            wanted = decision_id.encode()
            for row in self._journal_rows():
                if wanted in row.entry and (entry := _entry(row)).outcome.decision_id == decision_id:
                    found.setdefault(entry.outcome.reporter, entry.outcome)
        except sa.exc.SQLAlchemyError as error:
            raise AuditUnavailable(f"the database: {_line(error)}") from error
        return sorted(found.values(), key=lambda outcome: outcome.recorded_at_ns)

    def labelled(
        self, since: dt.datetime | None, until: dt.datetime | None, horizon_seconds: float
    ) -> list[LabelledDecision]:
        """The decisions of a time that have a label; none without a database.

        Raises:
            AuditUnavailable: The database cannot be read.
        """
        if self._store is None:
            raise AuditUnavailable("labels are in the database, and there is none here")
        columns = DECISIONS.c
        query = (
            sa.select(columns.action, columns.source, columns.score, outcomes.LABELS.c.eligible)
            .join_from(DECISIONS, outcomes.LABELS, columns.decision_id == outcomes.LABELS.c.decision_id)
            .where(outcomes.LABELS.c.horizon_seconds == horizon_seconds)
        )
        if since is not None:
            query = query.where(columns.decided_at >= since)
        if until is not None:
            query = query.where(columns.decided_at < until)
        try:
            with self._store.connect() as connection:
                return [LabelledDecision(*row) for row in connection.execute(query)]
        except sa.exc.SQLAlchemyError as error:
            raise AuditUnavailable(f"the database: {_line(error)}") from error

    def add_labels(self, labels: Iterable[Label], horizon_seconds: float) -> None:
        """Stores labels; one that is there already is left as it is.

        Raises:
            AuditUnavailable: The database cannot be written, or there is none.
        """
        if self._store is None:
            raise AuditUnavailable("labels go into the database, and there is none here")
        rows = [
            {
                "decision_id": label.decision_id,
                "horizon_seconds": horizon_seconds,
                "markout_bps": label.markout_bps,
                "eligible": label.eligible,
            }
            for label in labels
        ]
        try:
            self._store.add_labels(rows)
        except sa.exc.SQLAlchemyError as error:
            raise AuditUnavailable(f"the database: {_line(error)}") from error

    def recorded(self, outcome: packet_pb2.Outcome) -> packet_pb2.Outcome | None:
        """The same outcome as it was recorded before; None when there is none of this reporter.

        Raises:
            UnknownDecision, AuditUnavailable: As `get`.
            OutcomeConflict: The reporter said something else.
        """
        self.get(outcome.decision_id)
        before = next((one for one in self.outcomes(outcome.decision_id) if one.reporter == outcome.reporter), None)
        if before is not None and not outcomes.same_outcome(before, outcome):
            raise OutcomeConflict(f"{outcome.reporter} recorded another outcome of {outcome.decision_id} before")
        return before

    def _get_stored(self, decision_id: str, problems: list[str]) -> audit_pb2.AuditedDecision | None:
        if self._store is None:
            return None
        try:
            stored = self._store.find(decision_id)
        except sa.exc.SQLAlchemyError as error:
            problems.append(f"the database: {_line(error)}")
            return None
        if stored is None:
            return None
        return _audited(_entry(stored.row).decision, stored.row, stored.reply_status, "database", stored.journal_id)

    def _get_recent(self, decision_id: str, problems: list[str]) -> audit_pb2.AuditedDecision | None:
        if self._journal_path is None:
            return None
        wanted = decision_id.encode()
        status = REPLIED
        try:
            with closing(JournalReader(self._journal_path)) as journal:
                for row in journal.newest_first():
                    if wanted not in row.entry:
                        continue
                    entry = _entry(row)
                    if entry.reply_unconfirmed.decision_id == decision_id and status == REPLIED:
                        status = unconfirmed_status(entry.reply_unconfirmed.cause)
                    if entry.decision.decision.decision_id == decision_id:
                        return _audited(entry.decision, row, status, "journal", journal.journal_id)
        except (JournalError, OSError) as error:
            problems.append(f"the journal: {error}")
        return None

    def _tail(self, wanted: audit_pb2.DecisionFilter, before: str, limit: int, problems: list[str]) -> _Tail | None:
        """What the journal holds beyond the database."""
        if self._journal_path is None:
            return None
        try:
            with closing(JournalReader(self._journal_path)) as journal:
                start = self._shipped(journal)
                unconfirmed: dict[str, str] = {}

                def matching() -> Iterator[audit_pb2.AuditedDecision]:
                    for row in _rows_after(journal, start):
                        entry = _entry(row)
                        note, packet = entry.reply_unconfirmed, entry.decision
                        if note.decision_id:
                            unconfirmed[note.decision_id] = unconfirmed_status(note.cause)
                        elif (not before or packet.decision.decision_id < before) and matches(wanted, packet):
                            yield _audited(packet, row, REPLIED, "journal", journal.journal_id)

                # The database may have been away for hours: only a page of what it lacks is kept in memory.
                newest = heapq.nlargest(limit, matching(), key=lambda one: one.packet.decision.decision_id)
                return _Tail(newest, unconfirmed)
        except (JournalError, OSError) as error:
            problems.append(f"the journal: {error}")
            return None

    def _shipped(self, journal: JournalReader) -> int:
        """How far the journal was shipped; where its rows begin when the database cannot say."""
        if self._store is not None:
            with suppress(sa.exc.SQLAlchemyError):
                head = self._store.journals().get(journal.journal_id)
                if head is not None:
                    return head.position
        return journal.anchor().position

    def _stored(
        self,
        wanted: audit_pb2.DecisionFilter,
        since: dt.datetime | None,
        until: dt.datetime | None,
        before: str,
        limit: int,
        problems: list[str],
    ) -> list[audit_pb2.AuditedDecision]:
        if self._store is None:
            return []
        columns = DECISIONS.c
        query = (
            sa.select(
                columns.reply_status,
                columns.journal_id,
                JOURNAL_ENTRIES.c.position,
                JOURNAL_ENTRIES.c.entry,
                JOURNAL_ENTRIES.c.hash,
            )
            .join_from(DECISIONS, JOURNAL_ENTRIES, ENTRY_OF_DECISION)
            .order_by(columns.decision_id.desc())
            .limit(limit)
        )
        conditions: tuple[tuple[object, sa.ColumnElement[bool] | None], ...] = (
            (before, columns.decision_id < before),
            (since, None if since is None else columns.decided_at >= since),
            (until, None if until is None else columns.decided_at < until),
            (wanted.instruments, columns.instrument.in_(wanted.instruments)),
            (wanted.strategies, columns.strategy.in_(wanted.strategies)),
            (wanted.actions, columns.action.in_(_short_names(pb.Action, wanted.actions, "ACTION_"))),
            (wanted.sources, columns.source.in_(_short_names(pb.Source, wanted.sources, "SOURCE_"))),
            (wanted.model, sa.or_(columns.model_name == wanted.model, columns.model_version == wanted.model)),
        )
        query = query.where(*(condition for given, condition in conditions if given and condition is not None))
        try:
            with self._store.connect() as connection:
                rows = connection.execute(query).all()
        except sa.exc.SQLAlchemyError as error:
            problems.append(f"the database: {_line(error)}")
            return []
        return [
            _audited(
                _entry(row := Row(found.position, found.entry, found.hash)).decision,
                row,
                found.reply_status,
                "database",
                found.journal_id,
            )
            for found in rows
        ]

    def _journal_rows(self) -> Iterator[Row]:
        """Every row of the journal, the newest first; none when it cannot be read."""
        if self._journal_path is not None:
            with suppress(JournalError, OSError), closing(JournalReader(self._journal_path)) as journal:
                yield from journal.newest_first()


def _rows_after(journal: JournalReader, position: int) -> Iterator[Row]:
    while rows := journal.rows_after(position, _CHUNK):
        yield from rows
        position = rows[-1].position


def matches(wanted: audit_pb2.DecisionFilter, packet: packet_pb2.DecisionPacket) -> bool:
    """True when a filter lets a decision through; a packet of something else never does."""
    decision, order = packet.decision, packet.order
    if not decision.decision_id:
        return False
    at = decision.decided_at.ToNanoseconds()
    return (
        (not wanted.HasField("since") or at >= wanted.since.ToNanoseconds())
        and (not wanted.HasField("until") or at < wanted.until.ToNanoseconds())
        and (not wanted.instruments or order.instrument in wanted.instruments)
        and (not wanted.strategies or order.strategy in wanted.strategies)
        and (not wanted.actions or decision.action in wanted.actions)
        and (not wanted.sources or decision.source in wanted.sources)
        and (not wanted.model or wanted.model in (decision.model_name, decision.model_version))
    )


def _audited(
    packet: packet_pb2.DecisionPacket, row: Row, reply_status: str, found_in: str, journal_id: str
) -> audit_pb2.AuditedDecision:
    return audit_pb2.AuditedDecision(
        packet=packet,
        reply_status=reply_status,
        found_in=found_in,
        journal_id=journal_id,
        position=row.position,
        hash=row.hash,
    )


def _entry(row: Row) -> packet_pb2.JournalEntry:
    """The entry of a row; an empty one when it is of no format we know: `verify` is what judges evidence."""
    try:
        return packet_pb2.JournalEntry.FromString(row.entry)
    except DecodeError:
        return packet_pb2.JournalEntry()


def _instants(wanted: audit_pb2.DecisionFilter) -> tuple[dt.datetime | None, dt.datetime | None]:
    try:
        return (
            wanted.since.ToDatetime(dt.UTC) if wanted.HasField("since") else None,
            wanted.until.ToDatetime(dt.UTC) if wanted.HasField("until") else None,
        )
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"filter: since and until must be valid instants: {error}") from error


def _short_names(enum: type[pb.Action] | type[pb.Source], values: object, prefix: str) -> list[str]:
    known = enum.DESCRIPTOR.values_by_number
    return [known[value].name.removeprefix(prefix) for value in values if value in known]  # type: ignore[attr-defined]


def _token(decision_id: str) -> str:
    return base64.urlsafe_b64encode(decision_id.encode()).decode()


def _read_token(token: str) -> str:
    try:
        return base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (ValueError, binascii.Error) as error:
        raise InvalidRequest("page_token: must be the next_page_token of a page before") from error


def _line(error: sa.exc.SQLAlchemyError) -> str:
    """One line, without the statement and its parameters."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error
    return f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
