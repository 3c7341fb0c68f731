"""Ships the journal into SQL: `python -m server.audit`, a child of the decision server.

Shipping has a process of its own, because parsing packets and talking SQL would hold the interpreter lock of the event
loop that decides. The process reads the journal beside its writer, follows the hash chain as it goes, and never skips a
row. What it cannot ship it reports, and tries again until it succeeds.

Its task is a `Task`; `server/process/child.py` says how it is given. A line `close` on standard input means that the
parent will not write the journal again: once everything is shipped, the process records where the journal ends.
Progress goes to standard output as one line of JSON per change, a `Progress`.

Each shipment includes how far the journal had come by then (`heads.py`), so that an end that is cut off later is
noticed. Without shipments it is stated every few minutes: a journal of which nothing is heard any more is deserted.
"""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Final

import sqlalchemy as sa

from feature_cache.backoff import Backoff
from server.audit.shipping.heads import SigningKey, Stating
from server.audit.shipping.shipping import CLOSE, Progress, Task
from server.audit.store.days import TablesBusyError
from server.audit.store.store import Shipped, Store
from server.errors import AuditError, JournalCorruptedError
from server.journal.journal_file import PASSED_ON_BYTES, Head, JournalReader, follow_all
from server.process.child import take_task

_TIDY_SECONDS: Final = 3600.0
_SUMMARIZE_SECONDS: Final = 60.0
_STATE_SECONDS: Final = 300.0
"""Between two statements while there is nothing to ship; a third of what makes a journal a deserted one."""


