"""The journal's file: rows in SQLite, each chained to the one before by a hash.

`hash[n] = sha256(hash[n - 1] + entry[n])`, with 32 zero bytes before the first row. Positions count from 1 without a
gap. Trimming removes rows from the front and stores the position and hash of the last one removed as the *anchor*. The
chain of the remaining rows can still be checked, and continues what was shipped.

Every row also stores how far replies were *settled* when it was written. A decision is settled when it is known that
its caller received it, or when a note says that it did not (see `server/decision/replies.py`). Storing this with the
row costs nothing extra. It is not evidence. After a process died, it tells the next one whose replies are unknown, and
it tells readers which rows they may call `replied`. While no row is written, it is stored in the table `journal`.

Some rows also store what is in the range of entries before them, for look-ups (see `ranges.py`).

SQLite runs in WAL mode. With `synchronous=FULL` a COMMIT syncs the WAL before it becomes visible to any reader; with
`NORMAL` the WAL is only synced before a checkpoint, so a row survives the death of the process but not of the machine.

After a failed sync, part of the WAL may exist in memory alone. It can still be read, but no later sync writes it, and a
commit that follows it would be lost with it. A process therefore first writes the WAL over itself and syncs it before
it writes to a journal after a failure, or after another process (`make_log_durable`).
"""

from __future__ import annotations

import enum
import functools
import heapq
import itertools
import operator
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

from server.errors import JournalCorruptedError, JournalError
from server.journal.ranges import Notes, Range, read_range
from server.machine import Files

GENESIS: Final = bytes(32)
"""What the first row is chained to."""

_APPLICATION_ID: Final = 0x5054414A
"""What SQLite's file header names as the file's purpose; its user version is the format of the tables."""
_FORMAT: Final = 3
_TRIM_BYTES: Final = 256 * 1024
"""What one transaction removes: every page of it is written to the log."""
_TAIL_ROWS: Final = 1000
_STEP_ROWS: Final = 1000
"""What is read in one transaction."""
PASSED_ON_BYTES: Final = 1024 * 1024
"""What is passed on at once: a few thousand decisions."""
_LAST: Final = 2**63 - 1
_SELECT: Final = "SELECT position, CAST(entry AS BLOB), CAST(hash AS BLOB) FROM entries"
"""With casts, so that a row edited into another type still fails the check of its hash, and not with a `TypeError`."""


class Kind(bytes, enum.Enum):
    """What a row says that holds no decisions, as far as it is looked for: the first byte of its `JournalEntry`."""

    REPLY_UNCONFIRMED = b"\x12"
    CONTROL_CHANGE = b"\x1a"
    SETTINGS = b"\x22"
    OUTCOME = b"\x2a"
    REPLY_HEARD = b"\xaa"


_KIND: Final = "substr(entry, 1, 1)"
_DECISIONS: Final = (b"\x0a", b"\x42")
"""How an entry with decisions begins: a serialised `JournalEntry` begins with the number of what it holds."""
_IS_OTHER: Final = f"{_KIND} NOT IN (" + ", ".join(f"x'{one.hex()}'" for one in _DECISIONS) + ")"
"""True of a row that holds none. These rows have an index by their kind: some are few, and are looked for among
millions of decisions, and pairs of scores of these."""
_UNNOTED_ENTRIES: Final = 256
"""Entries that wait until `note` is called."""
_BUSY_SECONDS: Final = 0.25
"""How long the writer waits for the file's write lock. No other process should hold it, and callers have deadlines."""
_PROBE_BYTES: Final = 64 * 1024
_KINDS: Final = f"CREATE INDEX kinds ON entries ({_KIND}, position) WHERE {_IS_OTHER}"
_RANGES: Final = "CREATE INDEX ranges ON entries (position, range) WHERE range IS NOT NULL"
"""It holds all that look-ups read of ranges: in the rows these are far apart, behind their entries."""
_SCHEMA: Final = (
    # `probe` is overwritten to find out whether writing works again.
    "CREATE TABLE journal (one INTEGER PRIMARY KEY CHECK (one = 1), journal_id TEXT NOT NULL,"
    " anchor_position INTEGER NOT NULL, anchor_hash BLOB NOT NULL, settled INTEGER NOT NULL, probe BLOB)",
    # No AUTOINCREMENT: it would rewrite one more page in every commit. Positions come from the writer.
    "CREATE TABLE entries (position INTEGER PRIMARY KEY, entry BLOB NOT NULL, hash BLOB NOT NULL,"
    " settled INTEGER NOT NULL, range TEXT)",
    _KINDS,
    _RANGES,
)
_SETTLED: Final = (
    "SELECT max(anchor_position, settled, coalesce((SELECT settled FROM entries ORDER BY position DESC LIMIT 1), 0))"
    " FROM journal"
)


