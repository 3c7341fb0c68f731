"""The simulated disk loses what a disk may lose, and nothing else; SQLite on it keeps what it has synced."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from support.batches import together
from support.ranges import wrong_ranges

from pretrade.audit.v1 import packet_pb2
from server.journal.journal_file import JournalFile, JournalReader
from simulation.disk import Disk
from simulation.vfs import SimulatedSqlite, UnavailableError, simulated_sqlite
from simulation.world import World


def disk(seed: int) -> Disk:
    return Disk(World(seed), "a", 2**20, lambda: 0)


def test_what_was_synced_survives_and_of_the_rest_any_sectors() -> None:
    survived = set()
    for seed in range(200):
        one = disk(seed)
        file = one.create("/a/f")
        one.sync_directory("/a")
        one.write(file, 0, b"s" * 1024)
        one.sync(file)
        one.write(file, 512, b"u" * 1024)
        one.lose_power()
        content = bytes(file.content)
        assert content[:512] == b"s" * 512
        survived.add((content[512:1024], content[1024:]))
    old, new, gone = b"s" * 512, b"u" * 512, b""
    assert {(old, gone), (new, gone), (old, new), (new, new)} <= survived


def test_a_name_that_was_not_synced_may_be_gone_and_a_file_is_never_under_two() -> None:
    found = set()
    for seed in range(100):
        one = disk(seed)
        one.write(one.create("/a/f"), 0, b"old")
        one.sync_directory("/a")
        one.write(one.create("/a/f.new"), 0, b"new")
        one.rename("/a/f.new", "/a/f")
        before = one.find("/a/f")
        one.lose_power()
        names = {name: one.find(name) is before for name in one.names()}
        found.add(tuple(sorted(names.items())))
    assert found == {
        (("/a/f", False),),
        (("/a/f", False), ("/a/f.new", True)),
        (("/a/f", True),),
    }


def test_what_a_failed_sync_gave_up_is_not_made_durable_by_the_next_one() -> None:
    lost = 0
    for seed in range(50):
        one = disk(seed)
        file = one.create("/a/f")
        one.sync_directory("/a")
        one.write(file, 0, b"first")
        one.weather.sync_failures = 1.0
        with pytest.raises(OSError, match="failed to sync"):
            one.sync(file)
        one.weather.sync_failures = 0.0
        one.sync(file)
        one.lose_power()
        lost += bytes(file.content) != b"first"
    assert lost


def test_what_a_failed_sync_gave_up_is_durable_once_it_is_written_again() -> None:
    for seed in range(50):
        one = disk(seed)
        file = one.create("/a/f")
        one.sync_directory("/a")
        one.write(file, 0, b"a" * 10_000)
        one.weather.sync_failures = 1.0
        with pytest.raises(OSError, match="failed to sync"):
            one.sync(file)
        one.weather.sync_failures = 0.0
        one.write(file, 5_000, b"b")  # with the rest of its page
        one.sync(file)
        one.write(file, 0, b"a" * 4_096)
        one.sync(file)
        one.write(file, 10_000, b"never synced")
        one.lose_power()
        content = bytes(file.content)
        assert content[:5_000] == b"a" * 5_000
        assert content[5_000:8_192] == b"b" + b"a" * 3_191
        assert content[8_192:10_000].strip(b"\0a") == b""
        assert len(content) >= 10_000


def test_a_full_disk_takes_what_overwrites_and_nothing_more() -> None:
    one = disk(1)
    one.capacity = 1_000
    file = one.create("/a/f")
    one.write(file, 0, bytes(1_000))
    one.write(file, 0, b"again")
    with pytest.raises(OSError, match="full"):
        one.write(file, 999, b"xy")
    one.truncate(file, 10)
    one.write(file, 10, bytes(900))


@pytest.fixture
def sqlite() -> Iterator[SimulatedSqlite]:
    try:
        made = simulated_sqlite()
    except UnavailableError as reason:
        pytest.skip(f"the simulation cannot run here: {reason}")
    made.begin(Random(1))
    yield made
    made.end()


def test_every_row_that_a_journal_acknowledged_is_there_after_a_loss_of_power_at_any_write(
    sqlite: SimulatedSqlite,
) -> None:
    torn = 0
    for seed, rows in itertools.product(range(30), (1, 3)):
        one = Disk(World(seed), f"d{seed}-{rows}", 2**24, lambda: 0)
        sqlite.mount(one)
        path = Path(f"/{one.name}/journal.db")
        journal = JournalFile(path, sync_commits=True)
        acknowledged = []
        for number in range(20):
            entries = [b"%d/%d" % (number, row) * 100 for row in range(rows)]
            journal.append(entries)
            acknowledged += entries
        one.weather.sync_failures = 1.0
        with pytest.raises(sqlite3.OperationalError):
            journal.append([b"never acknowledged" * 100])
        one.lose_power()
        sqlite.forget_memory(one)
        one.weather.sync_failures = 0.0
        with closing(JournalReader(path)) as reader:
            reader.verify()
            found = [row.entry for row in reader.rows_after(0, -1)]
        assert found[: len(acknowledged)] == acknowledged
        torn += len(found) > len(acknowledged)
        journal.close()
    assert torn, "some of what was written and not synced survives"


def test_a_reader_beside_the_writer_sees_whole_commits_and_does_not_hold_it_up(sqlite: SimulatedSqlite) -> None:
    one = Disk(World(1), "d", 2**24, lambda: 0)
    sqlite.mount(one)
    path = Path("/d/journal.db")
    with closing(JournalFile(path, sync_commits=True)) as journal, closing(JournalReader(path)) as reader:
        for number in range(50):
            journal.append([b"x" * 3_000] * 2)
            assert reader.last_position() == 2 * number + 2
            if number % 10 == 9:
                journal.checkpoint()
                journal.trim(2 * number, 100)
        reader.verify()


def test_no_range_of_a_journal_lacks_what_is_in_it_after_a_loss_of_power_at_any_write(
    sqlite: SimulatedSqlite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note of a range is there with the row that has it, or lost with it; the next process writes on."""
    monkeypatch.setattr("server.journal.ranges.RANGE_BYTES", 500)
    found, dead = [], []
    for seed in range(30):
        one = Disk(World(seed), f"r{seed}", 2**24, lambda: 0)
        sqlite.mount(one)
        path = Path(f"/{one.name}/journal.db")
        for process in range(3):
            journal = JournalFile(path, sync_commits=True)
            for _ in range(5 + seed % 7):
                number = journal.head.position
                journal.append([_decision(f"{process}-{number}-{row}") for row in range(2)])
                journal.note()
            one.weather.sync_failures = 1.0
            with pytest.raises(sqlite3.OperationalError):
                journal.append([_decision(f"{process}-never-acknowledged")])
            one.lose_power()
            sqlite.forget_memory(one)
            one.weather.sync_failures = 0.0
            with closing(JournalReader(path)) as reader:
                reader.verify()
                assert wrong_ranges(reader) == []
                found.append(len(list(reader.ranges(0, reader.last_position()))))
            dead.append(journal)
    for journal in dead:  # only now: a process that has lost its power writes nothing more
        journal.close()
    assert min(found) > 0
    assert max(found) > 3


def _decision(strategy: str) -> bytes:
    packet = packet_pb2.DecisionPacket(model_input=bytes(200))
    packet.order.strategy = packet.decision.decision_id = strategy
    return together([packet]).SerializeToString()
