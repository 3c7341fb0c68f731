"""A sample of the audit is spread evenly over its time, whether rows are in the database, the journal, or both.

Of a large journal a list reads what it needs.
"""

from __future__ import annotations

import datetime as dt
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import together

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.query import AuditQuery
from server.audit.store.store import Store
from server.decision.ids import id_bound
from server.errors import InvalidRequestError
from server.journal.journal_file import JournalFile, JournalReader, Row

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


def test_who_samples_may_rest_between_the_parts(query: AuditQuery) -> None:
    rests = list[int]()
    with closing(query):
        found = query.spread(wanted(), 240, rest=lambda: rests.append(1))
        assert found == query.spread(wanted(), 240)
        assert len(rests) == (1 if query._store is None else 120)


def test_a_time_without_a_beginning_is_refused(query: AuditQuery) -> None:
    with closing(query), pytest.raises(InvalidRequestError, match="must have a since before its until"):
        query.spread(audit_pb2.DecisionFilter(), 10)


def of_strategy(strategy: str, decision_id: str, at: dt.datetime) -> packet_pb2.DecisionPacket:
    made = packet_pb2.DecisionPacket()
    made.order.strategy, made.decision.decision_id = strategy, decision_id
    made.decision.decided_at.FromDatetime(at)
    return made


@settings(max_examples=60, deadline=None)
@given(
    late=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    sizes=st.lists(st.integers(1, 5), min_size=30, max_size=30),
    strategy=st.sampled_from(["", "twap", "rare"]),
    since=st.none() | st.integers(-5, 200),
    until=st.none() | st.integers(-5, 200),
    size=st.integers(1, 12),
)
def test_pages_of_a_journal_have_every_decision_once_the_newest_first(
    late: list[int], sizes: list[int], strategy: str, since: int | None, until: int | None, size: int
) -> None:
    """Though rows are not quite in the order of their ids: each entry is up to 8 s late."""
    made: list[packet_pb2.DecisionPacket] = []
    entries = []
    for number, seconds in enumerate(late):
        at = BEGIN + dt.timedelta(seconds=6 * number - 2 * seconds)
        ids = [f"{id_bound(at)}-7000-8000-{number:08}{row:04}" for row in range(sizes[number])]
        batch = [of_strategy("rare" if number % 7 == 3 else "twap", one, at) for one in ids]
        made += batch
        entries.append(together(batch).SerializeToString())
    bounds = [None if at is None else BEGIN + dt.timedelta(seconds=at) for at in (since, until)]
    expected = [
        one.decision.decision_id
        for one in made
        if strategy in {"", one.order.strategy}
        and (bounds[0] is None or one.decision.decided_at.ToDatetime(dt.UTC) >= bounds[0])
        and (bounds[1] is None or one.decision.decided_at.ToDatetime(dt.UTC) < bounds[1])
    ]
    asked = audit_pb2.DecisionFilter(strategies=[strategy] if strategy else [])
    for bound, field in zip(bounds, (asked.since, asked.until), strict=True):
        if bound is not None:
            field.FromDatetime(bound)
    listed: list[str] = []
    token = ""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "journal.db"
        with closing(JournalFile(path, sync_commits=False)) as journal:
            journal.append(entries)
        with closing(AuditQuery(None, path)) as query:
            while True:
                page = query.page(asked, size, token)
                listed += [one.packet.decision.decision_id for one in page.decisions]
                token = page.next_page_token
                if not token:
                    break
    assert listed == sorted(expected, reverse=True)


def test_a_list_reads_of_a_large_journal_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.db"
    times = [BEGIN + dt.timedelta(seconds=number) for number in range(20_000)]
    with closing(JournalFile(path, sync_commits=False)) as journal:
        for first in range(0, len(times), 1_000):
            some = list(enumerate(times))[first : first + 1_000]
            journal.append(
                [packet_pb2.JournalEntry(decision=packet(*numbered)).SerializeToString() for numbered in some]
            )
    read = 0

    def counting(journal: JournalReader, position: int, limit: int) -> list[Row]:
        nonlocal read
        rows = rows_after(journal, position, limit)
        read += len(rows)
        return rows

    rows_after = JournalReader.rows_after
    monkeypatch.setattr(JournalReader, "rows_after", counting)
    middle = audit_pb2.DecisionFilter(instruments=["BTCUSDT.SIM"])
    middle.since.FromDatetime(times[10_000])
    middle.until.FromDatetime(times[10_100])
    with closing(AuditQuery(None, path)) as query:
        newest = query.page(audit_pb2.DecisionFilter(), 50, "")
        assert (len(newest.decisions), read) == (50, 100)
        read = 0
        next_page = query.page(audit_pb2.DecisionFilter(), 50, newest.next_page_token)
        assert (
            next_page.decisions[0].packet.decision.decision_id < newest.decisions[-1].packet.decision.decision_id
        ) is True
        assert (len(next_page.decisions), read) == (50, 100)
        read = 0
        assert len(query.page(middle, 100, "").decisions) == 50
        assert read < 400
        read = 0
        assert len(query.spread(middle, 120)) == 50
        assert read < 400
