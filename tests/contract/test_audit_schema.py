"""The tables of the audit database through versions and days, on both databases."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store.days import TablesBusyError
from server.audit.store.schema import DECISIONS, METADATA
from server.audit.store.store import Store
from server.decision.ids import Ids
from server.errors import JournalCorruptedError, SchemaUnknownError
from server.journal import reply_status
from server.journal.journal_file import GENESIS, Head, Row, follow, link

NEWEST = "0001"
"""The last revision in `server/audit/store/migrations/versions`."""
JOURNAL = "journal-1"
START = Head(0, GENESIS)
TODAY = dt.datetime.now(dt.UTC)


@pytest.fixture
def engine(audit_url: str) -> Iterator[sa.Engine]:
    """What an auditor uses."""
    engine = sa.create_engine(audit_url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(audit_url: str) -> Iterator[Store]:
    with closing(Store(audit_url)) as store:
        yield store


def decision(decision_id: str, decided_at: dt.datetime) -> bytes:
    entry = packet_pb2.JournalEntry()
    entry.decision.order.instrument, entry.decision.order.side = "BTCUSDT.BINANCE", pb.SIDE_BUY
    entry.decision.decision.decision_id = decision_id
    entry.decision.decision.decided_at.FromDatetime(decided_at.replace(tzinfo=None))
    return entry.SerializeToString()


def chained(after: Head, *entries: bytes) -> list[Row]:
    rows = []
    for entry in entries:
        rows.append(Row(after.position + 1, entry, link(after.hash, entry)))
        after = follow(after, rows[-1])
    return rows


def ship(store: Store, *entries: bytes) -> list[Row]:
    head = store.shipped(JOURNAL, START)
    rows = chained(head, *entries)
    assert store.write(JOURNAL, head, rows)
    return rows


def ids_of_yesterday(store: Store, ids: int) -> tuple[dt.datetime, list[str]]:
    """Noon of yesterday, and some ids that were made then; the tables have partitions for the days around it."""
    store.migrate()
    store.prepare_days(2)
    noon = TODAY.replace(hour=12) - dt.timedelta(days=1)
    new_id = Ids(lambda: int(noon.timestamp() * 1e9))
    return noon, [new_id() for _ in range(ids)]


def statements_of(store: Store, begin: str = "") -> list[tuple[str, Any]]:
    """The statements that a store executes from now on and that begin so, each with its parameters."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if statement.startswith(begin):
            asked.append((statement, parameters))

    with store.connect() as connection:
        sa.event.listen(connection.engine, "before_cursor_execute", note)
    return asked


def age(engine: sa.Engine, positions: str, days: int) -> None:
    """Makes the rows look as if they had been shipped and decided so many days ago."""
    then = sa.bindparam("then", TODAY - dt.timedelta(days=days), sa.DateTime(timezone=True))
    with engine.begin() as connection:
        for statement in (
            f"UPDATE journal_entries SET shipped_at = :then WHERE position IN ({positions})",
            f"UPDATE decisions SET shipped_at = :then, decided_at = :then WHERE journal_position IN ({positions})",
        ):
            connection.execute(sa.text(statement).bindparams(then))


def positions(engine: sa.Engine, table: str = "journal_entries", column: str = "position") -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text(f"SELECT {column} FROM {table} ORDER BY 1")))


def test_the_one_migration_makes_exactly_the_tables_that_queries_know(store: Store, engine: sa.Engine) -> None:
    assert store.migrate() == (None, NEWEST)

    def is_compared(_object: object, name: str | None, kind: str, _reflected: bool, _other: object) -> bool:
        partition = kind == "table" and str(name).endswith("_other")
        return kind != "index" and not partition

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "include_object": is_compared})
        differences = [
            one
            for group in compare_metadata(context, METADATA)
            for one in (group if isinstance(group, list) else [group])
            if one[0] != "modify_comment"  # what a column means is said in the code alone
        ]
        made = {table: sa.inspect(connection).get_pk_constraint(table) for table in METADATA.tables}
    assert differences == []
    partition_keys = {"journal_entries": "shipped_at", "decisions": "decided_at"}
    for name, table in METADATA.tables.items():
        primary_key = [column.name for column in table.primary_key]
        if engine.dialect.name == "postgresql" and name in partition_keys:
            primary_key.append(partition_keys[name])
        assert made[name]["constrained_columns"] == primary_key, name


