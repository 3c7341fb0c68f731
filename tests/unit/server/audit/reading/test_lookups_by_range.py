"""A look-up that leaves out ranges of a journal finds what one finds that reads all of it, and reads less."""

from __future__ import annotations

import datetime as dt
import multiprocessing
import random
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
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
from server.journal.journal_file import JournalFile, JournalReader, Row
from server.journal.reply_status import CAUSES, heard, unconfirmed

BEGIN = dt.datetime(2026, 11, 23, 7, 0, tzinfo=dt.UTC)
STRATEGIES, INSTRUMENTS, MODELS = ("twap", "rare", ""), ("BTCUSDT.SIM", "ETHUSDT.SIM"), ("champion", "v1", "v2")


@dataclass(frozen=True, slots=True)
class Made:
    """A decision of a generated journal."""

    strategy: str
    instrument: str
    action: pb.Action.ValueType
    source: pb.Source.ValueType
    version: str
    key: str


@dataclass(frozen=True, slots=True)
class Said:
    """A note about one of the decisions before it."""

    of: int
    cause: str
    """`heard`: that it was heard after all."""
    elsewhere: bool
    """By another process, whose journal the database has."""


DECISIONS = st.builds(
    Made,
    strategy=st.sampled_from(STRATEGIES),
    instrument=st.sampled_from(INSTRUMENTS),
    action=st.sampled_from([pb.ACTION_TRADE, pb.ACTION_TRADE, pb.ACTION_NO_TRADE, pb.ACTION_ABSTAIN]),
    source=st.sampled_from([pb.SOURCE_PRIMARY, pb.SOURCE_RULES]),
    version=st.sampled_from(MODELS[1:]),
    key=st.sampled_from(["", "", "key"]),
)
NOTES = st.builds(Said, of=st.integers(0, 500), cause=st.sampled_from([*CAUSES, "heard"]), elsewhere=st.booleans())
COMMITS = st.lists(
    st.lists(st.lists(DECISIONS, min_size=1, max_size=3) | NOTES, min_size=1, max_size=4), min_size=1, max_size=15
)
FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "strategies": st.lists(st.sampled_from([*STRATEGIES, "unheard of"]), max_size=2),
        "instruments": st.lists(st.sampled_from([*INSTRUMENTS, "unheard of"]), max_size=1),
        "decided_actions": st.lists(st.sampled_from(pb.Action.values()), max_size=2),
        "heard_actions": st.lists(st.sampled_from(audit_pb2.HeardAction.values()), max_size=2),
        "sources": st.lists(st.sampled_from(pb.Source.values()), max_size=1),
        "model": st.sampled_from([*MODELS, "unheard of"]),
    },
)


def made(one: Made, number: int, second: int) -> packet_pb2.DecisionPacket:
    at = BEGIN + dt.timedelta(seconds=second)
    packet = packet_pb2.DecisionPacket()
    packet.order.strategy, packet.order.instrument = one.strategy, one.instrument
    packet.order.idempotency_key = one.key and f"{one.key}-{number}"
    packet.decision.decision_id = f"{id_bound(at)}-7000-8000-{number:012}"
    packet.decision.decided_at.FromDatetime(at)
    packet.decision.action, packet.decision.source = one.action, one.source
    packet.decision.model_name, packet.decision.model_version = MODELS[0], one.version
    return packet


def note(one: Said, decision_id: str) -> bytes:
    if one.cause == "heard":
        return heard(decision_id)
    told = one.cause in {"audit_late", "not_durable", "withdrawn"}
    (cause,) = [cause for cause in CAUSES if cause == one.cause]
    return unconfirmed(decision_id, cause, pb.ACTION_ABSTAIN if told else pb.ACTION_UNSPECIFIED)


def listed(query: AuditQuery, wanted: audit_pb2.DecisionFilter, size: int) -> list[bytes]:
    """All pages."""
    found: list[bytes] = []
    token = ""
    while True:
        page = query.page(wanted, size, token)
        assert not page.incomplete
        found += [one.SerializeToString() for one in page.decisions]
        token = page.next_page_token
        if not token:
            return found