def link(previous: bytes, entry: bytes) -> bytes:
    """The hash of a row: 32 bytes."""
    return sha256(previous + entry).digest()


class Row(NamedTuple):
    """One row of the journal. A tuple, because whoever follows a journal makes one of every row."""

    position: int
    entry: bytes
    """A serialised `pretrade.audit.v1.JournalEntry`."""
    hash: bytes
    """32 bytes."""

    def holds_decisions(self) -> bool:
        """Whether it holds decisions: one, or some that became durable together."""
        return self.entry[:1] in _DECISIONS


@dataclass(frozen=True, slots=True)
class Head:
    """A point of the chain: everything up to `position` hashes to `hash`."""

    position: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a journal's chain that is known from elsewhere."""

    head: Head
    what: str
    """A participle for people: `shipped`, `stated`."""


_INSERTED: Final = 4
"""Values of the first row before its range."""


@functools.cache
def _insert(rows: int) -> str:
    places = ",".join(["(?, ?, ?, ?, ?)"] + ["(?, ?, ?, ?, NULL)"] * (rows - 1))
    return f"INSERT INTO entries (position, entry, hash, settled, range) VALUES {places}"  # noqa: S608 - placeholders


class JournalFile:
    """The writer's side of the file: one connection, used by one thread.

    Opening creates what is missing and checks the chain of the last rows.

    Args:
        path: The file; its directory must exist.
        sync_commits: True for `synchronous=FULL`, False for `NORMAL`.
        random_bytes: Gives so many bytes that no other journal has: its id, when it is made.

    Raises:
        JournalCorruptedError: The tail does not fit the chain.
        JournalError: The file is of another format.
        sqlite3.Error: The file cannot be opened or written.
    """

    def __init__(self, path: Path, *, sync_commits: bool, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        self._random_bytes = random_bytes
        # Autocommit: one INSERT is one transaction and one call into SQLite. Every call gives the interpreter lock
        # away and has to win it back from a busy event loop, so calls are what a batch costs, not rows.
        self._connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, cached_statements=256)
        try:
            self._prepare(sync_commits)
            row = self._connection.execute("SELECT journal_id, anchor_position, anchor_hash FROM journal").fetchone()
            self.journal_id: str = row[0]
            self.anchor = Head(row[1], row[2])
            self.head = _verified_tail(self._connection, self.anchor)
            self.settled = _settled(self._connection)
            self._notes = Notes(self.head.position + 1)
            self._unnoted: list[bytes] = []
            self._range: str | None = None
            """What is in the range before the next row, which is to have it."""
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self, sync_commits: bool) -> None:
        execute = self._connection.execute
        execute(f"PRAGMA synchronous = {'FULL' if sync_commits else 'NORMAL'}")
        mode = execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise JournalError(f"this file system cannot hold a write-ahead log (journal_mode is {mode})")
        execute("PRAGMA wal_autocheckpoint = 0")  # the journal decides when, outside of a caller's commit
        execute("PRAGMA secure_delete = OFF")  # overwriting trimmed rows with zeros would double the writing
        if execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
            execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                execute(statement)
            execute("INSERT INTO journal VALUES (1, ?, 0, ?, 0, NULL)", (self._random_bytes(16).hex(), GENESIS))
            execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            execute(f"PRAGMA user_version = {_FORMAT}")
            execute("COMMIT")
        found = (execute("PRAGMA application_id").fetchone()[0], execute("PRAGMA user_version").fetchone()[0])
        if found != (_APPLICATION_ID, _FORMAT):
            raise JournalError(f"the file is not a journal of format {_FORMAT}")
        # A journal of an earlier version has less to look up by. An index is made by reading all of it, once.
        have = {name for (name,) in execute("SELECT name FROM sqlite_schema WHERE type = 'index'")}
        if "ranges" not in have:
            execute("BEGIN IMMEDIATE")
            execute("ALTER TABLE entries ADD COLUMN range TEXT")
            execute(_RANGES)
            execute("COMMIT")
        if "kinds" not in have:
            execute("BEGIN IMMEDIATE")
            execute("DROP INDEX IF EXISTS others")
            execute(_KINDS)
            execute("COMMIT")

    def append(self, entries: Sequence[bytes], settled: int | None = None) -> None:
        """Appends the entries in one transaction; when it returns they are durable and `head` is the last of them.

        Args:
            entries: At least one, at most 8,000.
            settled: The position through which replies are settled; None where no caller waits, for the last of these.
        """
        if settled is None:
            settled = self.head.position + len(entries)
        if len(self._unnoted) >= _UNNOTED_ENTRIES:
            self.note()
        position, previous = self.head.position, self.head.hash
        values: list[int | bytes | str | None] = []
        for entry in entries:
            position += 1
            previous = link(previous, entry)
            values += (position, entry, previous, settled)
        values.insert(_INSERTED, self._range)
        self._connection.execute(_insert(len(entries)), values)
        self.head = Head(position, previous)
        self.settled = settled
        self._range = None
        self._unnoted += entries

    def note(self) -> None:
        """Takes note of what is in the entries that were appended, for look-ups.

        To be called after `append`, when the callers of those entries have their answers.
        """
        self._notes.add(self._unnoted)
        self._unnoted.clear()
        if self._notes.are_full:
            self._range = self._notes.text()
            self._notes = Notes(self.head.position + 1)

    def settle(self, settled: int) -> None:
        """Makes it durable, without a row, through which position replies are settled."""
        self._connection.execute("UPDATE journal SET settled = ?", (settled,))
        self.settled = settled

    def trim(self, through: int, rows: int, settled: int | None = None) -> bool:
        """Removes some rows from the front, none after position `through`; True when some of these are left.

        Args:
            through: Last position to remove.
            rows: How many at once, at most; fewer when they are large.
            settled: The position through which replies are settled; later rows stay. None for what was last written.

        Raises:
            JournalCorruptedError: The last of them is not there; nothing was removed.
            sqlite3.Error: The file cannot be read or written; nothing was removed.
        """
        last = min(through, self.settled if settled is None else settled, self.head.position)
        through = min(last, self.anchor.position + rows)
        if through <= self.anchor.position:
            return False
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        try:
            through = self._few_bytes(through)
            row = execute("SELECT hash FROM entries WHERE position = ?", (through,)).fetchone()
            if row is None:
                raise JournalCorruptedError(through, "missing")
            anchor = Head(through, row[0])
            execute("DELETE FROM entries WHERE position <= ?", (through,))
            execute("UPDATE journal SET anchor_position = ?, anchor_hash = ?", (anchor.position, anchor.hash))
            execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                execute("ROLLBACK")
            raise
        self.anchor = anchor
        return through < last

    def _few_bytes(self, through: int) -> int:
        """The last of the first rows, up to a position, that fill a few pages together; at least one."""
        sizes = "SELECT position, length(entry) FROM entries WHERE position <= ? ORDER BY position"
        left = _TRIM_BYTES
        for position, size in self._connection.execute(sizes, (through,)):
            left -= size
            if left <= 0:
                return int(position)
        return through

    def probe(self) -> None:
        """Proves that writing works by committing as much as a large batch would, and removing it again.

        Raises:
            JournalError: The end is no longer where it was found: another process wrote before we had the lock.
            sqlite3.Error: Writing does not work.
        """
        self._connection.execute("UPDATE journal SET probe = randomblob(?)", (_PROBE_BYTES,))
        if _verified_tail(self._connection, self.anchor) != self.head:
            raise JournalError("rows were written by another process")
        self._connection.execute("UPDATE journal SET probe = NULL")

    def used_bytes(self) -> int:
        """What the rows fill; pages that trimming left free are used again and do not count."""
        return (self._pragma("page_count") - self.free_pages()) * self._pragma("page_size")

    def free_pages(self) -> int:
        """Pages of the file that trimming left free."""
        return self._pragma("freelist_count")

    def _pragma(self, name: str) -> int:
        value: int = self._connection.execute(f"PRAGMA {name}").fetchone()[0]
        return value

    def rows_after(self, position: int) -> list[Row]:
        """Every row after `position`, in order."""
        return _rows(self._connection, position, -1)

    def checkpoint(self) -> None:
        """Moves what readers no longer need from the WAL into the file, without waiting for anyone."""
        self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def close(self) -> None:
        """Closes the connection; the last one to close removes the WAL."""
        self._connection.close()


