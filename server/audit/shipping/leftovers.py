"""Settles and ships what an ended process left in its journal, while no process writes that journal."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path

import structlog

from server.audit.shipping.heads import slot_of
from server.audit.shipping.shipping import Progress, ShippingSettings, Task
from server.errors import JournalError
from server.journal.journal import Left, settle_what_was_left
from server.machine import REAL
from server.process import child

_log = structlog.get_logger(__name__)


async def ship_leftovers(
    journal: Path, database_url: str, settings: ShippingSettings, left: Left | None = None
) -> None:
    """Ships a journal that no process writes, however long the database takes. Cancel it before a process writes again.

    It first marks the decisions of which the process could not note any more whether their callers received them.

    Args:
        journal: The journal's file; it need not be there.
        database_url: SQLAlchemy URL of the audit database.
        settings: How.
        left: Told what the ended process left, if anybody wants to know.
    """
    try:
        await ship_left(journal, database_url, settings, left)
    except (JournalError, sqlite3.Error, OSError) as error:
        _log.error("journal_left_unshipped", path=str(journal), error=str(error))


async def ship_left(
    journal: Path,
    database_url: str,
    settings: ShippingSettings,
    left: Left | None = None,
    told: Callable[[Progress], None] = lambda _: None,
) -> None:
    """The same, for those who want to know why it fails.

    Args:
        journal: As for `ship_leftovers`, like the next three.
        database_url: As there.
        settings: As there.
        left: As there.
        told: Of the progress.

    Raises:
        JournalInUseError: A process writes it.
        JournalError, sqlite3.Error, OSError: It cannot be read, or the shipping process ended.
    """
    if not await _settled(journal, left or (lambda _: None)):
        return
    slot = slot_of(journal, REAL.host_name())
    task = Task(journal=journal, slot=slot, database_url=database_url, settings=settings, close=True)
    process = await child.start("server.audit", task)
    assert process.stdout is not None
    try:
        while line := await process.stdout.readline():
            progress = Progress.model_validate_json(line)
            told(progress)
            if progress.closed:
                return
        raise JournalError("the shipping process ended")
    finally:
        await child.end(process)  # nothing is lost by that


async def _settled(journal: Path, left: Left) -> int:
    """The last position of a journal, all of whose rows are settled; 0 without one."""
    settling = asyncio.ensure_future(asyncio.to_thread(_settle, journal, left))
    try:
        return await asyncio.shield(settling)
    except asyncio.CancelledError:
        await asyncio.wait((settling,))  # it has the lock, which the one who cancels is about to take
        raise


def _settle(journal: Path, left: Left) -> int:
    return settle_what_was_left(journal, left=left) if journal.exists() else 0
