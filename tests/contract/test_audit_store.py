"""What the audit store promises, on both databases it speaks."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import closing

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.batches import together

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.store.schema import DECISIONS
from server.audit.store.store import Store
from server.errors import JournalCorruptedError
from server.journal.entries import entry_of, packet_of
from server.journal.journal_file import GENESIS, Head, Row, follow, link
from server.journal.reply_status import AS_DECIDED, Reply

JOURNAL = "journal-1"
START = Head(0, GENESIS)


@pytest.fixture
def store(audit_url: str) -> Iterator[Store]:
    with closing(Store(audit_url)) as store:
        store.migrate()
        yield store


@pytest.fixture
def sql(audit_url: str) -> Iterator[sa.Connection]:
    """What an auditor sees."""
    engine = sa.create_engine(audit_url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def decision(decision_id: str, key: str = "") -> packet_pb2.JournalEntry:
    entry = packet_pb2.JournalEntry()
    order, answer = entry.decision.order, entry.decision.decision
    order.instrument, order.side, order.quantity, order.strategy = "BTCUSDT.BINANCE", pb.SIDE_SELL, 0.25, "maker"
    order.order_ref, order.idempotency_key = f"ref {decision_id}", key
    answer.decision_id, answer.action, answer.source = decision_id, pb.ACTION_NO_TRADE, pb.SOURCE_SECONDARY
    answer.reasons.append(pb.REASON_CODE_SCORE_BELOW_THRESHOLD)
    answer.degradations.extend([pb.DEGRADATION_PRIMARY_TIMEOUT, pb.DEGRADATION_CONTROL_STALE])
    answer.score, answer.threshold = 0.25, 0.95
    answer.model_name, answer.model_version = "champion", "0123456789abcdef"
    answer.feature_age.FromMicroseconds(15_321)
    answer.decided_at.FromNanoseconds(1_700_000_000_123_456_789)
    answer.budget.used_us, answer.budget.allowed_us = 2_345, 20_000
    entry.decision.instance_id, entry.decision.config_hash, entry.decision.durability = "server-1", "c0ffee", "fsync"
    return entry


def unconfirmed(
    decision_id: str,
    cause: str,
    action: pb.Action.ValueType = pb.ACTION_UNSPECIFIED,
    *reasons: pb.ReasonCode.ValueType,
) -> packet_pb2.JournalEntry:
    note = packet_pb2.ReplyUnconfirmed(decision_id=decision_id, cause=cause, heard_action=action, heard_reasons=reasons)
    return packet_pb2.JournalEntry(reply_unconfirmed=note)


def heard(decision_id: str) -> packet_pb2.JournalEntry:
    return packet_pb2.JournalEntry(reply_heard=packet_pb2.ReplyHeard(decision_id=decision_id))


def chained(after: Head, *entries: packet_pb2.JournalEntry | bytes) -> list[Row]:
    rows = []
    for one in entries:
        entry = one if isinstance(one, bytes) else one.SerializeToString()
        rows.append(Row(after.position + 1, entry, link(after.hash, entry)))
        after = follow(after, rows[-1])
    return rows


def end(rows: list[Row]) -> Head:
    return Head(rows[-1].position, rows[-1].hash)


def count(sql: sa.Connection, table: str) -> int:
    with sql.begin():
        found: int = sql.scalar(sa.text(f"SELECT count(*) FROM {table}")) or 0
    return found


def test_a_decision_becomes_a_row_of_typed_columns(store: Store, sql: sa.Connection) -> None:
    start = store.shipped(JOURNAL, START)
    assert store.write(JOURNAL, start, chained(start, decision("d1")))
    row = sql.execute(sa.text("SELECT * FROM decisions")).mappings().one()
    expected = {
        "decision_id": "d1",
        "order_ref": "ref d1",
        "instrument": "BTCUSDT.BINANCE",
        "side": "SELL",
        "quantity": 0.25,
        "limit_price": None,
        "strategy": "maker",
        "idempotency_key": None,
        "action": "NO_TRADE",
        "score": 0.25,
        "threshold": 0.95,
        "source": "SECONDARY",
        "model_name": "champion",
        "model_version": "0123456789abcdef",
        "feature_age_us": 15_321,
        "used_us": 2_345,
        "allowed_us": 20_000,
        "instance_id": "server-1",
        "config_hash": "c0ffee",
        "durability": "fsync",
        "reply_status": "replied",
        "heard_action": "NO_TRADE",
        "journal_id": JOURNAL,
        "journal_position": 1,
    }
    assert {name: row[name] for name in expected} == expected


def test_names_and_instants_are_queryable(store: Store, sql: sa.Connection) -> None:
    start = store.shipped(JOURNAL, START)
    store.write(JOURNAL, start, chained(start, decision("d1")))
    decisions = sa.table(
        "decisions",
        sa.column("decided_at", sa.DateTime(timezone=True)),
        sa.column("reasons", sa.JSON),
        sa.column("degradations", sa.JSON),
    )
    row = sql.execute(sa.select(decisions)).one()
    assert row.reasons == ["SCORE_BELOW_THRESHOLD"]
    assert row.degradations == ["PRIMARY_TIMEOUT", "CONTROL_STALE"]
    assert row.decided_at.replace(tzinfo=row.decided_at.tzinfo or dt.UTC) == dt.datetime(
        2023, 11, 14, 22, 13, 20, 123456, tzinfo=dt.UTC
    )


def test_a_shipped_decision_is_found_as_it_was_written(store: Store) -> None:
    start = store.shipped(JOURNAL, START)
    rows = chained(start, decision("d1"), decision("d2"))
    store.write(JOURNAL, start, rows)
    found = store.find("d2")
    assert found is not None
    assert (found.row, found.journal_id, found.reply) == (rows[1], JOURNAL, AS_DECIDED)
    assert store.find("d3") is None


def test_decisions_of_one_entry_are_the_rows_that_they_would_be_by_themselves(store: Store, sql: sa.Connection) -> None:
    singles = [decision("d1", key="key-1"), decision("d2"), decision("d3")]
    singles[1].decision.order.limit_price = 61_000.5
    singles[1].decision.order.strategy = "twap\0"
    singles[2].decision.decision.ClearField("score")
    singles[2].decision.decision.ClearField("threshold")
    singles[2].decision.decision.ClearField("feature_age")
    packets = [one.decision for one in singles]
    start = store.shipped(JOURNAL, START)
    rows = chained(start, together(packets[:2]), unconfirmed("d2", "deadline"), together(packets[2:]))
    assert store.write(JOURNAL, start, rows)

    def read() -> list[dict[str, object]]:
        with sql.begin():
            found = sql.execute(sa.text("SELECT * FROM decisions ORDER BY decision_id")).mappings().all()
        return [{name: one[name] for name in one if name not in {"decided_at", "shipped_at"}} for one in found]

    batched = read()
    assert [(one.pop("journal_position"), one.pop("journal_row")) for one in batched] == [(1, 0), (1, 1), (3, 0)]
    assert [one["reply_status"] for one in batched] == ["replied", "reply_unconfirmed:deadline", "replied"]
    with sql.begin():
        for table in ("decisions", "journal_entries", "shipments"):
            sql.execute(sa.text(f"DELETE FROM {table}"))
    start = store.shipped(JOURNAL, START)
    rows = chained(start, *singles, unconfirmed("d2", "deadline"))
    assert store.write(JOURNAL, start, rows)
    alone = read()
    assert [(one.pop("journal_position"), one.pop("journal_row")) for one in alone] == [(1, 0), (2, 0), (3, 0)]
    assert batched == alone


def test_each_decision_of_an_entry_is_found_with_the_whole_entry(store: Store) -> None:
    packets = [decision(f"d{number}").decision for number in range(5)]
    start = store.shipped(JOURNAL, START)
    rows = chained(start, together(packets[:3]), together(packets[3:]))
    store.write(JOURNAL, start, rows)
    newest = store.newest(lambda _: (), 4)
    assert [(one.row, one.number) for one in newest] == [(rows[1], 1), (rows[1], 0), (rows[0], 2), (rows[0], 1)]
    found = store.find("d1")
    assert found is not None
    assert (found.row, found.number) == (rows[0], 1)
    assert packet_of(entry_of(found.row.entry), found.number).order == packets[1].order


def test_an_entry_whose_columns_do_not_fit_is_evidence_and_nothing_else(store: Store, sql: sa.Connection) -> None:
    broken = together([decision("d1").decision])
    broken.decisions.quantity.append(1.0)
    unnamed = together([decision("d2").decision])
    unnamed.decisions.answers[0].decision.source = 999  # type: ignore[assignment]
    start = store.shipped(JOURNAL, START)
    assert store.write(JOURNAL, start, chained(start, broken, unnamed, decision("d3")))
    assert count(sql, "journal_entries") == 3
    with sql.begin():
        assert sql.scalars(sa.text("SELECT decision_id FROM decisions")).all() == ["d3"]
    store.verify(JOURNAL)


def test_rows_are_stored_once_however_often_they_are_shipped(store: Store, sql: sa.Connection) -> None:
    start = store.shipped(JOURNAL, START)
    rows = chained(start, decision("d1"), decision("d2"))
    assert store.write(JOURNAL, start, rows)
    assert not store.write(JOURNAL, start, rows)
    assert store.shipped(JOURNAL, START) == end(rows)
    assert count(sql, "decisions") == count(sql, "journal_entries") == 2


def test_a_decision_that_two_journals_hold_is_one_row(store: Store, sql: sa.Connection) -> None:
    for journal_id in ("a", "b"):
        start = store.shipped(journal_id, START)
        assert store.write(journal_id, start, chained(start, decision("d1")))
    assert count(sql, "decisions") == 1
    assert count(sql, "journal_entries") == 2
    assert set(store.journals()) == {"a", "b"}


def test_what_another_journal_brought_keeps_nothing_else_of_a_shipment_out(store: Store, sql: sa.Connection) -> None:
    def outcome(decision_id: str, quantity: float) -> packet_pb2.JournalEntry:
        said = packet_pb2.Outcome(decision_id=decision_id, reporter="ems", filled_quantity=quantity)
        return packet_pb2.JournalEntry(outcome=said)

    one, other = store.shipped("a", START), store.shipped("b", START)
    assert store.write("a", one, chained(one, decision("d1"), outcome("d1", 1.0), pairs("d1")))
    rows = chained(other, decision("d0"), decision("d1"), outcome("d1", 2.0), outcome("d0", 3.0), pairs("d1", "d0"))
    assert store.write("b", other, rows)
    assert store.verify("b") == (1, 5)
    with sql.begin():
        journals = sql.execute(sa.text("SELECT decision_id, journal_id FROM decisions ORDER BY 1")).all()
        outcomes = sql.execute(sa.text("SELECT decision_id, filled_quantity FROM outcomes ORDER BY 1")).all()
    assert [tuple(row) for row in journals] == [("d0", "b"), ("d1", "a")]
    assert [tuple(row) for row in outcomes] == [("d0", 3.0), ("d1", 1.0)]
    assert count(sql, "score_pairs") == 2


def test_an_unconfirmed_reply_changes_the_status_of_its_decision_only(store: Store) -> None:
    start = store.shipped(JOURNAL, START)
    rows = chained(start, decision("d1"), decision("d2"), unconfirmed("d1", "cancelled"))
    store.write(JOURNAL, start, rows)
    later = chained(end(rows), unconfirmed("d2", "deadline"), unconfirmed("nobody", "deadline"))
    store.write(JOURNAL, end(rows), later)
    statuses = {one: found.reply.status for one in ("d1", "d2") if (found := store.find(one))}
    assert statuses == {"d1": "reply_unconfirmed:cancelled", "d2": "reply_unconfirmed:deadline"}


def test_what_each_caller_heard_stands_beside_what_was_decided(store: Store, sql: sa.Connection) -> None:
    start = store.shipped(JOURNAL, START)
    decided = pb.REASON_CODE_SCORE_BELOW_THRESHOLD
    late, halted = pb.REASON_CODE_AUDIT_LATE, pb.REASON_CODE_TRADING_HALTED
    notes = (
        unconfirmed("late", "audit_late", pb.ACTION_ABSTAIN, decided, late),
        unconfirmed("withdrawn", "withdrawn", pb.ACTION_NO_TRADE, decided, halted),
        unconfirmed("cancelled", "cancelled"),
        unconfirmed("killed", "killed"),
    )
    names = ("replied", "late", "withdrawn", "cancelled", "killed")
    rows = chained(start, *map(decision, names))
    store.write(JOURNAL, start, rows)
    store.write(JOURNAL, end(rows), chained(end(rows), *notes))
    columns = DECISIONS.c
    query = sa.select(columns.decision_id, columns.action, columns.heard_action, columns.heard_reasons)
    with sql.begin():
        found = {row[0]: tuple(row[1:]) for row in sql.execute(query)}
    below = "SCORE_BELOW_THRESHOLD"
    assert found == {
        "replied": ("NO_TRADE", "NO_TRADE", [below]),
        "late": ("NO_TRADE", "ABSTAIN", [below, "AUDIT_LATE"]),
        "withdrawn": ("NO_TRADE", "NO_TRADE", [below, "TRADING_HALTED"]),
        "cancelled": ("NO_TRADE", "NOTHING", []),
        "killed": ("NO_TRADE", "UNKNOWN", []),
    }
    replies = {one: stored.reply for one in names if (stored := store.find(one))}
    assert replies == {
        "replied": AS_DECIDED,
        "late": Reply("reply_unconfirmed:audit_late", audit_pb2.HEARD_ACTION_ABSTAIN, (decided, late)),
        "withdrawn": Reply("reply_unconfirmed:withdrawn", audit_pb2.HEARD_ACTION_NO_TRADE, (decided, halted)),
        "cancelled": Reply("reply_unconfirmed:cancelled", audit_pb2.HEARD_ACTION_NOTHING),
        "killed": Reply("reply_unconfirmed:killed", audit_pb2.HEARD_ACTION_UNKNOWN),
    }
    assert {one.journal_id: one.reply for one in store.find_all(["late", "nobody"])} == {JOURNAL: replies["late"]}


@pytest.mark.parametrize("order", ["one shipment", "note first", "repeat first", "repeat before the decision"])
def test_what_a_repeat_heard_holds_whichever_journal_is_shipped_first(
    store: Store, sql: sa.Connection, order: str
) -> None:
    one, other = store.shipped("journal-1", START), store.shipped("journal-2", START)
    decided = chained(one, *(decision(f"d{i}", key=f"key {i}") for i in range(1, 7)))
    noted = chained(end(decided), *(unconfirmed(f"d{i}", "cancelled") for i in (1, 2, 4, 5)))
    # Whether a repeat heard d5 and d6 is not known; the first call heard d6.
    # Of two repeats of d4 the first one heard it; what the other one heard was safer, and holds from then on.
    safer = (pb.ACTION_ABSTAIN, pb.REASON_CODE_TRADING_HALTED)
    withdrawals = (unconfirmed(f"d{i}", "withdrawn", *safer) for i in (3, 4))
    perhaps = (unconfirmed(f"d{i}", "repeated") for i in (1, 5, 6))
    repeats = (next(perhaps), heard("d1"), *perhaps, next(withdrawals), heard("d4"), next(withdrawals), heard("d4"))
    repeat = chained(other, *repeats)
    match order:
        case "one shipment":
            store.write("journal-1", one, [*decided, *noted, *chained(end(noted), *repeats)])
        case "note first":
            store.write("journal-1", one, [*decided, *noted])
            store.write("journal-2", other, repeat)
        case "repeat first":
            store.write("journal-1", one, decided)
            store.write("journal-2", other, repeat)
            store.write("journal-1", end(decided), noted)
        case _:
            store.write("journal-2", other, repeat)
            store.write("journal-1", one, [*decided, *noted])
    with sql.begin():
        rows = sql.execute(sa.text("SELECT decision_id, reply_status, heard_action FROM decisions")).all()
    status = "reply_unconfirmed:withdrawn"
    assert {decision_id: tuple(others) for decision_id, *others in rows} == {
        "d1": ("replied", "NO_TRADE"),
        "d2": ("reply_unconfirmed:cancelled", "NOTHING"),
        "d3": (status, "ABSTAIN"),
        "d4": (status, "ABSTAIN"),
        "d5": ("reply_unconfirmed:repeated", "UNKNOWN"),
        "d6": ("replied", "NO_TRADE"),
    }
    withdrawn = Reply(status, audit_pb2.HEARD_ACTION_ABSTAIN, safer[1:])
    unknown = Reply("reply_unconfirmed:repeated", audit_pb2.HEARD_ACTION_UNKNOWN)
    known = {"d1": AS_DECIDED, "d3": withdrawn, "d4": withdrawn, "d5": unknown}
    assert store.repeats([f"d{i}" for i in range(1, 7)]) == known | {"d6": unknown}
    found = {f"d{i}": stored.reply for i in range(1, 7) if (stored := store.find(f"d{i}"))}
    cancelled = Reply("reply_unconfirmed:cancelled", audit_pb2.HEARD_ACTION_NOTHING)
    assert found == known | {"d2": cancelled, "d6": AS_DECIDED}


def test_a_control_change_becomes_a_row(store: Store, sql: sa.Connection) -> None:
    values = {
        "change_id": "c1",
        "subject": "flag/shadow",
        "previous": "on",
        "value": "off",
        "author": "ann",
        "reason": "test",
        "instance_id": "server-1",
    }
    change = packet_pb2.JournalEntry()
    for name, value in values.items():
        setattr(change.control_change, name, value)
    change.control_change.changed_at_ns = 1_700_000_000_000_000_000
    start = store.shipped(JOURNAL, START)
    store.write(JOURNAL, start, chained(start, change))
    row = sql.execute(sa.text("SELECT * FROM control_changes")).mappings().one()
    assert {name: row[name] for name in values} == values
    assert (row["journal_id"], row["journal_position"]) == (JOURNAL, 1)


def test_rows_of_another_format_are_kept_as_evidence(store: Store, sql: sa.Connection) -> None:
    strange = decision("strange")
    strange.decision.decision.action = 77  # type: ignore[assignment]  # what a newer server might send
    start = store.shipped(JOURNAL, START)
    rows = chained(start, b"\xff not protobuf", b"", strange, decision("d1"))
    assert store.write(JOURNAL, start, rows)
    assert count(sql, "journal_entries") == 4
    assert count(sql, "decisions") == 1
    assert store.verify(JOURNAL) == (1, 4)


# Each example adds rows to the same store: what an order may contain must never stop the shipping of those behind it.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=64),
    number=st.floats(),
    used_us=st.integers(0, 2**32 - 1),
    decided_at_ns=st.integers(0, 2**63 - 1),  # as a journal counts them: until the year 2262
)
def test_whatever_a_packet_holds_can_be_stored(
    store: Store, text: str, number: float, used_us: int, decided_at_ns: int
) -> None:
    shipped = store.shipped(JOURNAL, START)
    entry = decision(f"{shipped.position}")
    order, answer = entry.decision.order, entry.decision.decision
    order.order_ref = order.strategy = order.idempotency_key = order.instrument = text
    order.quantity = order.limit_price = answer.score = number
    answer.budget.used_us = used_us
    answer.decided_at.FromNanoseconds(decided_at_ns)
    rows = chained(shipped, entry)
    assert store.write(JOURNAL, shipped, rows)
    found = store.find(f"{shipped.position}")
    assert found is not None
    assert found.row == rows[0]


def test_every_row_of_a_shipment_has_the_values_of_its_own_packet(store: Store, sql: sa.Connection) -> None:
    """Rows differ in what they have: a price, a score, an age, a key, names, texts of many lengths."""
    entries = []
    for i in range(200):
        entry = decision(f"d{i:03d}", key=f"key {i}" if i % 5 == 0 else "")
        order, answer = entry.decision.order, entry.decision.decision
        order.order_ref, order.instrument, order.strategy = "r" * (i % 70), f"I{i % 7}", f"é{i % 3}"
        order.quantity = float(i)
        if i % 2:
            order.limit_price = 0.0 if i % 4 == 1 else i / 8
        if i % 3 == 0:
            answer.ClearField("score")
            answer.ClearField("threshold")
        if i % 4 == 0:
            answer.ClearField("feature_age")
        else:
            answer.feature_age.FromMicroseconds(i - 100)
        if i % 6 == 0:
            del answer.degradations[:]
        answer.decided_at.FromNanoseconds(1_700_000_000_000_000_000 + i * 1_001)
        answer.budget.used_us = i
        entries.append(entry)
    start = store.shipped(JOURNAL, START)
    assert store.write(JOURNAL, start, chained(start, *entries))
    with sql.begin():
        rows = sql.execute(sa.select(DECISIONS).order_by(DECISIONS.c.decision_id)).mappings().all()
    assert len(rows) == len(entries)
    for i, (row, entry) in enumerate(zip(rows, entries, strict=True)):
        order, answer = entry.decision.order, entry.decision.decision
        at = dt.datetime(2023, 11, 14, 22, 13, 20, tzinfo=dt.UTC) + dt.timedelta(microseconds=i * 1_001 // 1_000)
        expected = {
            "decision_id": answer.decision_id,
            "decided_at": at,
            "order_ref": order.order_ref,
            "instrument": order.instrument,
            "quantity": order.quantity,
            "limit_price": order.limit_price if order.HasField("limit_price") else None,
            "strategy": order.strategy,
            "idempotency_key": order.idempotency_key or None,
            "score": answer.score if answer.HasField("score") else None,
            "threshold": answer.threshold if answer.HasField("threshold") else None,
            "reasons": ["SCORE_BELOW_THRESHOLD"],
            "degradations": [] if i % 6 == 0 else ["PRIMARY_TIMEOUT", "CONTROL_STALE"],
            "feature_age_us": i - 100 if answer.HasField("feature_age") else None,
            "used_us": i,
            "journal_position": i + 1,
        }
        found = {name: row[name] for name in expected}
        found["decided_at"] = found["decided_at"].replace(tzinfo=found["decided_at"].tzinfo or dt.UTC)
        assert found == expected


def test_values_that_no_column_can_hold_make_evidence_and_nothing_else(store: Store, sql: sa.Connection) -> None:
    late, old, nan = decision("late"), decision("old"), pairs("d1")
    late.decision.decision.decided_at.seconds = 2**62
    old.decision.decision.feature_age.seconds = 2**62
    nan.score_pairs.pairs[0].champion_score = float("nan")
    start = store.shipped(JOURNAL, START)
    assert store.write(JOURNAL, start, chained(start, late, old, nan, decision("d1")))
    assert [count(sql, table) for table in ("journal_entries", "decisions", "score_pairs")] == [4, 1, 0]


@pytest.mark.parametrize(
    ("tamper", "position"),
    [
        ("UPDATE journal_entries SET entry = hash WHERE position = 3", 3),
        ("DELETE FROM journal_entries WHERE position = 2", 2),
        ("UPDATE journal_entries SET entry = hash WHERE position = 1", 1),
        ("DELETE FROM journal_entries WHERE position = 5", 5),
    ],
)
def test_verification_names_the_shipped_row_that_was_tampered_with(
    store: Store, sql: sa.Connection, tamper: str, position: int
) -> None:
    start = store.shipped(JOURNAL, START)
    store.write(JOURNAL, start, chained(start, *(decision(str(i)) for i in range(5))))
    assert store.verify(JOURNAL) == (1, 5)
    with sql.begin():
        sql.execute(sa.text(tamper))
    with pytest.raises(JournalCorruptedError) as caught:
        store.verify(JOURNAL)
    assert caught.value.position == position


def test_a_journal_trimmed_before_it_was_first_shipped_starts_at_its_anchor(store: Store) -> None:
    anchor = Head(100, bytes(range(32)))
    assert store.shipped(JOURNAL, anchor) == anchor
    rows = chained(anchor, decision("d1"), decision("d2"))
    assert store.write(JOURNAL, anchor, rows)
    assert store.verify(JOURNAL) == (101, 102)


@pytest.mark.parametrize("url", ["mysql://user:secret@host/db", "no url at all with a secret"])
def test_a_url_that_is_not_for_us_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"SQLite and PostgreSQL|malformed") as caught:
        Store(url)
    assert "secret" not in str(caught.value)


def pairs(*decision_ids: str) -> packet_pb2.JournalEntry:
    entry = packet_pb2.JournalEntry()
    for decision_id in decision_ids:
        entry.score_pairs.pairs.add(
            decision_id=decision_id,
            champion_version="aa" * 8,
            challenger_version="bb" * 8,
            champion_score=0.25,
            challenger_score=0.75,
            champion_trades=False,
            challenger_trades=True,
            challenger_decided=True,
            challenger_us=1_500,
            recorded_at_ns=1_700_000_000_123_456_789,
        )
    return entry


def test_pairs_of_scores_join_with_decisions_and_what_became_of_them(store: Store, sql: sa.Connection) -> None:
    start = store.shipped(JOURNAL, START)
    outcome = packet_pb2.JournalEntry(
        outcome=packet_pb2.Outcome(decision_id="d1", reporter="ems", filled_quantity=1.0, markout_bps=-3.5)
    )
    rows = chained(start, decision("d1"), decision("d2"), pairs("d1", "d2"), pairs("d1"), outcome)
    assert store.write(JOURNAL, start, rows)
    query = (
        "SELECT p.decision_id, p.champion_score, p.challenger_score, p.challenger_decided, p.challenger_us, d.action,"
        " o.markout_bps FROM score_pairs p JOIN decisions d USING (decision_id)"
        " LEFT JOIN outcomes o USING (decision_id) ORDER BY p.decision_id"
    )
    found = [tuple(row) for row in sql.execute(sa.text(query))]
    assert found == [
        ("d1", 0.25, 0.75, True, 1_500, "NO_TRADE", -3.5),
        ("d2", 0.25, 0.75, True, 1_500, "NO_TRADE", None),
    ]


def of_an_ensemble(decision_id: str, *scores: float) -> packet_pb2.JournalEntry:
    entry = decision(decision_id)
    for place, score in enumerate(scores):
        entry.decision.parts.add(model_version=f"{place}" * 16, weight=place + 0.5, score=score)
    return entry


@pytest.mark.parametrize("in_one_entry", [False, True])
def test_what_the_parts_of_an_ensemble_said_joins_with_decisions(
    store: Store, sql: sa.Connection, in_one_entry: bool
) -> None:
    start = store.shipped(JOURNAL, START)
    entries = [of_an_ensemble("d1", 0.25, 0.5), decision("d2"), of_an_ensemble("d3", 0.75, 1.0)]
    if in_one_entry:
        entries = [together([entry.decision for entry in entries])]
    assert store.write(JOURNAL, start, chained(start, *entries))
    query = (
        "SELECT d.decision_id, p.part, p.model_version, p.weight, p.score, p.decided_at = d.decided_at"
        " FROM decisions d JOIN part_scores p USING (decision_id) ORDER BY 1, 2"
    )
    assert [tuple(row) for row in sql.execute(sa.text(query))] == [
        ("d1", 0, "0" * 16, 0.5, 0.25, True),
        ("d1", 1, "1" * 16, 1.5, 0.5, True),
        ("d3", 0, "0" * 16, 0.5, 0.75, True),
        ("d3", 1, "1" * 16, 1.5, 1.0, True),
    ]
    store.remove_days(30)  # of 2023
    sql.rollback()
    assert count(sql, "part_scores") == 0


def test_the_turns_of_a_canary_are_kept_with_their_evidence(store: Store, sql: sa.Connection) -> None:
    start = store.shipped(JOURNAL, START)
    event = packet_pb2.CanaryEvent(
        event_id="e1",
        canary_id="c1",
        model_version="bb" * 8,
        champion_version="aa" * 8,
        event="rolled_back",
        previous_weight=0.25,
        verdict="worse",
        reason="rank 0.9 against 0.1",
        checks=[packet_pb2.CanaryCheckRecord(name="rank", canary=0.9, champion=0.1, samples=40, verdict="worse")],
        orders=17,
        author="server",
        at_ns=1_700_000_000_123_456_789,
        instance_id="server-1",
    )
    rows = chained(start, packet_pb2.JournalEntry(canary_event=event))
    assert store.write(JOURNAL, start, rows)
    row = sql.execute(sa.text("SELECT * FROM canary_events")).mappings().one()
    expected = {"event_id": "e1", "event": "rolled_back", "previous_weight": 0.25, "weight": 0.0, "orders": 17}
    assert {name: row[name] for name in expected} == expected
    assert packet_pb2.CanaryEvent.FromString(bytes(row["entry"])) == event


def test_pairs_go_with_the_days_of_their_decisions_and_turns_stay(store: Store, sql: sa.Connection) -> None:
    start = store.shipped(JOURNAL, START)
    turn = packet_pb2.JournalEntry(canary_event=packet_pb2.CanaryEvent(event_id="e1", at_ns=1_700_000_000 * 10**9))
    store.write(JOURNAL, start, chained(start, pairs("d1"), turn))
    store.remove_days(30)  # of 2023
    assert (count(sql, "score_pairs"), count(sql, "canary_events")) == (0, 1)