@given(
    commits=COMMITS,
    late=st.lists(st.integers(0, 4), min_size=60, max_size=60),
    range_bytes=st.integers(1, 1_500),
    reopened=st.sets(st.integers(0, 15), max_size=3),
    unsettled=st.integers(0, 10),
    trimmed=st.integers(0, 15),
    shipped=st.none() | st.integers(0, 30),
    asked=FILTERS,
    since=st.none() | st.integers(-5, 400),
    until=st.none() | st.integers(-5, 400),
    size=st.integers(1, 12),
)
def finds_the_same(
    commits: list[list[list[Made] | Said]],
    late: list[int],
    range_bytes: int,
    reopened: set[int],
    unsettled: int,
    trimmed: int,
    shipped: int | None,
    asked: dict[str, object],
    since: int | None,
    until: int | None,
    size: int,
) -> None:
    """Whatever notes say of the replies, here or in another journal, of keys, and with some rows in the database."""
    with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patched:
        patched.setattr("server.journal.ranges.RANGE_BYTES", range_bytes)
        path, elsewhere = Path(directory) / "journal.db", Path(directory) / "elsewhere.db"
        _write(path, elsewhere, commits, late, reopened, unsettled, trimmed if shipped is None else 0)
        url = None if shipped is None else f"sqlite:///{directory}/audit.db"
        if url is not None and shipped is not None:
            with closing(Store(url)) as store:
                store.migrate()
                _ship(store, elsewhere, -1)
                _ship(store, path, shipped)
        without = Path(directory) / "without.db"
        shutil.copyfile(path, without)
        with closing(sqlite3.connect(without, isolation_level=None)) as connection:
            connection.execute("UPDATE entries SET range = NULL")
        wanted = audit_pb2.DecisionFilter(**asked)  # type: ignore[arg-type]
        spread = audit_pb2.DecisionFilter(**asked)  # type: ignore[arg-type]
        for bound, field in ((since, wanted.since), (until, wanted.until)):
            if bound is not None:
                field.FromDatetime(BEGIN + dt.timedelta(seconds=bound))
        spread.since.FromDatetime(BEGIN - dt.timedelta(seconds=10))
        spread.until.FromDatetime(BEGIN + dt.timedelta(seconds=400))
        with closing(AuditQuery(url, path)) as query, closing(AuditQuery(url, without)) as plain:
            assert listed(query, wanted, size) == listed(plain, wanted, size)
            assert query.spread(spread, 30) == plain.spread(spread, 30)


@pytest.mark.parametrize("examples", [30, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(600)])])
def test_a_filter_finds_the_same_with_ranges_and_without(examples: int) -> None:
    settings(max_examples=examples, deadline=None)(finds_the_same)()