def test_two_servers_that_start_at_once_make_the_tables_once(audit_url: str, engine: sa.Engine) -> None:
    with closing(Store(audit_url)) as first, closing(Store(audit_url)) as second:
        assert first.migrate()[0] is None
        assert second.migrate() == (NEWEST, NEWEST)
        ship(first, decision("d1", TODAY))
        ship(second, decision("d2", TODAY))
    assert positions(engine) == [1, 2]


def test_a_database_of_a_newer_version_is_left_alone(store: Store, engine: sa.Engine) -> None:
    store.migrate()
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaUnknownError, match="9999"):
        store.migrate()


def test_days_past_their_retention_are_removed_whole_and_the_chain_still_verifies(
    store: Store, engine: sa.Engine
) -> None:
    store.migrate()
    store.prepare_days(1)
    rows = ship(store, *(decision(f"d{i}", TODAY - dt.timedelta(days=9 - i)) for i in range(1, 9)))
    for i in range(1, 9):
        age(engine, str(i), 9 - i)
    assert store.remove_days(3) == TODAY.date() - dt.timedelta(days=3)
    assert positions(engine) == positions(engine, "decisions", "journal_position") == [6, 7, 8]
    assert store.verify(JOURNAL) == (6, 8)
    assert store.find("d5") is None
    found = store.find("d6")
    assert found is not None
    assert found.row == rows[5]
    store.remove_days(3)
    assert store.verify(JOURNAL) == (6, 8)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM journal_entries WHERE position = 6"))
    with pytest.raises(JournalCorruptedError) as caught:  # not everything that is gone is past its retention
        store.verify(JOURNAL)
    assert caught.value.position == 6


def test_when_everything_is_past_its_retention_shipping_goes_on_where_it_was(store: Store, engine: sa.Engine) -> None:
    store.migrate()
    ship(store, decision("d1", TODAY), decision("d2", TODAY))
    age(engine, "1, 2", 30)
    store.remove_days(7)
    assert positions(engine) == []
    assert store.verify(JOURNAL) == (0, 0)
    ship(store, decision("d3", TODAY))
    assert store.verify(JOURNAL) == (3, 3)


