"""The hash chain: whatever is done to a row, verification names its position."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import together

from pretrade.audit.v1 import packet_pb2
from server.errors import JournalCorruptedError, JournalError
from server.journal.journal_file import GENESIS, Head, JournalFile, JournalReader, Kind, Row, follow, follow_all, link
from server.journal.reply_status import SAY_OF_REPLIES

ROWS = 30


def write(path: Path, rows: int, trim: int = 0) -> None:
    with closing(JournalFile(path, sync_commits=False)) as journal:
        journal.append([str(i).encode() for i in range(1, rows + 1)])
        journal.trim(trim, rows)


def verified(path: Path) -> tuple[int, int]:
    with closing(JournalReader(path)) as reader:
        anchor, head = reader.verify()
        return anchor.position, head.position


@pytest.mark.parametrize("trim", [0, 1, ROWS // 2, ROWS])
def test_an_untouched_journal_verifies_however_much_was_trimmed(tmp_path: Path, trim: int) -> None:
    write(tmp_path / "journal.db", ROWS, trim)
    assert verified(tmp_path / "journal.db") == (trim, ROWS)


TAMPERING = {
    "entry changed": ("UPDATE entries SET entry = X'00' WHERE position = ?", 0),
    "entry of another type": ("UPDATE entries SET entry = 70007 WHERE position = ?", 0),
    "hash changed": ("UPDATE entries SET hash = zeroblob(32) WHERE position = ?", 0),
    "entry emptied": ("UPDATE entries SET entry = X'' WHERE position = ?", 0),
    "row removed": ("DELETE FROM entries WHERE position = ?", 0),
    "rows exchanged": (
        "UPDATE entries SET entry = (SELECT entry FROM entries AS next WHERE next.position = entries.position + 1)"
        " WHERE position = ?",
        0,
    ),
}


@settings(max_examples=60)
@given(how=st.sampled_from(sorted(TAMPERING)), position=st.integers(1, ROWS - 1), trim=st.integers(0, ROWS - 1))
def test_verification_names_the_position_that_was_tampered_with(how: str, position: int, trim: int) -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "journal.db"
        write(path, ROWS, trim)
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            changed = connection.execute(TAMPERING[how][0], (position,)).rowcount
        assert changed == (position > trim)
        if not changed:
            assert verified(path) == (trim, ROWS)
            return
        with pytest.raises(JournalCorruptedError) as caught:
            verified(path)
        assert caught.value.position == position


def test_a_forged_anchor_is_found_at_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    write(path, ROWS, 10)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE journal SET anchor_hash = zeroblob(32)")
    with pytest.raises(JournalCorruptedError) as caught:
        verified(path)
    assert caught.value.position == 11


def test_damaged_pages_are_reported_with_a_position_and_never_skipped(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(JournalFile(path, sync_commits=False)) as journal:
        journal.append([bytes([i % 256]) * 1000 for i in range(500)])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(content)
    with pytest.raises(JournalCorruptedError) as caught:
        verified(path)
    assert 1 < caught.value.position < 500


@pytest.mark.parametrize("torn_bytes", [1, 100, 4096])
def test_a_torn_end_of_the_log_loses_the_last_commit_and_no_other(tmp_path: Path, torn_bytes: int) -> None:
    path, copy = tmp_path / "journal.db", tmp_path / "copy.db"
    with closing(JournalFile(path, sync_commits=False)) as journal:
        for i in range(10):
            journal.append([str(i).encode()] * 3)
        # As the disk looks when the machine stops in the middle of a write: the files of an open journal, cut short.
        copy.write_bytes(path.read_bytes())
        log = path.with_name("journal.db-wal").read_bytes()
    copy.with_name("copy.db-wal").write_bytes(log[:-torn_bytes])
    with closing(JournalFile(copy, sync_commits=False)) as journal:
        assert journal.head.position == 27
        journal.append([b"goes on"])
    assert verified(copy) == (0, 28)


def test_a_trim_goes_in_steps_and_never_past_the_head(tmp_path: Path) -> None:
    with closing(JournalFile(tmp_path / "journal.db", sync_commits=False)) as journal:
        journal.append([b"row"] * 10)
        assert journal.trim(7, 4)
        assert journal.anchor.position == 4
        assert not journal.trim(7, 4)
        assert journal.anchor.position == 7
        assert not journal.trim(1000, 1000)
        assert journal.anchor == journal.head
        assert not journal.trim(3, 4)


@given(entries=st.lists(st.binary(max_size=50), max_size=20))
def test_following_the_rows_gives_the_head(entries: list[bytes]) -> None:
    head, hash_ = Head(0, GENESIS), GENESIS
    for position, entry in enumerate(entries, start=1):
        hash_ = link(hash_, entry)
        head = follow(head, Row(position, entry, hash_))
    assert head == Head(len(entries), hash_)


@given(
    entries=st.lists(st.binary(max_size=50), max_size=10),
    number=st.integers(0, 9),
    change=st.sampled_from(["none", "entry", "hash", "position", "missing"]),
)
def test_following_all_rows_at_once_is_following_one_by_one(entries: list[bytes], number: int, change: str) -> None:
    head, rows = Head(7, b"\1" * 32), []
    for entry in entries:
        rows.append(Row(head.position + 1, entry, link(head.hash, entry)))
        head = follow(head, rows[-1])
    if number < len(rows):
        position, entry, hash_ = rows[number]
        match change:
            case "entry":
                rows[number] = Row(position, entry + b"!", hash_)
            case "hash":
                rows[number] = Row(position, entry, bytes(32))
            case "position":
                rows[number] = Row(position + 1, entry, hash_)
            case "missing":
                del rows[number]

    def one_by_one(head: Head) -> Head:
        for row in rows:
            head = follow(head, row)
        return head

    start = Head(7, b"\1" * 32)
    assert outcome(lambda: follow_all(start, rows)) == outcome(lambda: one_by_one(start))


def outcome(follows: Callable[[], Head]) -> object:
    try:
        return follows()
    except JournalCorruptedError as error:
        return str(error)


def test_reading_a_journal_that_does_not_exist_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot read"):
        JournalReader(tmp_path / "journal.db")
    assert list(tmp_path.iterdir()) == []


def test_the_kind_of_a_row_is_how_its_entry_begins_and_no_other_entry_begins_so() -> None:
    begin: dict[bytes, str] = {}
    for field in packet_pb2.JournalEntry.DESCRIPTOR.oneofs[0].fields:
        entry = packet_pb2.JournalEntry()
        getattr(entry, field.name).SetInParent()
        assert begin.setdefault(entry.SerializeToString()[:1], field.name) == field.name
    assert {begin[kind.value] for kind in Kind} == {kind.name.lower() for kind in Kind}


def kinds_of_rows() -> list[bytes]:
    """Entries with decisions at positions 1, 3, 4, 7 and 8, and others between them."""
    decision = packet_pb2.JournalEntry()
    decision.decision.decision.decision_id = "d"
    heard, change, unconfirmed, pairs = (packet_pb2.JournalEntry() for _ in range(4))
    heard.reply_heard.decision_id, change.control_change.change_id = "d", "c"
    unconfirmed.reply_unconfirmed.decision_id = "d"
    pairs.score_pairs.SetInParent()
    several = together([decision.decision, decision.decision])
    rows = [decision, heard, several, decision, change, unconfirmed, several, decision, heard, pairs]
    return [one.SerializeToString() for one in rows]


def test_rows_without_a_decision_are_found_by_an_index_of_their_kinds(tmp_path: Path) -> None:
    rows = kinds_of_rows()
    with closing(JournalFile(tmp_path / "journal.db", sync_commits=False)) as journal:
        journal.append(rows)
    with closing(JournalReader(tmp_path / "journal.db")) as reader:
        assert [row.position for row in reader.others_after(0, tuple(Kind))] == [2, 5, 6, 9]
        assert [row.position for row in reader.others_after(0, SAY_OF_REPLIES)] == [2, 6, 9]
        assert [row.position for row in reader.others_after(2, (Kind.REPLY_HEARD,))] == [9]
        assert [row.entry for row in reader.others_after(5, (Kind.REPLY_UNCONFIRMED,))] == [rows[5]]
        found = [reader.decision_after(position) for position in range(9)]
        assert [row and row.position for row in found] == [1, 3, 3, 4, 7, 7, 7, 8, None]
        statements: list[str] = []
        reader._connection.set_trace_callback(statements.append)
        list(reader.others_after(2, SAY_OF_REPLIES))
        reader._connection.set_trace_callback(None)
        for statement in statements:
            (*_, plan) = reader._connection.execute(f"EXPLAIN QUERY PLAN {statement}").fetchone()
            assert plan.endswith("USING INDEX kinds (<expr>=? AND position>?)")


def test_a_journal_of_an_earlier_version_gets_what_it_is_looked_up_by(tmp_path: Path) -> None:
    rows = kinds_of_rows()
    with closing(JournalFile(tmp_path / "journal.db", sync_commits=False)) as journal:
        journal.append(rows)
    with closing(sqlite3.connect(tmp_path / "journal.db")) as connection:
        (plain,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'kinds'").fetchone()
        connection.execute("DROP INDEX kinds")
        connection.execute("CREATE INDEX others ON entries (position) WHERE substr(entry, 1, 1) NOT IN (x'0a', x'42')")
    with closing(JournalReader(tmp_path / "journal.db")) as reader:
        assert [row.position for row in reader.others_after(0, SAY_OF_REPLIES)] == [2, 6, 9], "slowly"
    with closing(JournalFile(tmp_path / "journal.db", sync_commits=False)) as journal:
        assert journal.head.position == len(rows)
        indexes = dict(journal._connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'index'"))
    assert indexes.keys() == {"kinds", "ranges"}
    assert indexes["kinds"] == plain


def test_large_rows_are_trimmed_and_passed_on_few_at_a_time(tmp_path: Path) -> None:
    with closing(JournalFile(tmp_path / "journal.db", sync_commits=False)) as journal:
        journal.append([bytes(100_000)] * 20)
        assert journal.trim(20, 256)
        assert journal.anchor.position == 3
        steps = 1
        while journal.trim(20, 256):
            steps += 1
        assert (journal.anchor.position, steps) == (20, 6)
        journal.append([bytes(2_000_000), b"small", *[bytes(300_000)] * 5])
        with closing(JournalReader(tmp_path / "journal.db")) as reader:
            found = []
            position = 20
            while rows := reader.settled_rows_after(position, 100):
                found.append(len(rows))
                position = rows[-1].position
            assert found == [1, 5, 1]
        assert journal.trim(27, 256)
        assert journal.anchor.position == 21
