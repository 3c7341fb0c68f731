"""The audit in SQL: what was shipped from the journals, as evidence and as columns to query (see `schema.py`).

A transaction stores rows together with how far their journal was shipped. A crash at any instant therefore repeats
nothing and loses nothing. SQLite and PostgreSQL are supported.
"""

from __future__ import annotations

import datetime as dt
import itertools
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store import days, newest
from server.audit.store.canaries import CANARY_EVENTS, SCORE_PAIRS
from server.audit.store.columns import Columns, parameters
from server.audit.store.decision_rows import DecisionRows
from server.audit.store.newest import CLOCK_ERROR, Bounds, Matching
from server.audit.store.outcomes import LABELS, OUTCOMES, SETTINGS
from server.audit.store.refusals import ACCESS_REFUSALS
from server.audit.store.schema import (
    CONTROL_CHANGES,
    DECISIONS,
    ENTRY_OF_DECISION,
    JOURNAL_ENTRIES,
    PART_SCORES,
    REPEATS,
    SHIPMENTS,
    VERIFICATIONS,
    migrate,
)
from server.audit.store.shipment import RowValues, Shipment
from server.decision.ids import made_at
from server.errors import JournalCorruptedError
from server.journal.journal_file import Head, Row, follow, link
from server.journal.reply_status import AS_DECIDED, REPEATED, REPLIED, WITHDRAWN, Reply

_OF_DECISION: Final = sa.and_(
    DECISIONS.c.decision_id == sa.bindparam("of_decision_id"),
    DECISIONS.c.decided_at.between(sa.bindparam("since"), sa.bindparam("until")),
)
_REASONS: Final = DECISIONS.c.heard_reasons.type
_SET_REPLY: Final = (
    sa.update(DECISIONS)
    .where(_OF_DECISION)
    .values(
        reply_status=sa.bindparam("new_status"),
        heard_action=sa.bindparam("new_action"),
        heard_reasons=sa.bindparam("new_reasons", type_=_REASONS),
    )
)


def _of_repeats(name: str) -> sa.ScalarSelect[Any]:
    return sa.select(REPEATS.c[name]).where(REPEATS.c.decision_id == DECISIONS.c.decision_id).scalar_subquery()


_SET_REPLY_OF_REPEATS: Final = (
    sa.update(DECISIONS)
    .where(_OF_DECISION, (_of_repeats("reply_status") != REPEATED) | (DECISIONS.c.reply_status != REPLIED))
    .values(
        reply_status=_of_repeats("reply_status"),
        heard_action=sa.func.coalesce(_of_repeats("heard_action"), DECISIONS.c.action),
        heard_reasons=sa.func.coalesce(_of_repeats("heard_reasons"), DECISIONS.c.reasons),
    )
)
_WITH_EVIDENCE: Final = sa.select(
    *(DECISIONS.c[name] for name in ("reply_status", "heard_action", "heard_reasons", "journal_row")),
    *(JOURNAL_ENTRIES.c[name] for name in ("journal_id", "position", "entry", "hash")),
).join_from(DECISIONS, JOURNAL_ENTRIES, ENTRY_OF_DECISION)
_REPLIES_LOCK: Final = 0x5052_4552
"""Key of PostgreSQL's advisory lock: one process may ship a decision, or that its reply was not heard, while another
ships what a repeat of the call heard. Each must see the other's word."""
_ANY_DAY: Final = {"since": dt.datetime.min.replace(tzinfo=dt.UTC), "until": dt.datetime.max.replace(tzinfo=dt.UTC)}
_READ_ROWS: Final = 1000
_ASKED_IDS: Final = 1000
"""Decisions of one question; PostgreSQL's driver can send some ten thousand."""
_PARTITIONED_DAYS: Final = (366, 7)
"""Days before and after today that get a partition; a clock may be far off."""


@dataclass(frozen=True, slots=True)
class StoredDecision:
    """A decision as SQL holds it."""

    row: Row
    """The row of the journal that holds it, and those that became durable with it."""
    number: int
    """Which of them it is, counted from 0."""
    journal_id: str
    reply: Reply


