"""Shipping what a process that has ended left in its journal, while nobody writes it."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from contextlib import closing
from pathlib import Path

import structlog

from server.audit.errors import JournalError
from server.audit.journal_file import JournalReader
from server.audit.shipping import Progress, ShippingSettings, Task

_log = structlog.get_logger(__name__)


async def ship_leftovers(journal: Path, database_url: str, settings: ShippingSettings) -> None:
    """Ships a journal that nobody writes, however long the database takes; to be cancelled before somebody does.

    Args:
        journal: The journal's file; it need not be there.
        database_url: SQLAlchemy URL of the audit database.
        settings: How.
    """
    try:
        last = await asyncio.to_thread(_last_position, journal)
    except JournalError as error:
        _log.error("journal_left_unshipped", path=str(journal), error=str(error))
        return
    if not last:
        return
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "server.audit", stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        task = Task(journal=journal, database_url=database_url, settings=settings)
        process.stdin.write(task.model_dump_json().encode() + b"\n")
        while line := await process.stdout.readline():
            progress = Progress.model_validate_json(line)
            if not progress.error and progress.position >= last:
                return
        _log.error("journal_left_unshipped", path=str(journal), error="the shipping process ended")
    finally:
        process.stdin.close()  # it exits at once; nothing is lost by that
        await process.wait()


def _last_position(journal: Path) -> int:
    if not journal.exists():
        return 0
    with closing(JournalReader(journal)) as reader:
        return reader.last_position()