def make_log_durable(path: Path, files: Files) -> None:
    """Has what can be read in a journal's WAL on the disk, whatever became of earlier syncs.

    Raises:
        OSError: The disk fails.
    """
    files.rewrite(path.with_name(f"{path.name}-wal"))


def checkpoint(path: Path) -> None:
    """Moves what readers no longer need from the WAL into the file, beside a writer that goes on appending."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


class JournalReader:
    """Reads a journal beside its writer, from any process; used by one thread.

    Args:
        path: The file of an existing journal.

    Raises:
        JournalError: There is no journal at `path`.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", isolation_level=None, uri=True)
            try:
                self.journal_id: str = self._connection.execute("SELECT journal_id FROM journal").fetchone()[0]
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            raise JournalError(f"cannot read the journal {path}: {error}") from error

    def anchor(self) -> Head:
        """The end of what was trimmed."""
        return Head(*self._connection.execute("SELECT anchor_position, anchor_hash FROM journal").fetchone())

    def last_position(self) -> int:
        """Position of the newest row; the anchor's when there is none."""
        newest: int | None = self._connection.execute("SELECT max(position) FROM entries").fetchone()[0]
        return self.anchor().position if newest is None else newest

    def settled(self) -> int:
        """The position up to which it is known of every decision whether its caller received it."""
        return _settled(self._connection)

    def rows_after(self, position: int, limit: int) -> list[Row]:
        """At most `limit` rows after `position`, in order."""
        return _rows(self._connection, position, limit)

    def settled_rows_after(self, position: int, limit: int) -> list[Row]:
        """The same, without rows beyond `settled()`: the rows that may be passed on. Fewer when they are large."""
        rows: list[Row] = []
        left = PASSED_ON_BYTES
        for row in _read(self._connection, position, limit, last=self.settled()):
            rows.append(row)
            left -= len(row.entry)
            if left <= 0:
                break
        return rows

    def others_after(self, position: int, kinds: Sequence[Kind]) -> Iterator[Row]:
        """Every row after `position` that is of one of these kinds, in order; found by an index."""
        each = [self._of_kind(position, kind) for kind in kinds]
        return heapq.merge(*each, key=operator.attrgetter("position"))

    def _of_kind(self, position: int, kind: Kind) -> Iterator[Row]:
        query = _SELECT + f" WHERE {_IS_OTHER} AND {_KIND} = ? AND position > ? ORDER BY position LIMIT ?"
        while True:
            rows = list(map(Row._make, self._connection.execute(query, (kind.value, position, _STEP_ROWS))))
            if not rows:
                return
            yield from rows
            position = rows[-1].position

    def others_until_settled(self, position: int, last: int, kinds: Sequence[Kind]) -> Iterator[Row]:
        """Those after `position`, until the decisions through `last` are settled.

        Such rows say what became of the replies to those decisions, except what repeats of their calls heard later.
        """
        query = "SELECT position FROM entries WHERE position > ? AND settled >= ? ORDER BY position LIMIT 1"
        found = self._connection.execute(query, (last, last)).fetchone()
        end = _LAST if found is None else found[0]
        return itertools.takewhile(lambda row: row.position <= end, self.others_after(position, kinds))

    def ranges(self, position: int, last: int) -> Iterator[Range]:
        """What is in the ranges that end after a position, up to another one; the last one first.

        Entries may be in no range, as all are that were written before there were ranges. Where ranges cannot be read,
        none are found: if anything is wrong, reading the entries says so.
        """
        query = (
            "SELECT position - 1, range FROM entries WHERE range IS NOT NULL AND position > ? AND position <= ?"
            " ORDER BY position DESC LIMIT ?"
        )
        while True:
            try:
                rows = self._connection.execute(query, (position + 1, last + 1, _STEP_ROWS)).fetchall()
            except sqlite3.Error:
                return
            for end, text in rows:
                if (found := read_range(end, text)) is not None:
                    yield found
            if not rows:
                return
            last = rows[-1][0] - 1

    def decision_after(self, position: int) -> Row | None:
        """The first row after `position` that holds a decision; None if there is none."""
        query = _SELECT + f" WHERE NOT ({_IS_OTHER}) AND position > ? ORDER BY position LIMIT 1"
        row = self._connection.execute(query, (position,)).fetchone()
        return None if row is None else Row._make(row)

    def head(self) -> Head:
        """The newest row; the anchor when there is none."""
        row = self._connection.execute("SELECT position, hash FROM entries ORDER BY position DESC LIMIT 1").fetchone()
        return self.anchor() if row is None else Head(*row)

    def verify(self, points: Sequence[Point] = ()) -> tuple[Head, Head]:
        """Walks every row and checks it against the chain.

        Args:
            points: What others know of this journal. Each must be a point of the chain, unless it was trimmed by now.

        Returns:
            The anchor and the head: everything in between is as it was written.

        Raises:
            JournalCorruptedError: A row is missing or was changed, or SQLite cannot read on; with its position.
        """
        anchor = head = self.anchor()
        try:
            _check_points(head, points)
            before = None
            while head != before:  # a step that finds no row more is the last one
                before = head
                # Row by row, since what is unreadable is behind those that were read.
                for row in _read(self._connection, head.position, _STEP_ROWS):
                    if row.position > head.position + 1 and (trimmed := self.anchor()).position > head.position:
                        anchor = head = trimmed  # meanwhile, since it was shipped
                        _check_points(head, points)
                        break
                    head = follow(head, row)
                    _check_points(head, points)
        except sqlite3.DatabaseError as error:
            raise JournalCorruptedError(head.position + 1, f"unreadable: {error}") from error
        for point in points:
            if point.head.position > head.position:
                raise JournalCorruptedError(head.position + 1, f"{point.what}, up to {point.head.position}, but gone")
        return anchor, head

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()