class Shipping:
    """Ships one journal to one database, row after row.

    Args:
        task: What to ship, and where to.
        report: Called with every change.
        wait: Pauses for some seconds.
        open_store: Opens the database at a URL.
        clock: Monotonic seconds.
        uniform: Uniform in [0, 1).
        wall_clock_ns: Nanoseconds since the Unix epoch.
        closing: Set when no process writes the journal any more.

    Raises:
        KeyUnusableError: The key that the task names cannot be read.
    """

    def __init__(
        self,
        task: Task,
        report: Callable[[Progress], None],
        wait: Callable[[float], None] = time.sleep,
        open_store: Callable[[str], Store] = Store,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] = random.random,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        closing: threading.Event | None = None,
    ) -> None:
        self._task = task
        self._report = report
        self._closing = closing or threading.Event()
        self._wait = wait
        self._open_store = open_store
        self._clock = clock
        self._uniform = uniform
        self._wall_clock_ns = wall_clock_ns
        self._key = None if task.settings.signing_key is None else SigningKey(task.settings.signing_key)
        self._position = 0
        self._error = ""
        self._neglected = ""
        self._lost = ""
        self._closed = False
        self._state_at = 0.0
        self._reported: Progress | None = None

    def run(self) -> None:
        """Ships for ever."""
        settings = self._task.settings
        backoff = Backoff(settings.retry_min_seconds, settings.retry_max_seconds, uniform=self._uniform)
        while True:
            try:
                with (
                    closing(JournalReader(self._task.journal)) as journal,
                    closing(self._open_store(self._task.database_url)) as store,
                ):
                    store.migrate()
                    head, stating = self._start(journal, store)
                    tidy_at = self._clock()
                    summarize_at = tidy_at + _SUMMARIZE_SECONDS
                    while True:
                        if self._clock() >= tidy_at:
                            self._tidy(store)
                            tidy_at += _TIDY_SECONDS
                        if self._clock() >= summarize_at:
                            store.summarize()
                            summarize_at += _SUMMARIZE_SECONDS
                        head = self._ship(journal, store, head, stating)
                        backoff.reset()
            except (sa.exc.SQLAlchemyError, sqlite3.Error, AuditError, OSError) as error:
                self._note(self._position, _reason(error))
            self._wait(backoff.next_pause())

    def _start(self, journal: JournalReader, store: Store) -> tuple[Head, Stating]:
        """How far the journal was shipped, and who states how far it has come.

        Raises:
            JournalCorruptedError: Journal and database do not belong together.
        """
        anchor, newest = journal.anchor(), journal.head()
        head = store.shipped(journal.journal_id, anchor, self._task.slot)
        if head.position < anchor.position:
            raise JournalCorruptedError(
                head.position + 1, f"not in the database and no longer in the journal, up to {anchor.position}"
            )
        known = {one.journal_id: one for one in store.shipments()}
        ours = known[journal.journal_id]
        stated = 0 if ours.stated is None else ours.stated.position
        if max(head.position, stated) > newest.position:
            where = "in the database" if head.position > newest.position else "stated with the database"
            up_to = max(head.position, stated)
            raise JournalCorruptedError(newest.position + 1, f"{where}, up to {up_to}, but not in the journal")
        stating = Stating(journal.journal_id, self._task.slot, ours.predecessor_id, self._key)
        self._state(journal, store, stating, newest)  # it is open again
        self._lost = _lost(known.get(ours.predecessor_id)) or _missed(ours)
        self._note(head.position, self._error)  # an outage ends when something was shipped, not before
        return head, stating

    def _tidy(self, store: Store) -> None:
        """Creates the next days' partitions and removes old days; postpones it while another session holds a lock."""
        settings = self._task.settings
        self._neglected = self._lost
        try:
            store.prepare_days(settings.days_ahead)
            if settings.retention_days is not None:
                store.remove_days(settings.retention_days)
        except TablesBusyError as error:
            self._neglected = str(error)

    def _ship(self, journal: JournalReader, store: Store, head: Head, stating: Stating) -> Head:
        """Ships the next rows, and waits if there were fewer than fit into one transaction."""
        rows = journal.settled_rows_after(head.position, self._task.settings.batch_rows)
        newest = journal.head()
        if not rows:
            ends = self._closing.is_set() and newest == head
            if not self._closed and (ends or self._clock() >= self._state_at):
                self._state(journal, store, stating, newest, closed=ends)
            self._note(head.position, "")
            self._wait(self._task.settings.poll_seconds)
            return head
        shipped = follow_all(head, rows)
        if not store.write(journal.journal_id, head, rows, stating.head(newest, self._wall_clock_ns())):
            return self._start(journal, store)[0]
        self._state_at = self._clock() + _STATE_SECONDS
        self._note(shipped.position, "")
        full = len(rows) == self._task.settings.batch_rows or sum(len(row.entry) for row in rows) >= PASSED_ON_BYTES
        if not full:  # a transaction costs as much as the shipping of 100 decisions
            self._wait(self._task.settings.poll_seconds)
        return shipped

    def _state(
        self, journal: JournalReader, store: Store, stating: Stating, head: Head, *, closed: bool = False
    ) -> None:
        """Tells the database how far the journal has come, and whether that is its end."""
        store.state(journal.journal_id, stating.head(head, self._wall_clock_ns(), closed=closed))
        self._closed = closed
        self._state_at = self._clock() + _STATE_SECONDS

    def _note(self, position: int, error: str) -> None:
        self._position, self._error = position, error
        progress = Progress(position=position, error=error, neglected=self._neglected, closed=self._closed)
        if progress != self._reported:
            self._reported = progress
            self._report(progress)


def main() -> None:
    """Runs the shipping process."""
    closing = threading.Event()
    task = take_task(Task, lambda line: closing.set() if line == CLOSE else None)
    if task.close:
        closing.set()
    Shipping(task, lambda progress: print(progress.model_dump_json(), flush=True), closing=closing).run()


def _lost(predecessor: Shipped | None) -> str:
    """What is missing of the journal that was written at this place before; empty when nothing is."""
    if predecessor is None or predecessor.written_off:
        return ""
    stated = predecessor.stated
    if stated is not None and stated.closed and stated.position == predecessor.head.position:
        return ""
    return (
        f"the journal {predecessor.journal_id} was written here before and is gone, with what followed its row "
        f"{predecessor.head.position}"
    )


def _missed(ours: Shipped) -> str:
    """What of this journal the database was never given; empty when nothing is."""
    if not ours.missed or ours.missed_written_off:
        return ""
    return f"the database has none of the rows of this journal up to {ours.missed}, and the journal no longer has them"


def _reason(error: Exception) -> str:
    """One line, without the statement and its parameters."""
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error
    return f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
