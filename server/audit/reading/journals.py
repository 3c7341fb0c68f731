"""The journals of a server, one of each of its processes, read together beside their writers."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from pretrade.audit.v1 import audit_pb2, packet_pb2
from server.audit.reading import filters
from server.errors import AuditUnavailableError, InvalidRequestError, JournalError
from server.journal.journal_file import Head, JournalReader, Row, journals_of
from server.journal.reply_status import REPLIED, UNSETTLED, Statuses

T = TypeVar("T")

_CURSOR: Final = re.compile(r"[0-9a-f]{32}:[0-9]{1,18}(?:,[0-9a-f]{32}:[0-9]{1,18}){0,199}")
_WATCHED_ROWS: Final = 250
"""Rows of a journal that one step of a watch looks at, so that no step is long."""
_CHUNK: Final = 1_000


@dataclass(frozen=True, slots=True)
class Step:
    """What a watch got to see at once."""

    events: list[audit_pb2.WatchDecisionsResponse]
    """What matched."""
    cursor: str
    """Where to go on."""
    more: bool
    """True when there are rows left to look at."""


class Journals:
    """Reads the journals of a server; used by one thread.

    Args:
        path: Where the server keeps its journal, or those of its processes (`<path>.<i>`); None: there is none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def each(self, read: Callable[[JournalReader], T], problems: list[str]) -> Iterator[T]:
        """What `read` makes of each journal; one that cannot be read is added to `problems` instead."""
        for path in [] if self._path is None else journals_of(self._path):
            try:
                with closing(JournalReader(path)) as journal:
                    yield read(journal)
            except (JournalError, sqlite3.Error, OSError) as error:
                problems.append(f"the journal {path.name}: {error}")

    def find(self, decision_id: str, problems: list[str]) -> audit_pb2.AuditedDecision | None:
        """A decision that a journal still holds."""
        wanted = decision_id.encode()
        statuses = Statuses()

        def read(journal: JournalReader) -> audit_pb2.AuditedDecision | None:
            said: list[packet_pb2.JournalEntry] = []
            settled = journal.settled()
            try:
                for row in journal.newest_first():
                    if wanted not in row.entry:  # far cheaper than taking every packet apart
                        continue
                    entry = entry_of(row)
                    if entry.decision.decision.decision_id == decision_id:
                        status = REPLIED if row.position <= settled else UNSETTLED
                        return audited(entry.decision, row, status, "journal", journal.journal_id)
                    said.append(entry)
            finally:
                for entry in reversed(said):
                    statuses.add(entry)
            return None

        found: audit_pb2.AuditedDecision | None = None
        for one in self.each(read, problems):
            found = found or one
            if found is not None and not found.packet.order.idempotency_key:
                break  # the call was not repeated, so that no other process had to do with it
        if found is not None:
            found.reply_status = statuses.of(decision_id, otherwise=found.reply_status)
        return found

    def reach_back_to(self, decision_id: str) -> bool:
        """True when every journal holds all that was written to it since a decision: ids are time-ordered."""
        problems: list[str] = []

        def read(journal: JournalReader) -> bool:
            anchor = journal.anchor().position
            ids = (entry_of(row).decision.decision.decision_id for row in _rows_after(journal, anchor))
            oldest = next(filter(None, ids), None)
            return anchor == 0 or (oldest is not None and oldest <= decision_id)

        return all(list(self.each(read, problems))) and not problems

    def find_settings(self, config_hash: str) -> packet_pb2.SettingsInForce | None:
        """The settings with this hash, which a server writes down when it starts; None when no journal holds them."""
        wanted = config_hash.encode()

        def read(journal: JournalReader) -> packet_pb2.SettingsInForce | None:
            rows = _rows_after(journal, journal.anchor().position)
            found = (entry_of(row).settings for row in rows if wanted in row.entry)
            return next((one for one in found if one.config_hash == config_hash), None)

        return next(filter(None, self.each(read, [])), None)

    def after(self, wanted: audit_pb2.WatchDecisionsRequest) -> Step:
        """What the journals hold beyond a cursor, some rows of it.

        Raises:
            InvalidRequestError: The cursor is not one, or the filter breaks a rule.
            AuditUnavailableError: No journal can be read.
        """
        filters.instants(wanted.filter)
        positions = _positions(wanted.cursor)
        anew = not positions
        events: list[audit_pb2.WatchDecisionsResponse] = []
        problems: list[str] = []

        def add(event: audit_pb2.WatchDecisionsResponse, journal_id: str, position: int) -> None:
            positions[journal_id] = position
            event.cursor = _cursor(positions)
            events.append(event)

        def read(journal: JournalReader) -> bool:
            name, anchor = journal.journal_id, journal.anchor().position
            if anew:
                positions[name] = anchor if wanted.from_oldest else journal.settled()
                return wanted.from_oldest
            # A journal the cursor does not name came later: all that it holds is new.
            position = positions.setdefault(name, 0)
            if position < anchor:
                missed = audit_pb2.Missed(journal_id=name, first_position=position + 1, last_position=anchor)
                add(audit_pb2.WatchDecisionsResponse(missed=missed), name, anchor)
            rows = journal.settled_rows_after(positions[name], _WATCHED_ROWS)
            for row in rows:
                entry = entry_of(row)
                if entry.HasField("decision") and matches(wanted.filter, entry.decision):
                    decision = audited(entry.decision, row, REPLIED, "journal", name)
                    add(audit_pb2.WatchDecisionsResponse(decision=decision), name, row.position)
                elif entry.HasField("reply_unconfirmed"):
                    note = audit_pb2.WatchDecisionsResponse(reply_unconfirmed=entry.reply_unconfirmed)
                    add(note, name, row.position)
                elif entry.HasField("reply_heard"):
                    add(audit_pb2.WatchDecisionsResponse(reply_heard=entry.reply_heard), name, row.position)
                positions[name] = row.position
            return len(rows) == _WATCHED_ROWS

        more = list(self.each(read, problems))
        if not more:
            raise AuditUnavailableError("; ".join(problems) or "there is no journal here")
        return Step(events, _cursor(positions), any(more))


def unshipped_rows(journal: JournalReader, shipped: dict[str, Head]) -> Iterator[Row]:
    """What a journal holds beyond the database, in order; all of it when the database cannot say."""
    return _rows_after(journal, (shipped.get(journal.journal_id) or journal.anchor()).position)


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


def audited(
    packet: packet_pb2.DecisionPacket, row: Row, reply_status: str, found_in: str, journal_id: str
) -> audit_pb2.AuditedDecision:
    """A decision in the contract's words."""
    return audit_pb2.AuditedDecision(
        packet=packet,
        reply_status=reply_status,
        found_in=found_in,
        journal_id=journal_id,
        position=row.position,
        hash=row.hash,
    )


def entry_of(row: Row) -> packet_pb2.JournalEntry:
    """The entry of a row; an empty one when it is of no format we know: `verify` is what judges evidence."""
    try:
        return packet_pb2.JournalEntry.FromString(row.entry)
    except DecodeError:
        return packet_pb2.JournalEntry()


def _cursor(positions: dict[str, int]) -> str:
    return ",".join(f"{journal_id}:{position}" for journal_id, position in positions.items())


def _positions(cursor: str) -> dict[str, int]:
    if cursor and not _CURSOR.fullmatch(cursor):
        raise InvalidRequestError("cursor: must be that of an event of an earlier watch")
    return {name: int(position) for name, _, position in (one.partition(":") for one in cursor.split(",") if one)}
