"""Journals that nobody writes and nobody ships: their decisions are on this disk alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from pretrade.client.file_lock import take_lock
from server.journal.journal_file import JournalReader, journals_of


def stranded(path: Path, shipped: Mapping[str, int]) -> dict[str, int]:
    """Entries that are not in the database, by the name of a journal that no process writes.

    A journal is such a one for moments, when its process has ended and the next one has not begun. So only what stays
    stranded says something.

    Args:
        path: Where a server keeps its journal, or those of its processes.
        shipped: Position through which each journal was shipped, by journal id.

    Raises:
        JournalError, sqlite3.Error, OSError: One of them cannot be read.
    """
    found: dict[str, int] = {}
    for one in journals_of(path):
        if not one.exists() or _is_written(one):
            continue
        with closing(JournalReader(one)) as journal:
            done = max(journal.anchor().position, shipped.get(journal.journal_id, 0))
            if left := journal.last_position() - done:
                found[one.name] = left
    return found


def _is_written(journal: Path) -> bool:
    """True while a process has the right to write it. A process that is about to take it tries for half a second."""
    try:
        lock = take_lock(journal.with_name(f"{journal.name}.lock"), create=False, shared=True)
    except FileNotFoundError:
        return False
    if lock is None:
        return True
    os.close(lock)
    return False