@dataclass(frozen=True, slots=True)
class Shipped:
    """What the database knows of a journal besides its rows."""

    journal_id: str
    anchor: Head
    """The row before the first one that is kept."""
    head: Head
    """The last row shipped."""
    slot: str
    """Where it is written; empty when that is not known."""
    predecessor_id: str
    """The journal that was written there before; empty for none."""
    stated: packet_pb2.JournalHead | None
    """How far it had come, as its server said last."""
    written_off: str
    """Who gave up its missing end as lost, and why; empty if it was not given up."""
    missed: int
    """Rows up to this position were gone from the journal when this database first heard of it; 0 when it had all."""
    missed_written_off: str
    """Who gave up these rows, and why; empty if they were not given up."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A point of a chain up to which everything was verified before."""

    head: Head
    verified_at: dt.datetime


class Store:
    """The audit database; used by one thread.

    Every method raises `sqlalchemy.exc.SQLAlchemyError` when the database cannot be reached or refuses.

    Args:
        url: SQLAlchemy URL, for example `sqlite:///audit.db` or `postgresql+psycopg://user@host/database`.

    Raises:
        ValueError: The URL is malformed, or of a database that is neither SQLite nor PostgreSQL.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._may_create = False
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "do_connect", self._check_file)
        self._copies = self._engine.dialect.name == "postgresql"
        insert = postgresql.insert if self._copies else sqlite.insert
        self._inserts: dict[sa.Table, Any] = {
            table: insert(table).on_conflict_do_nothing()
            for table in (
                SHIPMENTS,
                JOURNAL_ENTRIES,
                DECISIONS,
                CONTROL_CHANGES,
                SETTINGS,
                OUTCOMES,
                LABELS,
                SCORE_PAIRS,
                PART_SCORES,
                CANARY_EVENTS,
                ACCESS_REFUSALS,
            )
        }
        repeat = insert(REPEATS)
        withdrawn = repeat.excluded.reply_status == WITHDRAWN  # no repeat gets such a decision any more
        self._insert_repeats = repeat.on_conflict_do_update(
            index_elements=[REPEATS.c.decision_id],
            set_={name: repeat.excluded[name] for name in ("reply_status", "heard_action", "heard_reasons")},
            where=withdrawn | (REPEATS.c.reply_status == REPEATED),
        )
        verified = insert(VERIFICATIONS)
        self._insert_verification = verified.on_conflict_do_update(
            index_elements=[VERIFICATIONS.c.journal_id],
            set_={name: verified.excluded[name] for name in ("position", "hash", "verified_at")},
            where=VERIFICATIONS.c.position <= verified.excluded.position,
        )
        self._partitioned: set[dt.date] = set()
        self._written: set[dt.date] = set()
        """Days of decisions that were written since they were last summarized."""
        previous = SHIPMENTS.c.shipped_at
        shipped_at = (
            sa.func.greatest(previous, sa.func.now())
            if self._copies
            else sa.func.max(
                previous, sa.bindparam("now", callable_=lambda: dt.datetime.now(dt.UTC), type_=previous.type)
            )
        )
        self._move_shipped = (  # made once, because SQLAlchemy needs longer for making it than for executing it
            sa.update(SHIPMENTS)
            .where(
                SHIPMENTS.c.journal_id == sa.bindparam("of_journal"),
                SHIPMENTS.c.position == sa.bindparam("from_position"),
            )
            .values(
                position=sa.bindparam("to_position"),
                hash=sa.bindparam("to_hash"),
                shipped_at=shipped_at,
                stated_head=sa.func.coalesce(sa.bindparam("stated", type_=sa.LargeBinary()), SHIPMENTS.c.stated_head),
            )
            .returning(SHIPMENTS.c.shipped_at)
        )

    def migrate(self) -> tuple[str | None, str]:
        """Creates the tables, or upgrades them to this version; see `server.audit.store.schema.migrate`."""
        self._may_create = True
        return migrate(self._engine)

    def _check_file(self, _dialect: object, _record: object, arguments: Sequence[Any], _options: object) -> None:
        """Keeps SQLite from making an empty database of a mistyped name for those who only read."""
        name = str(arguments[0])
        if not (self._may_create or name.startswith(("file:", ":memory:")) or Path(name).exists()):
            raise sqlite3.OperationalError(f"there is no database {name}")

    def prepare_days(self, ahead: int) -> None:
        """Makes the partitions of today and of `ahead` more days, and again those that could not be made before."""
        self._partitioned.clear()
        today = _now().date()
        self._make_partitions({today + dt.timedelta(days=i) for i in range(ahead + 1)})

    def _make_partitions(self, wanted: set[dt.date]) -> None:
        if not self._copies or not (missing := wanted - self._partitioned):
            return
        self._partitioned |= missing
        past, future = _PARTITIONED_DAYS
        today = _now().date()
        days.make_partitions(self._engine, {day for day in missing if -past <= (day - today).days <= future})

    def summarize(self) -> None:
        """Summarizes what was written since the last time, for lists; see `server.audit.store.days.summarize`."""
        written, self._written = self._written, set()
        try:
            days.summarize(self._engine, written)
        except BaseException:
            self._written = self._written | written
            raise

    def remove_days(self, retention_days: int) -> dt.date:
        """Removes the days before the last `retention_days`; see `server.audit.store.days.remove_days`."""
        return days.remove_days(self._engine, retention_days)

    def shipped(self, journal_id: str, start: Head, slot: str | None = None) -> Head:
        """How far this journal was shipped; a journal not seen before counts as shipped up to `start`, elsewhere.

        Args:
            journal_id: The journal.
            start: Its anchor.
            slot: Where it is written, `host:path`; None where that is not known.
        """
        with self._engine.begin() as connection:
            known = SHIPMENTS.c
            before = (
                sa.select(known.journal_id)
                .where(known.slot == slot, known.journal_id != journal_id)
                .order_by(known.started_at.desc())
                .limit(1)
            )
            connection.execute(
                self._inserts[SHIPMENTS],
                {
                    "journal_id": journal_id,
                    "position": start.position,
                    "hash": start.hash,
                    "anchor_position": start.position,
                    "anchor_hash": start.hash,
                    "shipped_at": _now(),
                    "started_at": _now(),
                    "missed_position": start.position,
                    "predecessor_id": None if slot is None else connection.scalar(before),
                },
            )
            if slot is not None:
                connection.execute(sa.update(SHIPMENTS).where(known.journal_id == journal_id).values(slot=slot))
            query = sa.select(SHIPMENTS.c.position, SHIPMENTS.c.hash).where(SHIPMENTS.c.journal_id == journal_id)
            row = connection.execute(query).one()
            return Head(row.position, row.hash)

    def state(self, journal_id: str, stated: bytes) -> None:
        """Keeps a serialised `JournalHead`: what the server says how far its journal has come."""
        with self._engine.begin() as connection:
            update = sa.update(SHIPMENTS).where(SHIPMENTS.c.journal_id == journal_id)
            connection.execute(update.values(stated_head=stated))

    def write(self, journal_id: str, shipped: Head, rows: Sequence[Row], stated: bytes | None = None) -> bool:
        """Stores the rows that follow `shipped`, in one transaction.

        Args:
            journal_id: Their journal.
            shipped: How far it was shipped.
            rows: What follows, at least one row.
            stated: As for `state`.

        Returns:
            False, with nothing stored, when `shipped` is not how far the journal was shipped: another process was
            faster.
        """
        shipment = Shipment(journal_id, rows, for_copy=self._copies)
        self._written = self._written | shipment.days()
        with suppress(days.TablesBusyError):  # a long read holds a lock: the day's rows wait in the default partition
            self._make_partitions(shipment.days())
        after = Head(rows[-1].position, rows[-1].hash)
        try:
            return self._write(shipment, journal_id, shipped, after, stated)
        except sa.exc.IntegrityError:
            # What one of the rows says is there already, said by another journal. COPY stores all rows or none.
            return self._write(Shipment(journal_id, rows), journal_id, shipped, after, stated, only_new=True)

    def _write(
        self,
        shipment: Shipment,
        journal_id: str,
        shipped: Head,
        after: Head,
        stated: bytes | None,
        *,
        only_new: bool = False,
    ) -> bool:
        """One transaction of `write`; with `only_new` it leaves out rows whose keys are there already."""
        with self._engine.begin() as connection:
            # First, so that this row's lock keeps two shippers of one journal apart. What is stored below is therefore
            # stored once, whatever became of an earlier attempt.
            moved = {"of_journal": journal_id, "from_position": shipped.position, "stated": stated}
            moved |= {"to_position": after.position, "to_hash": after.hash}
            shipped_at = connection.scalar(self._move_shipped, moved)
            if shipped_at is None:
                return False
            shipment.stamp(shipped_at)
            self._store(connection, JOURNAL_ENTRIES, shipment.entries)
            if shipment.decisions.rows or shipment.copied.rows:
                self._store(connection, DECISIONS, shipment.decisions, shipment.copied, only_new=only_new)
            for table, columns in (
                (OUTCOMES, shipment.outcomes),
                (SCORE_PAIRS, shipment.pairs),
                (PART_SCORES, shipment.parts),
            ):
                if columns.rows:
                    self._store(connection, table, columns, only_new=only_new)
            for table, others in (
                (CONTROL_CHANGES, shipment.changes),
                (SETTINGS, shipment.settings),
                (CANARY_EVENTS, shipment.canary_events),
                (ACCESS_REFUSALS, shipment.refusals),
            ):
                if others:
                    connection.execute(self._inserts[table], others)
            keyed = shipment.keyed()
            if shipment.statuses or shipment.repeats or keyed:
                self._write_replies(connection, shipment, keyed)
        return True

    def _store(
        self,
        connection: sa.Connection,
        table: sa.Table,
        columns: Columns,
        copied: DecisionRows | None = None,
        *,
        only_new: bool = False,
    ) -> None:
        """Stores rows: in PostgreSQL by COPY, unless `only_new` says that some may be there already."""
        if not self._copies:
            _insert_many(connection, table, columns)
        elif only_new:
            names = columns.names()
            rows = [dict(zip(names, row, strict=True)) for row in parameters(table, columns)]
            connection.execute(self._inserts[table], rows)
        else:
            from server.audit.store.binary_copy import (  # noqa: PLC0415 - numpy, which readers do not need
                binary_copy,
                start_of_row,
            )

            written = () if copied is None else copied.write(start_of_row(table, columns))
            _copy(connection, *binary_copy(table, columns, written))

    def _write_replies(self, connection: sa.Connection, shipment: Shipment, keyed: set[str]) -> None:
        """What callers heard. What repeats received takes precedence, whichever of two journals is shipped first."""
        if self._copies:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_REPLIES_LOCK)))
        if shipment.statuses:
            _update(connection, _SET_REPLY, shipment.statuses)
        if shipment.repeats:
            connection.execute(self._insert_repeats, shipment.repeats)
        said = {one["of_decision_id"] for one in shipment.statuses} | {one["decision_id"] for one in shipment.repeats}
        if repeated := _repeats_of(connection, keyed | said):
            _update(connection, _SET_REPLY_OF_REPEATS, [{"of_decision_id": one} for one in sorted(repeated)])

    def repeats(self, decision_ids: Collection[str]) -> dict[str, Reply]:
        """What repeats of their calls heard, by id, of those of the decisions that have any."""
        with self._engine.connect() as connection:
            return _repeats_of(connection, decision_ids)

    def find(self, decision_id: str, *, any_day: bool = True) -> StoredDecision | None:
        """The decision with this id, or None.

        Args:
            decision_id: It says when it was made, and so which day's partition holds the decision.
            any_day: Whether to search the other days too if it is not there, as after a clock was set.
        """
        query = _WITH_EVIDENCE.where(DECISIONS.c.decision_id == decision_id)
        day = _near(decision_id)
        with self._engine.connect() as connection:
            found = connection.execute(query.where(_decided(day))).one_or_none()
            if found is None and any_day and day is not _ANY_DAY:
                found = connection.execute(query).one_or_none()
        if found is None:
            return None
        return _stored(found)

    def find_all(self, decision_ids: Collection[str]) -> list[StoredDecision]:
        """Those of the decisions that are here; they are looked for on the days on which they were made."""
        days = [_near(one) for one in decision_ids]
        if not days:
            return []
        near = _decided({"since": min(day["since"] for day in days), "until": max(day["until"] for day in days)})
        with self._engine.connect() as connection:
            return [
                _stored(row)
                for ids in _batches(decision_ids)
                for row in connection.execute(_WITH_EVIDENCE.where(DECISIONS.c.decision_id.in_(ids), near))
            ]

    def newest(
        self,
        matching: Matching,
        limit: int,
        bounds: Bounds = Bounds(),  # noqa: B008 - frozen
    ) -> list[StoredDecision]:
        """The decisions with the highest ids of those that match, in descending order; see `newest.py`."""
        with self._engine.connect() as connection:
            found = newest.read(connection, matching, limit, bounds)
        rows = {
            (one.journal_id, one.journal_position): Row(one.journal_position, one.entry, one.hash)
            for one in found
            if one.entry is not None
        }
        return [
            StoredDecision(rows[key], one.journal_row, one.journal_id, _reply(one))
            for one in found
            if (key := (one.journal_id, one.journal_position)) in rows
        ]

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection for reports that may take long, in one read-only transaction."""
        with self._engine.connect() as connection:
            if self._copies:
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
                connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            yield connection

    def add_labels(self, rows: Sequence[RowValues]) -> None:
        """Stores labels; one that is there already is left as it is."""
        if rows:
            with self._engine.begin() as connection:
                connection.execute(self._inserts[LABELS], rows)

    def connect(self) -> sa.Connection:
        """A connection to query with."""
        return self._engine.connect()

    def journals(self) -> dict[str, Head]:
        """How far each journal was shipped, by journal id."""
        with self._engine.connect() as connection:
            query = sa.select(SHIPMENTS.c.journal_id, SHIPMENTS.c.position, SHIPMENTS.c.hash)
            rows = connection.execute(query.order_by(SHIPMENTS.c.journal_id)).all()
        return {row.journal_id: Head(row.position, row.hash) for row in rows}

    def shipments(self) -> list[Shipped]:
        """What is known of every journal, in the order in which they began."""
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(SHIPMENTS).order_by(SHIPMENTS.c.started_at, SHIPMENTS.c.journal_id))
            return [_shipped(row) for row in rows]

    def checkpoint(self, shipped: Shipped) -> Checkpoint | None:
        """The position up to which this journal was verified before, if its row is still stored; None if it never was.

        Raises:
            JournalCorruptedError: What was verified is not all there, or is not what it was; with its position.
        """
        verified, entries = VERIFICATIONS.c, JOURNAL_ENTRIES.c
        ours = entries.journal_id == shipped.journal_id
        first = shipped.anchor.position
        with self._engine.connect() as connection:
            query = sa.select(VERIFICATIONS).where(verified.journal_id == shipped.journal_id)
            found = connection.execute(query).first()
            if found is None or found.position <= first:
                return None
            at = sa.select(entries.entry, entries.hash).where(ours, entries.position == found.position)
            row = connection.execute(at).first()
            rows = connection.scalar(
                sa.select(sa.func.count()).where(ours, entries.position > first, entries.position <= found.position)
            )
            if row is None or rows != found.position - first:
                gap = _first_gap(connection, shipped.journal_id, first)
                raise JournalCorruptedError(gap, "missing; it was verified before")
            before = sa.select(entries.hash).where(ours, entries.position == found.position - 1)
            previous = connection.scalar(before)
            if found.position - 1 == first:
                previous = shipped.anchor.hash
            if row.hash != found.hash or (previous is not None and link(previous, row.entry) != found.hash):
                raise JournalCorruptedError(found.position, "not what was verified before")
        return Checkpoint(Head(found.position, found.hash), found.verified_at)

    def remember_verified(self, journal_id: str, head: Head) -> None:
        """Makes a checkpoint: every row up to `head` was verified. One that is further already stays."""
        values = {"position": head.position, "hash": head.hash, "verified_at": _now()}
        with self._engine.begin() as connection:
            connection.execute(self._insert_verification, {"journal_id": journal_id, **values})

    def write_off(self, journal_id: str, note: str, *, beginning: bool = False) -> bool:
        """Notes that a journal's missing end, or its beginning, is given up; False when there is no such journal."""
        values = {"missed_written_off" if beginning else "written_off": note}
        with self._engine.begin() as connection:
            update = sa.update(SHIPMENTS).where(SHIPMENTS.c.journal_id == journal_id).values(values)
            return connection.execute(update).rowcount == 1

    def hash_at(self, journal_id: str, position: int) -> bytes | None:
        """The hash of a row; None when it is not here."""
        entries = JOURNAL_ENTRIES.c
        query = sa.select(entries.hash).where(entries.journal_id == journal_id, entries.position == position)
        with self._engine.connect() as connection:
            return connection.scalar(query)

    def verify(self, journal_id: str, since: Head | None = None) -> tuple[int, int]:
        """Walks the shipped rows of a journal and checks them against the chain.

        Args:
            journal_id: The journal.
            since: A point of the chain from which on to walk; None for where the evidence begins.

        Returns:
            The first and the last position of what was walked; (0, 0) without rows.

        Raises:
            JournalCorruptedError: A row is missing or was changed; with its position.
        """
        first = 0
        entries = JOURNAL_ENTRIES.c
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(SHIPMENTS).where(SHIPMENTS.c.journal_id == journal_id)).one()
            shipped = _shipped(row)
            head = shipped.anchor if since is None else since
            query = (
                sa.select(entries.position, entries.entry, entries.hash)
                # Not what is shipped while we read.
                .where(entries.journal_id == journal_id, entries.position <= shipped.head.position)
                .order_by(entries.position)
            )
            if since is not None:
                query = query.where(entries.position > since.position)
            with connection.execution_options(yield_per=_READ_ROWS).execute(query) as found:
                for position, entry, digest in found:
                    first = first or position
                    head = follow(head, Row(position, entry, digest))
        if head != shipped.head:
            raise JournalCorruptedError(head.position + 1, f"missing; {shipped.head.position} rows were shipped")
        return first, head.position if first else 0

    def close(self) -> None:
        """Closes every connection."""
        self._engine.dispose()


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise ValueError("the database URL is malformed") from error  # without the URL: it may hold a password
    match parsed.get_backend_name():
        case "sqlite":
            engine = sa.create_engine(parsed, connect_args={"timeout": 10.0})
            sa.event.listen(engine, "connect", _prepare_sqlite)
            sa.event.listen(engine, "begin", _begin_sqlite)
        case "postgresql":
            # A server that has vanished is noticed: by the time of a statement, or of unacknowledged data.
            engine = sa.create_engine(
                parsed,
                pool_pre_ping=True,
                connect_args={
                    "connect_timeout": 5,
                    "tcp_user_timeout": 10_000,
                    "application_name": "pretrade-audit",
                    "options": "-c statement_timeout=30000",
                },
            )
        case other:
            raise ValueError(f"the audit store speaks SQLite and PostgreSQL, not {other}")
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # Python's driver begins no transaction before DDL: we do
    connection.execute("PRAGMA journal_mode = WAL")


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _update(connection: sa.Connection, update: sa.Update, rows: Sequence[RowValues]) -> None:
    """Updates decisions, each on the day that its id names, and all on any day where one of them was not updated.

    It may be on another day, since a clock was set, or not here, or as it is to be. To update one twice does no harm.
    """
    found = connection.execute(update, [_near(row["of_decision_id"]) | row for row in rows])
    if found.rowcount < len(rows):
        connection.execute(update, [_ANY_DAY | row for row in rows])


