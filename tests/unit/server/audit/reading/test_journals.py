"""Decisions in journals: found by the time in their ids, without reading all that was written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import together

from pretrade.audit.v1 import audit_pb2, packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.audit.reading.journals import Journals, Step, matching
from server.decision.ids import Ids
from server.journal.entries import entry_of, packets
from server.journal.journal_file import Head, JournalFile, JournalReader, Row
from server.journal.reply_status import AS_DECIDED, NOT_SETTLED, SAY_OF_REPLIES, Reply


def packet(decision_id: str) -> packet_pb2.DecisionPacket:
    return packet_pb2.DecisionPacket(decision=pb.Decision(decision_id=decision_id))


def decision(*decision_ids: str) -> bytes:
    """An entry: of one decision by itself, or of several."""
    if len(decision_ids) == 1:
        return packet_pb2.JournalEntry(decision=packet(decision_ids[0])).SerializeToString()
    return together([packet(one) for one in decision_ids]).SerializeToString()


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
    sizes=st.lists(st.integers(1, 5), min_size=40, max_size=40),
    trim=st.integers(0, 10),
    shipped=st.integers(0, 20),
)
def test_every_decision_is_found_wherever_it_is(
    times: list[int], ordered: bool, notes: set[int], sizes: list[int], trim: int, shipped: int
) -> None:
    """Also after the wall clock was set: `times` need not be in order."""
    now = 0
    new_id = Ids(lambda: (1_700_000_000_000 + now) * 1_000_000)
    ids, entries = [], []
    positions: dict[str, int] = {}
    rows: dict[str, int] = {}
    for number, now in enumerate(sorted(times) if ordered else times):  # noqa: B007 - the clock reads it
        side_by_side = [new_id() for _ in range(sizes[number])]
        ids += side_by_side
        entries.append(decision(*side_by_side))
        positions |= dict.fromkeys(side_by_side, len(entries))
        rows |= {one: row for row, one in enumerate(side_by_side)}
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
                place = (positions[decision_id], rows[decision_id], decision_id)
                assert (found and (found.position, found.row, found.packet.decision.decision_id)) == (
                    place if place[0] > after else None
                )
            assert journals.find("01a205b2-e5a0-7000-8000-000000000000", heads, []) is None
            assert journals.find("no id of ours", heads, []) is None


def test_a_decision_is_found_among_many_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_700_000_000_000_000_000
    new_id = Ids(lambda: now)
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
    (entry,) = journals.naming(ids[3], SAY_OF_REPLIES, {}, [])
    assert entry.reply_unconfirmed.cause == "cancelled"
    assert read == 0


def told(step: Step) -> list[str]:
    return [event.decision.packet.decision.decision_id for event in step.events]


def test_a_watch_goes_on_within_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    write(path, [decision("a", "b", "c"), note("a"), decision("d"), decision("e", "f")])
    journals = Journals(path)
    step = journals.after(audit_pb2.WatchDecisionsRequest(from_oldest=True))
    assert step.more
    whole = journals.after(audit_pb2.WatchDecisionsRequest(cursor=step.cursor))
    assert told(whole) == ["a", "b", "c", "", "d", "e", "f"]
    assert [event.decision.row for event in whole.events] == [0, 1, 2, 0, 0, 0, 1]
    for number, event in enumerate(whole.events):
        again = journals.after(audit_pb2.WatchDecisionsRequest(cursor=event.cursor))
        assert told(again) == told(whole)[number + 1 :]
    assert told(journals.after(audit_pb2.WatchDecisionsRequest(cursor=whole.cursor))) == []


def test_a_step_of_a_watch_ends_after_some_decisions_and_loses_none(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    ids = [f"{number:04}" for number in range(1_000)]
    write(path, [decision(*ids[first : first + 100]) for first in range(0, 1_000, 100)])
    journals = Journals(path)
    cursor = journals.after(audit_pb2.WatchDecisionsRequest(from_oldest=True)).cursor
    found: list[str] = []
    steps, more = 0, True
    while more:
        step = journals.after(audit_pb2.WatchDecisionsRequest(cursor=cursor))
        cursor, more = step.cursor, step.more
        found += told(step)
        steps += 1
    assert (found, steps) == (ids, 4)


def given_packet(number: int) -> packet_pb2.DecisionPacket:
    found = packet(f"d{number}")
    found.order.instrument, found.order.strategy = f"I{number % 2}", f"s{number % 3}"
    found.decision.action, found.decision.source = pb.Action.values()[number % 4], pb.Source.values()[number % 5]
    found.decision.model_name, found.decision.model_version = "champion", f"v{number % 2}"
    found.decision.decided_at.FromSeconds(1_700_000_000 + number)
    return found


@given(
    numbers=st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True),
    instruments=st.sets(st.sampled_from(("I0", "I1"))),
    strategies=st.sets(st.sampled_from(("s0", "s2"))),
    actions=st.sets(st.sampled_from(pb.Action.values())),
    heard=st.sets(st.sampled_from(audit_pb2.HeardAction.values())),
    late=st.booleans(),
    sources=st.sets(st.sampled_from(pb.Source.values())),
    model=st.sampled_from(("", "champion", "v1", "other")),
    times=st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40)),
)
def test_a_filter_lets_the_same_through_of_an_entry_as_of_each_decision_by_itself(
    numbers: list[int],
    instruments: set[str],
    strategies: set[str],
    actions: set[pb.Action.ValueType],
    heard: set[audit_pb2.HeardAction.ValueType],
    late: bool,
    sources: set[pb.Source.ValueType],
    model: str,
    times: tuple[int | None, int | None],
) -> None:
    wanted = audit_pb2.DecisionFilter(
        instruments=instruments,
        strategies=strategies,
        decided_actions=actions,
        heard_actions=heard,
        sources=sources,
        model=model,
    )
    since, until = times
    if since is not None:
        wanted.since.FromSeconds(1_700_000_000 + since)
    if until is not None:
        wanted.until.FromSeconds(1_700_000_000 + until)
    entry = entry_of(together([given_packet(number) for number in numbers]).SerializeToString())
    by_themselves = [packet_pb2.JournalEntry(decision=one) for one in packets(entry)]

    def reply_to(decision_id: str) -> Reply:
        return NOT_SETTLED if late and hash(decision_id) % 2 else AS_DECIDED

    found = [row for row, _ in matching(wanted, entry, reply_to)]
    assert found == [row for row, one in enumerate(by_themselves) if matching(wanted, one, reply_to)]
    if not any((instruments, strategies, actions, heard, sources, model, since, until)) and times == (None, None):
        assert found == list(range(len(numbers)))