def _write(
    path: Path,
    elsewhere: Path,
    commits: list[list[list[Made] | Said]],
    late: list[int],
    reopened: set[int],
    unsettled: int,
    trimmed: int,
) -> None:
    ids: list[str] = []
    second = 0
    journal = JournalFile(path, sync_commits=False)
    with closing(JournalFile(elsewhere, sync_commits=False)) as other:
        for number, commit in enumerate(commits):
            entries = []
            for part in commit:
                second += 6
                if isinstance(part, list):
                    at = second - 2 * late[second // 6 % len(late)]
                    packets = [made(one, len(ids) + row, at) for row, one in enumerate(part)]
                    ids += [packet.decision.decision_id for packet in packets]
                    entries.append(together(packets).SerializeToString())
                elif ids:
                    said = note(part, ids[part.of % len(ids)])
                    if part.elsewhere:
                        other.append([said])
                    else:
                        entries.append(said)
            if entries:
                head = journal.head.position + len(entries)
                journal.append(entries, max(journal.settled, head - unsettled))
                journal.note()
            if number in reopened:
                journal.close()
                journal = JournalFile(path, sync_commits=False)
        journal.trim(trimmed, 100)
        journal.close()


def _ship(store: Store, path: Path, most: int) -> None:
    with closing(JournalReader(path)) as reader:
        if rows := reader.rows_after(0, most):
            store.write(reader.journal_id, store.shipped(reader.journal_id, reader.anchor()), rows)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A journal of 10,000 entries in ranges of some 100; the 5,000th is rare in all that can be asked for."""
    monkeypatch.setattr("server.journal.ranges.RANGE_BYTES", 30_000)
    path = tmp_path / "journal.db"
    common = Made("twap", "BTCUSDT.SIM", pb.ACTION_TRADE, pb.SOURCE_PRIMARY, "v1", "")
    rare = Made("rare", "ETHUSDT.SIM", pb.ACTION_ABSTAIN, pb.SOURCE_RULES, "v2", "")
    with closing(JournalFile(path, sync_commits=False)) as journal:
        for first in range(0, 10_000, 20):
            numbers = range(first, first + 20)
            packets = [made(rare if number == 5_000 else common, number, number) for number in numbers]
            journal.append([together([packet]).SerializeToString() for packet in packets])
            journal.note()
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions of the entries that were read."""
    positions: list[int] = []

    def noting(journal: JournalReader, position: int, limit: int) -> list[Row]:
        rows = rows_after(journal, position, limit)
        positions.extend(row.position for row in rows)
        return rows

    rows_after = JournalReader.rows_after
    monkeypatch.setattr(JournalReader, "rows_after", noting)
    return positions


RARE = {
    "strategy": {"strategies": ["rare"]},
    "instrument": {"instruments": ["ETHUSDT.SIM"]},
    "action": {"decided_actions": [pb.ACTION_ABSTAIN]},
    "heard action": {"heard_actions": [audit_pb2.HEARD_ACTION_ABSTAIN]},
    "source": {"sources": [pb.SOURCE_RULES]},
    "model": {"model": "v2"},
}


@pytest.mark.parametrize("what", RARE)
def test_of_a_large_journal_the_range_is_read_that_holds_what_is_rare(what: str, large: Path, read: list[int]) -> None:
    with closing(AuditQuery(None, large)) as query:
        (found,) = query.page(audit_pb2.DecisionFilter(**RARE[what]), 50, "").decisions  # type: ignore[arg-type]
    assert found.position == 5_001
    assert 5_001 in read
    assert len(read) < 400, "its range, and the newest entries, which are in none yet"


@pytest.mark.parametrize(
    ("cause", "heard_action"),
    [
        ("audit_late", audit_pb2.HEARD_ACTION_ABSTAIN),
        ("cancelled", audit_pb2.HEARD_ACTION_NOTHING),
        ("killed", audit_pb2.HEARD_ACTION_UNKNOWN),
    ],
)
def test_what_was_heard_otherwise_is_found_by_its_note(
    cause: str, heard_action: audit_pb2.HeardAction.ValueType, large: Path, read: list[int]
) -> None:
    """One of many decisions to trade, with a note far behind it that says that the caller heard something else."""
    trade = made(Made("twap", "BTCUSDT.SIM", pb.ACTION_TRADE, pb.SOURCE_PRIMARY, "v1", ""), 2_000, 2_000)
    decision_id = trade.decision.decision_id
    with closing(JournalFile(large, sync_commits=False)) as journal:
        journal.append([note(Said(0, cause, elsewhere=False), decision_id)])
    with closing(AuditQuery(None, large)) as query:
        found = query.page(audit_pb2.DecisionFilter(heard_actions=[heard_action]), 50, "").decisions
    assert decision_id in [one.packet.decision.decision_id for one in found]
    assert len(read) < 700


def short(path: Path, entry: bytes, settled: int | None = None) -> None:
    """A journal whose first range holds this entry."""
    other = made(Made("twap", "BTCUSDT.SIM", pb.ACTION_TRADE, pb.SOURCE_PRIMARY, "v1", ""), 100, 100)
    with closing(JournalFile(path, sync_commits=False)) as journal:
        for one in (entry, together([other]).SerializeToString()):
            journal.append([one], settled)
            journal.note()


@pytest.fixture
def _ranges_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.journal.ranges.RANGE_BYTES", 1)


@pytest.mark.usefixtures("_ranges_of_one")
def test_what_a_repeat_heard_elsewhere_is_found_by_the_database(tmp_path: Path) -> None:
    """The decision is in a journal, and the note that a repeat heard ABSTAIN is in the database, of another one."""
    keyed = made(Made("twap", "BTCUSDT.SIM", pb.ACTION_TRADE, pb.SOURCE_PRIMARY, "v1", "key"), 1, 1)
    path, elsewhere, url = tmp_path / "journal.db", tmp_path / "elsewhere.db", f"sqlite:///{tmp_path / 'audit.db'}"
    short(path, together([keyed]).SerializeToString())
    with closing(JournalFile(elsewhere, sync_commits=False)) as journal, closing(Store(url)) as store:
        journal.append([note(Said(0, "withdrawn", elsewhere=True), keyed.decision.decision_id)])
        store.migrate()
        _ship(store, elsewhere, -1)
    with closing(AuditQuery(url, path)) as query:
        wanted = audit_pb2.DecisionFilter(heard_actions=[audit_pb2.HEARD_ACTION_ABSTAIN])
        (found,) = query.page(wanted, 50, "").decisions
    assert found.packet.decision.decision_id == keyed.decision.decision_id


@pytest.mark.usefixtures("_ranges_of_one")
def test_what_is_not_settled_yet_is_found_by_that(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    trade = made(Made("twap", "BTCUSDT.SIM", pb.ACTION_TRADE, pb.SOURCE_PRIMARY, "v1", ""), 1, 1)
    short(path, together([trade]).SerializeToString(), settled=0)
    with closing(AuditQuery(None, path)) as query:
        wanted = audit_pb2.DecisionFilter(heard_actions=[audit_pb2.HEARD_ACTION_UNKNOWN])
        assert [one.position for one in query.page(wanted, 50, "").decisions] == [2, 1]


@pytest.mark.usefixtures("_ranges_of_one")
@pytest.mark.parametrize("asked", [{"strategies": [""]}, {"instruments": [""]}, {"decided_actions": [0]}])
def test_a_decision_without_order_or_answer_is_found_by_that(asked: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    trade = made(Made("twap", "BTCUSDT.SIM", pb.ACTION_TRADE, pb.SOURCE_PRIMARY, "v1", ""), 1, 1)
    entry = together([trade])
    entry.decisions.order[:], entry.decisions.answer[:] = [0], [0]
    short(path, entry.SerializeToString())
    with closing(AuditQuery(None, path)) as query:
        wanted = audit_pb2.DecisionFilter(**asked)  # type: ignore[arg-type]
        (found,) = query.page(wanted, 50, "").decisions
    assert found.position == 1


def test_several_processes_find_what_is_durable_while_one_writes(tmp_path: Path) -> None:
    """Each question must find all rare decisions that were durable, and not trimmed, before it was asked."""
    context = multiprocessing.get_context("spawn")
    path = tmp_path / "journal.db"
    JournalFile(path, sync_commits=False).close()
    durable, trimmed, done = (context.Value("q", 0) for _ in range(3))
    writer = context.Process(target=_append_rare, args=(path, durable, trimmed, done))
    readers = [context.Process(target=_find_rare, args=(path, durable, trimmed, done)) for _ in range(2)]
    for process in (*readers, writer):
        process.start()
    for process in (*readers, writer):
        process.join(120)
        assert process.exitcode == 0
    assert (durable.value, trimmed.value > 0) == (60, True)


def _append_rare(path: Path, durable: Synchronized[int], trimmed: Synchronized[int], done: Synchronized[int]) -> None:
    pytest.MonkeyPatch().setattr("server.journal.ranges.RANGE_BYTES", 3_000)
    common, rare = (
        Made(name, "BTCUSDT.SIM", pb.ACTION_TRADE, pb.SOURCE_PRIMARY, "v1", "") for name in ("twap", "rare")
    )
    chance = random.Random(1)
    number = 0
    with closing(JournalFile(path, sync_commits=False)) as journal:
        for count in range(1, 61):
            kinds = [common] * chance.randrange(1, 80)
            kinds[chance.randrange(len(kinds))] = rare
            while kinds:
                size = min(len(kinds), chance.randrange(1, 20))
                packets = [made(one, number + row, number + row) for row, one in enumerate(kinds[:size])]
                journal.append([together([packet]).SerializeToString() for packet in packets])
                journal.note()
                number += size
                del kinds[:size]
            durable.value = count
            if count == 40:
                trimmed.value = journal.head.position  # readers may miss them from now on
                while journal.trim(trimmed.value, 100):
                    pass
    done.value = 1


def _find_rare(path: Path, durable: Synchronized[int], trimmed: Synchronized[int], done: Synchronized[int]) -> None:
    with closing(AuditQuery(None, path)) as query:
        while True:
            last, known, gone_before = done.value, durable.value, trimmed.value
            decisions = query.page(audit_pb2.DecisionFilter(strategies=["rare"]), 100, "").decisions
            gone = trimmed.value or gone_before
            assert len(decisions) >= (known - 40 if gone else known), f"{len(decisions)} of {known}"
            assert len({one.position for one in decisions}) == len(decisions)
            if last:
                assert len(decisions) == 20
                return