def _near(decision_id: str) -> RowValues:
    """Between which instants a decision was made that its id names; any, where it names none."""
    made = made_at(decision_id)
    if made is None or dt.datetime.max.replace(tzinfo=dt.UTC) - made < CLOCK_ERROR:
        return _ANY_DAY
    return {"since": made - CLOCK_ERROR, "until": made + CLOCK_ERROR}


def _decided(day: RowValues) -> sa.ColumnElement[bool]:
    """Chooses the partitions."""
    return DECISIONS.c.decided_at.between(day["since"], day["until"])


def _repeats_of(connection: sa.Connection, decision_ids: Collection[str]) -> dict[str, Reply]:
    return {
        row.decision_id: _reply(row)
        for ids in _batches(decision_ids)
        for row in connection.execute(sa.select(REPEATS).where(REPEATS.c.decision_id.in_(ids)))
    }


def _batches(decision_ids: Iterable[str]) -> Iterator[tuple[str, ...]]:
    ids = iter(decision_ids)
    while some := tuple(itertools.islice(ids, _ASKED_IDS)):
        yield some


def _reply(row: sa.Row[Any]) -> Reply:
    """What became of a reply, from the columns of a row."""
    if row.reply_status == REPLIED:
        return AS_DECIDED
    action = audit_pb2.HeardAction.Value(f"HEARD_ACTION_{row.heard_action}")
    return Reply(
        row.reply_status, action, tuple(pb.ReasonCode.Value(f"REASON_CODE_{name}") for name in row.heard_reasons)
    )