def journals_of(path: Path) -> list[Path]:
    """The journals of a server: `path`, and `path.<i>` for each place when it has several processes.

    Never empty: `path` where there is none yet.
    """
    places = [found for found in path.parent.glob(f"{path.name}.*") if found.suffix[1:].isdecimal()]
    found = [path] if path.exists() else []
    return found + sorted(places, key=lambda place: int(place.suffix[1:])) or [path]


def follow(head: Head, row: Row) -> Head:
    """The head after `row`.

    Raises:
        JournalCorruptedError: `row` does not follow `head`.
    """
    if row.position != head.position + 1:
        raise JournalCorruptedError(head.position + 1, f"missing; the next row is {row.position}")
    if row.hash != link(head.hash, row.entry):
        raise JournalCorruptedError(row.position, "changed after it was written: its hash does not fit the chain")
    return Head(row.position, row.hash)


def follow_all(head: Head, rows: Sequence[Row]) -> Head:
    """The head after some rows; raises as `follow` does."""
    position, digest = head.position, head.hash
    for row in rows:
        position += 1
        before, digest = digest, sha256(digest + row.entry).digest()
        if digest != row.hash or position != row.position:
            return follow(Head(position - 1, before), row)  # says what is wrong
    return Head(position, digest)


def _settled(connection: sqlite3.Connection) -> int:
    """The newest statement of how far replies are settled."""
    settled: int = connection.execute(_SETTLED).fetchone()[0]
    return settled