@pytest.mark.stack
class TestOnPostgreSQL:
    @pytest.fixture
    def audit_url(self, database_url: str) -> str:
        return database_url

    def partitions(self, engine: sa.Engine) -> dict[str, int]:
        """Decisions by partition."""
        query = sa.text("SELECT tableoid::regclass::text, count(*) FROM decisions GROUP BY 1")
        with engine.connect() as connection:
            return {name: count for name, count in connection.execute(query)}  # noqa: C416 - a Row is no pair to mypy

    def test_each_day_is_a_partition_and_an_impossible_day_is_stored_all_the_same(
        self, store: Store, engine: sa.Engine
    ) -> None:
        store.migrate()
        store.prepare_days(2)
        yesterday, century = TODAY - dt.timedelta(days=1), TODAY + dt.timedelta(days=36500)
        ship(store, decision("d1", TODAY), decision("d2", yesterday), decision("d3", century))
        assert self.partitions(engine) == {
            f"decisions_{TODAY:%Y%m%d}": 1,
            f"decisions_{yesterday:%Y%m%d}": 1,
            "decisions_other": 1,
        }

    def test_a_decision_is_looked_up_in_the_day_that_its_id_names_and_found_in_any_other(
        self, store: Store, engine: sa.Engine
    ) -> None:
        noon, ids = ids_of_yesterday(store, 2)
        ship(store, decision(ids[0], noon), decision(ids[1], TODAY))
        asked = statements_of(store)
        assert store.find(ids[0]) is not None
        ((statement, parameters),) = asked
        with engine.connect() as connection:
            plan = str(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).all())
        assert set(re.findall(r"on (decisions_\w+)", plan)) == {f"decisions_{noon:%Y%m%d}"}
        assert store.find(ids[1]) is not None, "its clock was set between id and decision"
        assert len(asked) == 3

    def test_what_a_caller_heard_is_written_on_the_day_that_the_id_names_and_on_any_other(
        self, store: Store, engine: sa.Engine
    ) -> None:
        noon, ids = ids_of_yesterday(store, 2)
        ship(store, decision(ids[0], noon), decision(ids[1], TODAY), decision("no id of ours", TODAY))
        asked = statements_of(store, "UPDATE decisions")
        for times, decision_id in ((1, ids[0]), (2, ids[1]), (1, "no id of ours")):
            asked.clear()
            ship(store, reply_status.unconfirmed(decision_id, "cancelled"))
            assert len(asked) == times, "its clock was set between id and decision, where it takes two"
            statement, parameters = asked[0]
            parameters = parameters[0] if isinstance(parameters, list) else parameters
            with engine.connect() as connection:
                plan = str(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).all())
                query = sa.select(DECISIONS.c.reply_status).where(DECISIONS.c.decision_id == decision_id)
                assert connection.execute(query).scalar_one() == "reply_unconfirmed:cancelled"
            days = set(re.findall(r"on (decisions_\w+)", plan))
            assert (days == {f"decisions_{noon:%Y%m%d}"}) == (decision_id in ids)

    def test_what_several_callers_heard_is_written_where_one_of_them_is_on_another_day(
        self, store: Store, engine: sa.Engine
    ) -> None:
        noon, ids = ids_of_yesterday(store, 3)
        last = "e677d21f-dbff-7000-8000-000000000000"  # of the last millisecond of the year 9999
        ship(store, *(decision(one, noon) for one in ids[:2]), decision(ids[2], TODAY), decision(last, TODAY))
        ship(store, *(reply_status.unconfirmed(one, "cancelled") for one in (*ids, last, "nobody")))
        with engine.connect() as connection:
            found = connection.execute(sa.select(DECISIONS.c.decision_id, DECISIONS.c.reply_status)).all()
        assert {tuple(row) for row in found} == {(one, "reply_unconfirmed:cancelled") for one in (*ids, last)}
        assert store.find(last) is not None

    def test_what_was_stored_before_its_day_had_a_partition_moves_into_it(
        self, store: Store, engine: sa.Engine
    ) -> None:
        store.migrate()
        ship(store, decision("d1", TODAY))
        with engine.begin() as connection:
            name = f"decisions_{TODAY:%Y%m%d}"
            connection.execute(sa.text(f"ALTER TABLE decisions DETACH PARTITION {name}"))
            connection.execute(sa.text(f"INSERT INTO decisions SELECT * FROM {name}"))
            connection.execute(sa.text(f"DROP TABLE {name}"))
        assert self.partitions(engine) == {"decisions_other": 1}
        store.prepare_days(0)
        assert self.partitions(engine) == {name: 1}

    def test_a_long_report_delays_the_removal_of_days_and_a_new_partition_but_no_shipping(
        self, store: Store, engine: sa.Engine
    ) -> None:
        store.migrate()
        old = TODAY - dt.timedelta(days=5)
        ship(store, decision("d1", old))
        with engine.connect() as report:
            report.execute(sa.text("SELECT * FROM decisions"))
            with pytest.raises(TablesBusyError):
                store.remove_days(1)
            ship(store, decision("d2", TODAY))
        assert self.partitions(engine) == {f"decisions_{old:%Y%m%d}": 1, "decisions_other": 1}
        store.remove_days(1)
        store.prepare_days(1)
        assert self.partitions(engine) == {f"decisions_{TODAY:%Y%m%d}": 1}
