"""Lists of decisions: what they find on both databases, and that none of them reads more than it must."""

from __future__ import annotations

import datetime as dt
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, Final

import pytest
import sqlalchemy as sa

from pretrade.admin.v1 import admin_pb2
from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading import filters
from server.audit.reading.query import AuditQuery
from server.audit.store import newest
from server.audit.store.newest import Bounds
from server.audit.store.refusals import refusals
from server.audit.store.schema import DECISIONS
from server.audit.store.store import Store
from server.decision.ids import Ids
from server.journal.journal_file import GENESIS, Head, Row, link

JOURNAL: Final = "journal-1"
MIDNIGHT: Final = dt.datetime.now(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
STEP: Final = dt.timedelta(minutes=18)
"""Between two decisions."""
ROWS: Final = 240
"""Three days of them."""
FIRST: Final = MIDNIGHT - dt.timedelta(days=2)
FILTERS: Final = {
    "strategies": audit_pb2.DecisionFilter(strategies=["rare", "unheard of"]),
    "instrument": audit_pb2.DecisionFilter(instruments=["I3"]),
    "action": audit_pb2.DecisionFilter(decided_actions=[pb.ACTION_ABSTAIN]),
    "heard": audit_pb2.DecisionFilter(heard_actions=[audit_pb2.HEARD_ACTION_ABSTAIN]),
    "nothing heard": audit_pb2.DecisionFilter(heard_actions=[audit_pb2.HEARD_ACTION_NOTHING]),
    "sources": audit_pb2.DecisionFilter(sources=[pb.SOURCE_RULES, pb.SOURCE_NONE]),
    "model": audit_pb2.DecisionFilter(model="version-4"),
    "strategy and action": audit_pb2.DecisionFilter(strategies=["common"], decided_actions=[pb.ACTION_TRADE]),
    "nothing": audit_pb2.DecisionFilter(strategies=["unheard of"]),
}

COLUMNS: Final = {
    "strategies": ["strategy"],
    "instrument": ["instrument"],
    "action": ["action"],
    "heard": ["heard_action"],
    "nothing heard": ["heard_action"],
    "sources": ["source"],
    "model": ["model_name", "model_version"],
    "strategy and action": ["strategy", "action"],
    "nothing": ["strategy"],
}
"""What each of them restricts."""


HEARD: Final = {70: audit_pb2.HEARD_ACTION_ABSTAIN, 121: audit_pb2.HEARD_ACTION_NOTHING}
"""What callers heard instead of the decision, by position; the decision at 121 is the only abstention."""


def notes() -> list[packet_pb2.JournalEntry]:
    """They follow the decisions in the journal."""
    late, gone = (packets()[position - 1].decision.decision_id for position in (70, 121))
    told = packet_pb2.ReplyUnconfirmed(decision_id=late, cause="audit_late", heard_action=pb.ACTION_ABSTAIN)
    cancelled = packet_pb2.ReplyUnconfirmed(decision_id=gone, cause="cancelled")
    return [packet_pb2.JournalEntry(reply_unconfirmed=note) for note in (told, cancelled)]


@functools.cache
def packets() -> tuple[packet_pb2.DecisionPacket, ...]:
    """In the order of their journal, where the first one has position 1."""
    found = []
    now = FIRST
    new_id = Ids(lambda: int(now.timestamp() * 1e9))
    for i in range(ROWS):
        packet = packet_pb2.DecisionPacket()
        order, answer = packet.order, packet.decision
        order.instrument, order.strategy, order.side = (
            f"I{i % 7}",
            "rare" if i in {5, 100, 230} else "common",
            pb.SIDE_BUY,
        )
        answer.decision_id = new_id()
        answer.action = pb.ACTION_ABSTAIN if i == 120 else (pb.ACTION_TRADE, pb.ACTION_NO_TRADE)[i % 2]
        answer.source = pb.SOURCE_RULES if i % 50 == 0 else pb.SOURCE_PRIMARY
        answer.model_name, answer.model_version = "champion", f"version-{i % 9}"
        answer.decided_at.FromDatetime(now)
        found.append(packet)
        now += STEP
    return tuple(found)


@pytest.fixture
def store(audit_url: str) -> Iterator[Store]:
    with closing(Store(audit_url)) as store:
        store.migrate()
        rows, digest = [], GENESIS
        decided = [packet_pb2.JournalEntry(decision=packet) for packet in packets()]
        for position, one in enumerate((*decided, *notes()), start=1):
            entry = one.SerializeToString()
            digest = link(digest, entry)
            rows.append(Row(position, entry, digest))
        assert store.write(JOURNAL, store.shipped(JOURNAL, Head(0, GENESIS)), rows)
        yield store


def expected(wanted: audit_pb2.DecisionFilter, bounds: Bounds) -> list[int]:
    """The positions of what matches, the newest first."""
    found = []
    for position, packet in enumerate(packets(), start=1):
        order, answer = packet.order, packet.decision
        at = answer.decided_at.ToDatetime(dt.UTC)
        if (
            (not bounds.before or answer.decision_id < bounds.before)
            and (bounds.since is None or at >= bounds.since)
            and (bounds.until is None or at < bounds.until)
            and (not wanted.instruments or order.instrument in wanted.instruments)
            and (not wanted.strategies or order.strategy in wanted.strategies)
            and (not wanted.decided_actions or answer.action in wanted.decided_actions)
            and (not wanted.heard_actions or HEARD.get(position, answer.action) in wanted.heard_actions)
            and (not wanted.sources or answer.source in wanted.sources)
            and (not wanted.model or wanted.model in {answer.model_name, answer.model_version})
        ):
            found.append(position)
    return found[::-1]


@pytest.mark.long
@pytest.mark.parametrize("walks", [(3, 7), (1, 1), (50, 100), (50_000, 500_000)])
def test_a_list_holds_what_matches_whether_it_was_walked_to_or_searched_for(
    store: Store, monkeypatch: pytest.MonkeyPatch, walks: tuple[int, int]
) -> None:
    monkeypatch.setattr(newest, "_WALKS", walks)
    monkeypatch.setattr(newest, "_FEW", 2)
    bounds = (
        Bounds(),
        Bounds(since=FIRST + 60 * STEP),
        Bounds(until=FIRST + 100 * STEP),
        Bounds(since=FIRST + 60 * STEP, until=FIRST + 130 * STEP),
        Bounds(before=packets()[140].decision.decision_id, since=FIRST + 60 * STEP),
        Bounds(since=FIRST - dt.timedelta(days=9), until=FIRST),
    )
    for wanted, where, limit in itertools.product((audit_pb2.DecisionFilter(), *FILTERS.values()), bounds, (1, 4, 51)):
        found = store.newest(filters.conditions(wanted), limit, where)
        assert [one.row.position for one in found] == expected(wanted, where)[:limit], (wanted, where, limit)


def asked(store: Store, question: Callable[[], object]) -> list[tuple[str, Any]]:
    """The statements of a question to the database."""
    found: list[tuple[str, Any]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        found.append((statement, parameters))

    with store.connect() as connection:
        engine = connection.engine
    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        question()
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    return found


@pytest.mark.stack
class TestOnPostgreSQL:
    @pytest.fixture
    def audit_url(self, database_url: str) -> str:
        return database_url

    def plans(self, store: Store, question: Callable[[], object]) -> list[str]:
        """How PostgreSQL answers a question if reading a whole table is dear, as it is for a large one."""
        statements = asked(store, question)
        found = []
        with store.connect() as connection:
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            for statement, parameters in statements:
                if statement.startswith("SET"):
                    connection.exec_driver_sql(statement)
                else:
                    plan = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars()
                    found.append("\n".join(plan))
        return found

    def fill_yesterday(self, store: Store) -> None:
        """With so many decisions that PostgreSQL no longer reads all of them for whatever is asked."""
        columns = ", ".join(
            column.name for column in DECISIONS.columns if column.name not in {"decision_id", "strategy"}
        )
        with store.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(
                f"INSERT INTO decisions (decision_id, strategy, {columns})"
                f" SELECT decision_id || '-' || i, 'common', {columns} FROM decisions, generate_series(1, 500) AS i"
                f" WHERE decided_at >= '{MIDNIGHT - dt.timedelta(days=1)}' AND decided_at < '{MIDNIGHT}'"
            )

    @pytest.fixture
    def large(self, store: Store) -> Store:
        self.fill_yesterday(store)
        with store.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE decisions")
        return store

    @pytest.mark.parametrize("name", FILTERS)
    def test_what_is_rare_is_searched_for_by_an_index_whatever_the_filter(
        self, large: Store, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setattr(newest, "_WALKS", (1, 1))
        of_day = Bounds(since=MIDNIGHT - dt.timedelta(days=1), until=MIDNIGHT)
        plan = self.plans(large, lambda: large.newest(filters.conditions(FILTERS[name]), 51, of_day))[-1]
        day = f"decisions_{MIDNIGHT - dt.timedelta(days=1):%Y%m%d}"
        assert set(re.findall(r"Scan on (decisions_\d+) ", plan)) == {day}
        assert "Seq Scan on decisions_2" not in plan
        searched = re.findall(r"Bitmap Index Scan on (\S+) .*\n\s+Index Cond: (.*)", plan)
        conditions = " ".join(condition for index, condition in searched if index.startswith(day))
        for column in COLUMNS[name]:
            assert f"({column})::text = " in conditions
        assert "decision_id" not in conditions

    def test_what_was_summarized_is_not_read_for_a_value_that_is_not_there(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fill_yesterday(store)
        with store.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE decisions")
        monkeypatch.setattr(newest, "_WALKS", (1, 1))
        of_day = Bounds(since=MIDNIGHT - dt.timedelta(days=1), until=MIDNIGHT)

        def pages_read() -> int:
            statement, parameters = asked(
                store, lambda: store.newest(filters.conditions(FILTERS["nothing"]), 51, of_day)
            )[-1]
            with store.connect() as connection:
                newest.prefer_summaries(connection)
                plan = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, TIMING OFF) {statement}", parameters).scalars()
                return sum(int(pages) for pages in re.findall(r"Heap Blocks: lossy=(\d+)", "\n".join(plan)))

        before = pages_read()
        store.summarize()
        assert before > 1000
        assert pages_read() <= 32

    def test_a_walk_begins_and_ends_where_the_times_say(self, store: Store) -> None:
        of_hour = Bounds(since=MIDNIGHT - dt.timedelta(hours=12), until=MIDNIGHT - dt.timedelta(hours=11))
        plan = self.plans(store, lambda: store.newest(filters.conditions(FILTERS["action"]), 51, of_hour))[0]
        assert set(re.findall(r"on (decisions_\d+) ", plan)) == {f"decisions_{MIDNIGHT - dt.timedelta(days=1):%Y%m%d}"}
        (condition,) = re.findall(r"Index Cond: (.*decision_id.*)", plan)
        assert re.search(r"decision_id\)::text >= .*decision_id\)::text < ", condition)

    @pytest.mark.parametrize("since", [None, MIDNIGHT])
    def test_changes_and_refusals_are_read_by_their_times(
        self, store: Store, audit_url: str, since: dt.datetime | None
    ) -> None:
        def list_refusals() -> None:
            with store.connect() as connection:
                list(refusals(connection, since, 50))

        (plan,) = self.plans(store, list_refusals)
        assert "ix_access_refusals_refused_at" in plan
        request = admin_pb2.ListChangesRequest(page_size=50)
        if since is not None:
            request.since.FromDatetime(since)
        with closing(AuditQuery(audit_url, None)) as query:
            query_store = query._store
            assert query_store is not None
            plan = self.plans(query_store, lambda: query.changes(request))[-1]
        assert "ix_control_changes_changed_at" in plan


def test_in_sqlite_a_time_bounds_what_a_list_reads(tmp_path_factory: pytest.TempPathFactory) -> None:
    with closing(Store(f"sqlite:///{tmp_path_factory.mktemp('audit') / 'audit.db'}")) as store:
        store.migrate()
        bounds = Bounds(since=MIDNIGHT, until=MIDNIGHT + STEP)
        for wanted in FILTERS.values():
            statements = asked(store, lambda wanted=wanted: store.newest(filters.conditions(wanted), 51, bounds))  # type: ignore[misc]
            statement, parameters = next(one for one in statements if one[0].startswith("SELECT"))
            with store.connect() as connection:
                steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            (step,) = (step for *_, step in steps if re.match("(SCAN|SEARCH) decisions", step))
            assert re.search(r"\((decision_id|decided_at)>\? AND (decision_id|decided_at)<\?\)", step)