def _check_points(head: Head, points: Sequence[Point]) -> None:
    for point in points:
        if point.head.position == head.position and point.head.hash != head.hash:
            raise JournalCorruptedError(head.position, f"not what was {point.what}")


def _read(connection: sqlite3.Connection, position: int, limit: int, last: int = _LAST) -> Iterator[Row]:
    query = _SELECT + " WHERE position > ? AND position <= ? ORDER BY position LIMIT ?"
    return map(Row._make, connection.execute(query, (position, last, limit)))


def _rows(connection: sqlite3.Connection, position: int, limit: int, last: int = _LAST) -> list[Row]:
    return list(_read(connection, position, limit, last))


def _verified_tail(connection: sqlite3.Connection, anchor: Head) -> Head:
    """The head, after a check of the last rows."""
    newest = connection.execute("SELECT max(position) FROM entries").fetchone()[0]
    if newest is None:
        return anchor
    start = newest - _TAIL_ROWS
    head = anchor
    if start > anchor.position:
        row = connection.execute("SELECT hash FROM entries WHERE position = ?", (start,)).fetchone()
        if row is None:
            raise JournalCorruptedError(start, "missing")
        head = Head(start, row[0])
    for row in _rows(connection, head.position, -1):
        head = follow(head, row)
    return head
