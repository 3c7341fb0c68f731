"""The days of the audit database: a partition for each in PostgreSQL, and the removal of those past their retention.

A row whose day has no partition is stored all the same, in the table's default partition, and moves when the day gets
its own. SQLite has no partitions; there the rows of a day are deleted.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import psycopg
import sqlalchemy as sa

from server.audit.store.canaries import SCORE_PAIRS
from server.audit.store.schema import DECISIONS, JOURNAL_ENTRIES, PART_SCORES, REPEATS, SHIPMENTS

_KEYS: Final = {JOURNAL_ENTRIES: JOURNAL_ENTRIES.c.shipped_at, DECISIONS: DECISIONS.c.decided_at}
_LOCK: Final = 0x5052_4544
"""Key of PostgreSQL's advisory lock: several shippers share a database."""
_SUMMARY_LOCK_MS: Final = 200
"""Less than `deadlock_timeout`, after which PostgreSQL ends an autovacuum that somebody waits for."""


class TablesBusyError(Exception):
    """Somebody reads these tables for long, and waiting for a lock would make everybody else wait behind us."""


def make_partitions(engine: sa.Engine, days: Iterable[dt.date]) -> None:
    """Gives each of the days a partition in PostgreSQL, where it has none yet.

    Raises:
        TablesBusyError: None was made.
        sqlalchemy.exc.SQLAlchemyError: The database cannot be reached, or refuses.
    """
    with _unless_busy(engine) as connection:
        for table in _KEYS:
            existing = _partitions(connection, table)
            for day in days:
                if day not in existing:
                    _make_partition(connection, table, day)


def summarize(engine: sa.Engine, days: Iterable[dt.date]) -> None:
    """Has PostgreSQL summarize the pages that were written to these days' decisions since the last time.

    Pages without a summary are read by every list that searches for a rare value. Does nothing while VACUUM is at work
    on a day, which does the same: not even wait so long that PostgreSQL would end an autovacuum for it.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: The database cannot be reached, or refuses.
    """
    if engine.dialect.name != "postgresql":
        return
    tables = [*(_name(DECISIONS, day) for day in days), f"{DECISIONS.name}_other"]
    indexes = sa.text(
        "SELECT inhrelid::regclass::text FROM pg_inherits JOIN pg_index ON indexrelid = inhrelid"
        " WHERE inhparent = 'ix_decisions_filters'::regclass AND indrelid::regclass::text = ANY(:tables)"
    )
    with engine.connect() as connection:
        names = connection.scalars(indexes, {"tables": tables}).all()
        connection.commit()
        for name in names:
            try:
                with connection.begin():
                    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{_SUMMARY_LOCK_MS}ms'")
                    connection.execute(sa.text("SELECT brin_summarize_new_values(:index)"), {"index": name})
            except sa.exc.OperationalError as error:
                if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                    raise


def remove_days(engine: sa.Engine, retention_days: int) -> dt.date:
    """Removes the days before the last `retention_days`, by the database's clock, and remembers where evidence begins.

    Returns:
        The first day that is not removed.

    Raises:
        TablesBusyError: Nothing was removed.
        sqlalchemy.exc.SQLAlchemyError: The database cannot be reached, or refuses; nothing was removed.
    """
    with _unless_busy(engine) as connection:
        now: dt.datetime = connection.scalar(sa.select(sa.func.now()))  # type: ignore[assignment]
        first = (now if now.tzinfo is None else now.astimezone(dt.UTC)).date() - dt.timedelta(days=retention_days)
        before = dt.datetime.combine(first, dt.time(), dt.UTC)
        _move_anchors(connection, before)
        if connection.dialect.name == "postgresql":
            for table in _KEYS:
                for day in _partitions(connection, table):
                    if day < first:
                        connection.execute(sa.text(f"DROP TABLE {_name(table, day)}"))
        for table, key in _KEYS.items():
            rest = f"{table.name}_other" if connection.dialect.name == "postgresql" else table.name
            delete = sa.text(f"DELETE FROM {rest} WHERE {key.name} < :before")  # noqa: S608 - our own names
            connection.execute(delete.bindparams(sa.bindparam("before", before, key.type)))
        connection.execute(sa.delete(PART_SCORES).where(PART_SCORES.c.decided_at < before))
        connection.execute(sa.delete(SCORE_PAIRS).where(SCORE_PAIRS.c.recorded_at < before))
        connection.execute(sa.delete(REPEATS).where(REPEATS.c.shipped_at < before))
    return first


def _move_anchors(connection: sa.Connection, before: dt.datetime) -> None:
    """Notes, for every journal, the last entry that is about to be removed."""
    entries = JOURNAL_ENTRIES.c
    last = (
        sa.select(entries.journal_id, sa.func.max(entries.position).label("position"))
        .where(entries.shipped_at < before)
        .group_by(entries.journal_id)
        .subquery()
    )
    removed = sa.select(entries.journal_id, entries.position, entries.hash).join(
        last, sa.and_(entries.journal_id == last.c.journal_id, entries.position == last.c.position)
    )
    for journal_id, position, digest in connection.execute(removed.where(entries.shipped_at < before)).all():
        connection.execute(
            sa.update(SHIPMENTS)
            .where(SHIPMENTS.c.journal_id == journal_id)
            .values(anchor_position=position, anchor_hash=digest)
        )


@contextmanager
def _unless_busy(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction in which no lock is waited for long; one shipper at a time."""
    try:
        with engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET LOCAL lock_timeout = '2s'")
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            yield connection
    except sa.exc.OperationalError as error:
        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
            raise TablesBusyError("the audit tables are being read or changed") from error
        raise


def _name(table: sa.Table, day: dt.date) -> str:
    return f"{table.name}_{day:%Y%m%d}"


def _partitions(connection: sa.Connection, table: sa.Table) -> set[dt.date]:
    names = connection.scalars(
        sa.text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = to_regclass(:parent)"),
        {"parent": table.name},
    )
    suffixes = (name.rpartition("_")[2] for name in names)
    return {dt.datetime.strptime(one, "%Y%m%d").date() for one in suffixes if one.isdigit()}  # noqa: DTZ007 - a date


def _make_partition(connection: sa.Connection, table: sa.Table, day: dt.date) -> None:
    """Creates a partition and moves the rows of its day from the default partition into it.

    It is attached, not created in place, so that writers of other days need not wait.
    """
    name, other, key = _name(table, day), f"{table.name}_other", _KEYS[table].name
    first, end = f"'{day} 00:00:00+00'", f"'{day + dt.timedelta(days=1)} 00:00:00+00'"
    for statement in (
        f"LOCK TABLE {other} IN ACCESS EXCLUSIVE MODE",  # what arrives meanwhile waits for the new partition
        f"CREATE TABLE {name} (LIKE {table.name} INCLUDING DEFAULTS INCLUDING STORAGE)",
        f"WITH moved AS (DELETE FROM {other} WHERE {key} >= {first} AND {key} < {end} RETURNING *)"  # noqa: S608
        f" INSERT INTO {name} SELECT * FROM moved",
        f"ALTER TABLE {table.name} ATTACH PARTITION {name} FOR VALUES FROM ({first}) TO ({end})",
    ):
        connection.exec_driver_sql(statement)
