"""The way from the journal into SQL: `python -m server.audit`, a child of the decision server.

A process of its own, because taking packets apart and talking SQL would hold the interpreter lock of the event loop
that decides. It reads the journal beside its writer, follows the hash chain as it goes, and never skips a row: what it
cannot ship it reports, and tries again for ever.

The parent writes a `Task` as one line of JSON to its standard input and keeps that open: its end means that the parent
is gone or wants no more, and the process exits at once, wherever it is, because nothing is lost by that. Progress goes
to standard output as one line of JSON per change, a `Progress`.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Final, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel

from server.audit.days import Busy
from server.audit.errors import AuditError, JournalCorrupted
from server.audit.journal_file import Head, JournalReader, follow
from server.audit.shipping import Progress, Task
from server.audit.store import Store

T = TypeVar("T", bound=BaseModel)

_NICENESS: Final = 5  # decisions first
_TIDY_SECONDS: Final = 3600.0


class Shipping:
    """Ships one journal to one database, row after row.

    Args:
        task: What to ship, and where to.
        report: Called with every change.
        wait: Pauses for some seconds.
        open_store: Opens the database at a URL.
        clock: Monotonic seconds.
        uniform: Uniform in [0, 1).
    """

    def __init__(
        self,
        task: Task,
        report: Callable[[Progress], None],
        wait: Callable[[float], None] = time.sleep,
        open_store: Callable[[str], Store] = Store,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._task = task
        self._report = report
        self._wait = wait
        self._open_store = open_store
        self._clock = clock
        self._uniform = uniform
        self._position = 0
        self._error = ""
        self._neglected = ""
        self._reported: Progress | None = None

    def run(self) -> None:
        """Ships for ever."""
        settings = self._task.settings
        pause = settings.retry_min_seconds
        while True:
            try:
                with (
                    closing(JournalReader(self._task.journal)) as journal,
                    closing(self._open_store(self._task.database_url)) as store,
                ):
                    store.migrate()
                    head = self._start(journal, store)
                    tidy_at = self._clock()
                    while True:
                        if self._clock() >= tidy_at:
                            self._tidy(store)
                            tidy_at += _TIDY_SECONDS
                        head = self._ship(journal, store, head)
                        pause = settings.retry_min_seconds
            except (sa.exc.SQLAlchemyError, sqlite3.Error, AuditError, OSError) as error:
                self._note(self._position, _reason(error))
            self._wait(pause * (0.5 + 0.5 * self._uniform()))  # spreads retries, hides nothing
            pause = min(2 * pause, settings.retry_max_seconds)

    def _start(self, journal: JournalReader, store: Store) -> Head:
        """How far the journal was shipped.

        Raises:
            JournalCorrupted: Journal and database do not belong together.
        """
        anchor = journal.anchor()
        head = store.shipped(journal.journal_id, anchor)
        if head.position < anchor.position:
            raise JournalCorrupted(
                head.position + 1, f"not in the database and no longer in the journal, up to {anchor.position}"
            )
        if head.position > (last := journal.last_position()):
            raise JournalCorrupted(last + 1, f"in the database, up to {head.position}, but not in the journal")
        self._note(head.position, self._error)  # an outage ends when something was shipped, not before
        return head

    def _tidy(self, store: Store) -> None:
        """Makes the next days' partitions and removes old days; puts it off while somebody is in the way."""
        settings = self._task.settings
        self._neglected = ""
        try:
            store.prepare_days(settings.days_ahead)
            if settings.retention_days is not None:
                store.remove_days(settings.retention_days)
        except Busy as error:
            self._neglected = str(error)

    def _ship(self, journal: JournalReader, store: Store, head: Head) -> Head:
        """Ships the next rows, or waits when there are none."""
        rows = journal.settled_rows_after(head.position, self._task.settings.batch_rows)
        if not rows:
            self._note(head.position, "")
            self._wait(self._task.settings.poll_seconds)
            return head
        shipped = head
        for row in rows:
            shipped = follow(shipped, row)
        if not store.write(journal.journal_id, head, rows):
            return self._start(journal, store)
        self._note(shipped.position, "")
        return shipped

    def _note(self, position: int, error: str) -> None:
        self._position, self._error = position, error
        progress = Progress(position=position, error=error, neglected=self._neglected)
        if progress != self._reported:
            self._reported = progress
            self._report(progress)


def main() -> None:
    """Runs the shipping process."""
    task = take_task(Task)
    Shipping(task, lambda progress: print(progress.model_dump_json(), flush=True)).run()


def take_task(kind: type[T]) -> T:
    """Makes this process a child that ends when its parent does or says so, and reads its task."""
    # The server decides when this ends, also where a terminal or a supervisor signals the whole process group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(_NICENESS)
    task = kind.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    return task


def _exit_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _reason(error: Exception) -> str:
    """One line, without the statement and its parameters."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error
    return f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
