"""Decisions in journals: found by the time in their ids, without reading all that was written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrade.audit.v1 import packet_pb2
from server.audit.reading.journals import Journals
from server.decision.ids import uuid7_source
from server.journal.journal_file import Head, JournalFile, JournalReader, Row


def decision(decision_id: str) -> bytes:
    entry = packet_pb2.JournalEntry()
    entry.decision.decision.decision_id = decision_id
    return entry.SerializeToString()


def note(decision_id: str) -> bytes:
    return packet_pb2.JournalEntry(
        reply_unconfirmed=packet_pb2.ReplyUnconfirmed(decision_id=decision_id, cause="cancelled")
    ).SerializeToString()


def write(path: Path, entries: Sequence[bytes], trim: int = 0) -> str:
    with closing(JournalFile(path, sync_commits=False)) as journal:
        for first in range(0, len(entries), 1000):
            journal.append(entries[first : first + 1000])
        journal.trim(trim, trim)
        return journal.journal_id


@settings(max_examples=60, deadline=None)
@given(
    times=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    ordered=st.booleans(),
    notes=st.sets(st.integers(0, 39)),
    trim=st.integers(0, 10),
    shipped=st.integers(0, 20),
)
def test_every_decision_is_found_wherever_it_is(
    times: list[int], ordered: bool, notes: set[int], trim: int, shipped: int
) -> None:
    """Also after the wall clock was set: `times` need not be in order."""
    now = 0
    new_id = uuid7_source(lambda: (1_700_000_000_000 + now) * 1_000_000)
    ids, entries, positions = [], [], {}
    for number, now in enumerate(sorted(times) if ordered else times):  # noqa: B007 - the clock reads it
        ids.append(new_id())
        entries.append(decision(ids[-1]))
        positions[ids[-1]] = len(entries)
        if number in notes:
            entries.append(note(ids[number // 2]))
    trim, shipped = min(trim, len(entries)), min(shipped, len(entries))
    with TemporaryDirectory() as directory:
        path = Path(directory) / "journal.db"
        journal_id = write(path, entries, trim)
        journals = Journals(path)
        for heads in ({}, {journal_id: Head(max(trim, shipped), b"")}):
            after = max([trim, *(head.position for head in heads.values())])
            for decision_id in ids:
                problems: list[str] = []
                found = journals.find(decision_id, heads, problems)
                assert problems == []
                assert (found.position if found else None) == (
                    positions[decision_id] if positions[decision_id] > after else None
                )
            assert journals.find("01a205b2-e5a0-7000-8000-000000000000", heads, []) is None
            assert journals.find("no id of ours", heads, []) is None


def test_a_decision_is_found_among_many_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_700_000_000_000_000_000
    new_id = uuid7_source(lambda: now)
    ids = []
    for _ in range(20_000):
        now += 100_000
        ids.append(new_id())
    entries = [decision(one) for one in ids]
    entries[7] = note(ids[3])
    write(tmp_path / "journal.db", entries)
    read = 0

    def counting(rows: list[Row]) -> list[Row]:
        nonlocal read
        read += len(rows)
        return rows

    rows_after, decision_after = JournalReader.rows_after, JournalReader.decision_after
    monkeypatch.setattr(JournalReader, "rows_after", lambda *of: counting(rows_after(*of)))
    monkeypatch.setattr(
        JournalReader, "decision_after", lambda *of: (row := decision_after(*of)) and counting([row])[0]
    )
    journals = Journals(tmp_path / "journal.db")
    for wanted in (ids[0], ids[4], ids[9_999], ids[-1]):
        read = 0
        found = journals.find(wanted, {}, [])
        assert found is not None
        assert found.packet.decision.decision_id == wanted
        assert read < 150
    read = 0
    (entry,) = journals.naming(ids[3], {}, [])
    assert entry.reply_unconfirmed.cause == "cancelled"
    assert read == 0
