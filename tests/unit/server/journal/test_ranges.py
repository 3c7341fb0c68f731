"""What a journal notes of ranges of its entries: all that is in them, whatever happens to the writer."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import together
from support.ranges import wrong_ranges
from support.twins import compiled_here

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.journal_file import JournalFile, JournalReader
from server.journal.ranges import Notes, Range, read_range, scan_plainly
from server.journal.reply_status import heard, unconfirmed

RANGE_BYTES = 600


@pytest.fixture(autouse=True)
def _short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.journal.ranges.RANGE_BYTES", RANGE_BYTES)


def packet(number: int, strategy: str = "twap", **of_decision: object) -> packet_pb2.DecisionPacket:
    made = packet_pb2.DecisionPacket(decision=pb.Decision(**of_decision))  # type: ignore[arg-type]
    made.order.instrument, made.order.strategy = f"COIN{min(number, 2)}", strategy
    made.decision.decision_id = f"id-{number:06}"
    return made


def entry(number: int, rows: int = 3, strategy: str = "twap") -> bytes:
    return together([packet(10 * number + row, strategy) for row in range(rows)]).SerializeToString()


TEXTS = st.sampled_from(["", "a", "b", "é", "twap"]) | st.text(max_size=3)
PACKETS = st.builds(
    lambda instrument, strategy, key, decision_id, action, source, name, version: packet_pb2.DecisionPacket(
        order=pb.Order(instrument=instrument, strategy=strategy, idempotency_key=key),
        decision=pb.Decision(
            decision_id=decision_id, action=action, source=source, model_name=name, model_version=version
        ),
    ),
    TEXTS,
    TEXTS,
    st.sampled_from(["", "", "key"]),
    TEXTS,
    st.sampled_from(pb.Action.values()),
    st.sampled_from(pb.Source.values()),
    TEXTS,
    TEXTS,
)
ENTRIES = st.one_of(
    st.lists(PACKETS, min_size=1, max_size=4).map(lambda some: together(some).SerializeToString()),
    PACKETS.map(lambda one: packet_pb2.JournalEntry(decision=one).SerializeToString()),
    TEXTS.map(lambda one: unconfirmed(one, "cancelled")),
    TEXTS.map(heard),
)
DAMAGED = st.one_of(
    st.binary(max_size=40),
    st.tuples(ENTRIES, st.integers(0, 200)).map(lambda found: found[0][: found[1]]),
    st.tuples(ENTRIES, ENTRIES).map(b"".join),
    st.tuples(ENTRIES, st.integers(0, 200), st.binary(max_size=2)).map(
        lambda found: found[0][: found[1]] + found[2] + found[0][found[1] + len(found[2]) :]
    ),
)


def two_sets() -> tuple[set[bytes], set[bytes]]:
    return set(), set()


@settings(max_examples=400, deadline=None)
@given(entry=ENTRIES)
def test_the_compiled_twin_finds_the_same_in_what_servers_write(entry: bytes) -> None:
    twin = compiled_here("server.journal.ranges_c")
    orders, answers = two_sets(), two_sets()
    found = twin.scan(entry, orders[0], answers[0])
    assert found is not None or packet_pb2.JournalEntry.FromString(entry).WhichOneof("entry") == "decision"
    if found is not None:
        assert found == scan_plainly(entry, orders[1], answers[1])
        assert (orders[0], answers[0]) == (orders[1], answers[1])


@settings(max_examples=400, deadline=None)
@given(entry=DAMAGED)
def test_the_compiled_twin_misses_nothing_in_what_is_damaged(entry: bytes) -> None:
    twin = compiled_here("server.journal.ranges_c")
    orders, answers = two_sets(), two_sets()
    found = twin.scan(entry, orders[0], answers[0])
    oldest, newest, has_keys = scan_plainly(entry, orders[1], answers[1])
    if found is None:
        return
    assert has_keys <= found[2]
    assert not newest or (found[0] <= oldest and newest <= found[1])
    if newest:
        assert {pb.Order.FromString(one).SerializeToString() for one in orders[0]} >= orders[1]
        assert {packet_pb2.DecisionPacket.FromString(one).SerializeToString() for one in answers[0]} >= answers[1]


@settings(max_examples=60, deadline=None)
@given(
    commits=st.lists(st.lists(ENTRIES, min_size=1, max_size=6), min_size=1, max_size=12),
    told=st.booleans(),
    reopened=st.sets(st.integers(0, 12), max_size=3),
    killed=st.sets(st.integers(0, 12), max_size=3),
    trimmed=st.integers(0, 60),
    range_bytes=st.integers(1, 400),
)
def test_no_range_lacks_what_is_in_its_entries(
    commits: list[list[bytes]], told: bool, reopened: set[int], killed: set[int], trimmed: int, range_bytes: int
) -> None:
    """Whether the writer ends in order or is killed between two commits, and whatever was trimmed."""
    with TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patched:
        patched.setattr("server.journal.ranges.RANGE_BYTES", range_bytes)
        path = Path(directory) / "journal.db"
        journal = JournalFile(path, sync_commits=False)
        for number, entries in enumerate(commits):
            journal.append(entries)
            if told:
                journal.note()
            if number in killed:
                journal = _killed(path, journal, Path(directory) / f"{number}.db")
                path = Path(directory) / f"{number}.db"
            elif number in reopened:
                journal.close()
                journal = JournalFile(path, sync_commits=False)
        journal.trim(trimmed, 100)
        journal.close()
        with closing(JournalReader(path)) as reader:
            assert wrong_ranges(reader) == []
            anchor, head = reader.verify()
            assert head.position == sum(map(len, commits))
            assert all(known.last >= anchor.position for known in reader.ranges(0, head.position))


def _killed(path: Path, journal: JournalFile, copy: Path) -> JournalFile:
    """The journal as the next process finds it, if its writer dies now."""
    for suffix in ("", "-wal"):
        shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
    journal.close()
    return JournalFile(copy, sync_commits=False)


def ranges(path: Path) -> list[Range]:
    with closing(JournalReader(path)) as reader:
        return list(reader.ranges(0, reader.last_position()))


def test_all_but_the_newest_entries_are_in_ranges(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(JournalFile(path, sync_commits=False)) as journal:
        for number in range(100):
            journal.append([entry(number, strategy="rare" if number == 50 else "twap")])
            journal.note()
        found = ranges(path)
        known = [one for one in found if "rare" in (one.strategies or ())]
        assert len(known) == 1
        assert known[0].first <= 51 <= known[0].last
        assert found[-1].first == 1
        assert all(after.first == before.last + 1 for after, before in itertools.pairwise(found))
        size = len(entry(0))
        assert found[0].last > 100 - RANGE_BYTES // size - 3
        assert len(found) == pytest.approx(100 * size / (RANGE_BYTES + size / 2), rel=0.2)


def test_what_a_writer_does_not_note_by_itself_is_noted_before_much_of_it_waits(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(JournalFile(path, sync_commits=False)) as journal:
        for number in range(1_000):
            journal.append([entry(number)])
        (newest, *_) = ranges(path)
        assert newest.last > 1_000 - 2 * 256


def test_a_commit_that_fails_leaves_its_range_to_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(JournalFile(path, sync_commits=False)) as journal:
        journal.append([entry(number) for number in range(20)])
        journal.note()
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                journal.append([entry(20, strategy="never written")])
        assert ranges(path) == []
        journal.append([entry(20)])
        (found,) = ranges(path)
    assert (found.first, found.last, found.strategies) == (1, 20, ["twap"])


def test_ranges_are_trimmed_with_their_entries(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(JournalFile(path, sync_commits=False)) as journal:
        for number in range(100):
            journal.append([entry(number)])
            journal.note()
        while journal.trim(80, 10):
            pass
        assert ranges(path)[-1].last >= 80
        while journal.trim(100, 10):
            pass
    assert ranges(path) == []
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM entries").fetchone() == (0,)


def test_a_range_with_too_many_values_of_a_kind_may_hold_any() -> None:
    notes = Notes(1)
    strategies = [f"strategy-{number}" for number in range(2_500)]
    notes.add(
        [together([packet(number, name, source=3)]).SerializeToString() for number, name in enumerate(strategies)]
    )
    notes.add([together([packet(0, source=4)]).SerializeToString()])
    found = read_range(2_501, notes.text())
    assert found is not None
    assert found.strategies is None
    assert (found.instruments, found.sources) == (["COIN0", "COIN1", "COIN2"], [3, 4])
    assert (found.oldest_id, found.newest_id) == ("id-000000", "id-002499")


def test_a_range_that_is_damaged_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(JournalFile(path, sync_commits=False)) as journal:
        for number in range(100):
            journal.append([entry(number)])
            journal.note()
    whole = ranges(path)
    for damaged in ("", "{", "7", "null", '{"first": 1}', b"\xff\x00", 12, 1.5, '{"first": "x"}'):
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            query = "UPDATE entries SET range = ? WHERE position = ?"
            connection.execute(query, (damaged, whole[1].last + 1))
        assert ranges(path) == [whole[0], *whole[2:]]


def test_a_journal_of_before_there_were_ranges_is_read_and_written_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(JournalFile(path, sync_commits=False)) as journal:
        journal.append([entry(number) for number in range(50)])
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP INDEX ranges")
        connection.execute("ALTER TABLE entries DROP COLUMN range")
    assert ranges(path) == []
    with closing(JournalFile(path, sync_commits=False)) as journal:
        assert journal.head.position == 50
        journal.append([entry(number) for number in range(50, 100)])
        journal.note()
        journal.append([entry(100)])
    (found,) = ranges(path)
    assert (found.first, found.last) == (51, 100)
    with closing(JournalReader(path)) as reader:
        assert reader.verify()[1].position == 101


def test_ranges_are_read_from_their_index_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    asked: list[str] = []
    with closing(JournalFile(path, sync_commits=False)) as journal:
        journal.append([entry(0)])
    with closing(JournalReader(path)) as reader:
        reader._connection.set_trace_callback(asked.append)
        assert list(reader.ranges(0, 1)) == []
    with closing(sqlite3.connect(path)) as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN {asked[0]}").fetchall()
    assert [row[-1] for row in plan] == ["SEARCH entries USING COVERING INDEX ranges (position>? AND position<?)"]
