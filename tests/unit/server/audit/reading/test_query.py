"""A sample of the audit is spread evenly over its time, whether rows are in the database, the journal, or both."""

from __future__ import annotations

import datetime as dt
from contextlib import closing
from pathlib import Path

import pytest

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.query import AuditQuery
from server.audit.store.store import Store
from server.decision.ids import id_bound
from server.errors import InvalidRequestError
from server.journal.journal_file import JournalFile, JournalReader

BEGIN = dt.datetime(2026, 11, 23, 7, 0, tzinfo=dt.UTC)
END = BEGIN + dt.timedelta(minutes=15)
SLOW, FAST = 150, 600
"""Decisions: one every 6 s, then a burst of one every 5 ms at the end."""


def packet(number: int, at: dt.datetime) -> packet_pb2.DecisionPacket:
    made = packet_pb2.DecisionPacket()
    made.order.instrument = "BTCUSDT.SIM" if number % 2 else "ETHUSDT.SIM"
    made.order.side = pb.SIDE_BUY
    made.decision.decision_id = f"{id_bound(at)}-7000-8000-{number:012}"
    made.decision.decided_at.FromDatetime(at)
    made.decision.action, made.decision.source = pb.ACTION_TRADE, pb.SOURCE_PRIMARY
    return made


def decisions() -> list[packet_pb2.DecisionPacket]:
    slow = [BEGIN + dt.timedelta(seconds=6 * number) for number in range(SLOW)]
    fast = [END - dt.timedelta(milliseconds=5 * number) for number in range(FAST, 0, -1)]
    before = BEGIN - dt.timedelta(seconds=1)
    return [packet(number, at) for number, at in enumerate(sorted([before, *slow, *fast]))]


@pytest.fixture(params=["database", "journal", "both"])
def query(request: pytest.FixtureRequest, tmp_path: Path) -> AuditQuery:
    path, url = tmp_path / "journal.db", f"sqlite:///{tmp_path / 'audit.db'}"
    entries = [packet_pb2.JournalEntry(decision=one).SerializeToString() for one in decisions()]
    shipped = {"database": len(entries), "journal": 0, "both": 100}[request.param]
    with (
        closing(JournalFile(path, sync_commits=False)) as journal,
        closing(Store(url)) as store,
        closing(JournalReader(path)) as reader,
    ):
        store.migrate()
        if shipped:
            journal.append(entries[:shipped])
            store.write(reader.journal_id, store.shipped(reader.journal_id, reader.anchor()), reader.rows_after(0, -1))
        if shipped < len(entries):
            journal.append(entries[shipped:])
    return AuditQuery(None if request.param == "journal" else url, path)


def wanted(**filters: object) -> audit_pb2.DecisionFilter:
    asked = audit_pb2.DecisionFilter(**filters)  # type: ignore[arg-type]
    asked.since.FromDatetime(BEGIN)
    asked.until.FromDatetime(END)
    return asked


def test_a_burst_at_the_end_does_not_fill_a_sample_of_the_whole_time(query: AuditQuery) -> None:
    with closing(query):
        found = query.spread(wanted(), 240)
        newest = [one.packet for one in query.newest(wanted(), 240)]
    ids = [one.decision.decision_id for one in found]
    assert ids == sorted(ids, reverse=True)
    times = [one.decision.decided_at.ToDatetime(dt.UTC) for one in found]
    early = [at for at in times if at < END - dt.timedelta(seconds=10)]
    assert len(early) >= SLOW - 2, "each of the quarter of an hour is there"
    assert len(found) - len(early) <= 6, "two of each part of 7.5 s"
    assert min(times) == BEGIN, "and none from before"
    assert min(one.decision.decided_at.ToDatetime(dt.UTC) for one in newest) > END - dt.timedelta(seconds=10)


def test_a_sample_keeps_to_its_filter_and_its_size(query: AuditQuery) -> None:
    with closing(query):
        found = query.spread(wanted(instruments=["BTCUSDT.SIM"]), 50)
    assert len(found) == 50
    assert found[-1].decision.decided_at.ToDatetime(dt.UTC) < BEGIN + dt.timedelta(seconds=20)
    assert {one.order.instrument for one in found} == {"BTCUSDT.SIM"}


def test_a_time_without_a_beginning_is_refused(query: AuditQuery) -> None:
    with closing(query), pytest.raises(InvalidRequestError, match="must have a since before its until"):
        query.spread(audit_pb2.DecisionFilter(), 10)
