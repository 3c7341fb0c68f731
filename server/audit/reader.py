"""Finding one decision, wherever it is by now, and checking that nothing was changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from pretrade.audit.v1 import packet_pb2
from server.audit.columns import REPLIED, unconfirmed_status
from server.audit.errors import JournalError, UnknownDecision
from server.audit.journal_file import Head, JournalReader, Row, journals_of
from server.audit.store import Store


@dataclass(frozen=True, slots=True)
class AuditedDecision:
    """A decision as it was audited."""

    packet: packet_pb2.DecisionPacket
    reply_status: str
    """`replied` or `reply_unconfirmed:<cause>`."""
    found_in: str
    """`database` or `journal`."""
    journal_id: str
    row: Row


@dataclass(frozen=True, slots=True)
class Verified:
    """A stretch of a journal that is as it was written."""

    where: str
    """`database` or `journal`."""
    journal_id: str
    first: int
    """First position; 0 when there are no rows."""
    last: int


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A place that could not be checked, which proves nothing about it."""

    where: str
    why: str


def get_decision(database_url: str | None, journal_path: Path | None, decision_id: str) -> AuditedDecision:
    """Looks a decision up in SQL, then in the journal, where the newest ones are.

    Args:
        database_url: SQLAlchemy URL of the audit database; None to leave it out.
        journal_path: The journal, those of all places with it; None to leave it out.
        decision_id: The id in the reply.

    Raises:
        UnknownDecision: Not found, with the places where it was looked for.
    """
    looked: list[str] = []
    if database_url is not None:
        with closing(Store(database_url)) as store:
            try:
                stored = store.find(decision_id)
                looked.append("the database")
            except sa.exc.SQLAlchemyError as error:
                stored = None
                looked.append(f"the database (which failed: {str(error).splitlines()[0]})")
        if stored is not None:
            packet = packet_pb2.JournalEntry.FromString(stored.row.entry).decision
            return AuditedDecision(packet, stored.reply_status, "database", stored.journal_id, stored.row)
    for path in journals_of(journal_path) if journal_path is not None else []:
        try:
            found = _in_journal(path, decision_id)
            looked.append("the journal")
        except JournalError as error:
            found = None
            looked.append(f"the journal (which failed: {error})")
        if found is not None:
            return found
    raise UnknownDecision(f"no decision {decision_id} in {' or '.join(looked) or 'no place at all'}")


def verify(database_url: str | None, journal_path: Path | None) -> Iterator[Verified | Unreachable]:
    """Walks every hash chain that can be reached: in the database, then in the journal, and where the two meet.

    Raises:
        JournalCorrupted: A row is missing or was changed; with its position.
        JournalError: The journal cannot be read.
    """
    shipped: dict[str, Head] = {}
    if database_url is not None:
        with closing(Store(database_url)) as store:
            try:
                shipped = store.journals()
                for journal_id in shipped:
                    first, last = store.verify(journal_id)
                    yield Verified("database", journal_id, first, last)
            except sa.exc.SQLAlchemyError as error:
                yield Unreachable("database", str(error).splitlines()[0])
    for path in journals_of(journal_path) if journal_path is not None else []:
        with closing(JournalReader(path)) as journal:
            anchor, head = journal.verify(shipped.get(journal.journal_id))
            yield Verified("journal", journal.journal_id, anchor.position + 1 if head != anchor else 0, head.position)


def _in_journal(path: Path, decision_id: str) -> AuditedDecision | None:
    wanted = decision_id.encode()
    reply_status = REPLIED
    with closing(JournalReader(path)) as journal:
        for row in journal.newest_first():
            if wanted not in row.entry:  # far cheaper than taking every packet apart
                continue
            entry = packet_pb2.JournalEntry.FromString(row.entry)
            if entry.reply_unconfirmed.decision_id == decision_id and reply_status == REPLIED:
                reply_status = unconfirmed_status(entry.reply_unconfirmed.cause)
            if entry.decision.decision.decision_id == decision_id:
                return AuditedDecision(entry.decision, reply_status, "journal", journal.journal_id, row)
    return None
