"""Checking that nothing in the audit was changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from server.audit.journal_file import Head, JournalReader, journals_of
from server.audit.store import Store


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