def _stored(row: sa.Row[Any]) -> StoredDecision:
    evidence = Row(row.position, row.entry, row.hash)
    return StoredDecision(evidence, row.journal_row, row.journal_id, _reply(row))


def _shipped(row: sa.Row[Any]) -> Shipped:
    stated = None if row.stated_head is None else packet_pb2.JournalHead.FromString(row.stated_head)
    return Shipped(
        row.journal_id,
        Head(row.anchor_position, row.anchor_hash),
        Head(row.position, row.hash),
        row.slot or "",
        row.predecessor_id or "",
        stated,
        row.written_off or "",
        row.missed_position,
        row.missed_written_off or "",
    )


def _first_gap(connection: sa.Connection, journal_id: str, first: int) -> int:
    """The first position after `first` at which there is no row."""
    here, after = JOURNAL_ENTRIES.alias(), JOURNAL_ENTRIES.alias()
    follows = sa.exists().where(after.c.journal_id == journal_id, after.c.position == here.c.position + 1)
    gap = sa.select(sa.func.min(here.c.position)).where(here.c.journal_id == journal_id, ~follows)
    there = sa.select(sa.func.min(here.c.position)).where(here.c.journal_id == journal_id)
    if connection.scalar(there) != first + 1:
        return first + 1
    return int(connection.scalar(gap) or first) + 1


def _copy(connection: sa.Connection, statement: str, data: bytes) -> None:
    """Stores rows in PostgreSQL, all or none.

    Raises:
        sqlalchemy.exc.IntegrityError: The key of one of them is there already.
        sqlalchemy.exc.DBAPIError: The database refuses, or is away.
    """
    raw = connection.connection.driver_connection
    assert isinstance(raw, psycopg.Connection)
    try:
        with raw.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            copy.write(data)
    except psycopg.errors.UniqueViolation as error:
        raise sa.exc.IntegrityError(statement, None, error) from error
    except psycopg.Error as error:
        raise sa.exc.DBAPIError(statement, None, error) from error


def _insert_many(connection: sa.Connection, table: sa.Table, columns: Columns) -> None:
    """What `connection.execute` does with many rows in SQLite, which takes twice as long to get them ready."""
    names = columns.names()
    places = ", ".join("?" * len(names))
    statement = f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({places}) ON CONFLICT DO NOTHING"  # noqa: S608
    connection.exec_driver_sql(statement, parameters(table, columns, connection.dialect))
