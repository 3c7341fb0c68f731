"""What is kept of pairs of scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pretrade.audit.v1 import packet_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from server.canary.pairs import PairRecorder
from server.errors import JournalUnwritableError
from server.inference.shadow import Opinion, Pair, Pairs
from server.journal.journal import Journal, JournalSettings

INSTRUMENT = "BTCUSDT.BINANCE"


def pair(decision_id: str = "one", side: pb.Side.ValueType = pb.SIDE_BUY, mid: float = 100.0) -> Pair:
    return Pair(
        decision_id, INSTRUMENT, side, mid, Opinion("aa" * 8, 0.9, 0.5), Opinion("bb" * 8, 0.2, 0.4), False, 0.0015, 1
    )


class Entries(Journal):
    """Takes entries, or refuses them; without a thread and a file."""

    def __init__(self) -> None:
        super().__init__(JournalSettings())
        self.entries: list[packet_pb2.JournalEntry] = []
        self.writable, self.broken = True, False

    def append(self, entry: bytes, *, even_if_full: bool = False) -> object:  # type: ignore[override]  # nobody waits
        if self.broken:
            raise JournalUnwritableError("no disk")
        self.entries.append(packet_pb2.JournalEntry.FromString(entry))
        return None


def test_many_pairs_are_one_entry() -> None:
    journal = Entries()
    recorder = PairRecorder(journal, lambda: 42)
    for number in range(300):
        recorder.add(pair(str(number)))
    assert journal.entries == []
    recorder.flush()
    assert [len(entry.score_pairs.pairs) for entry in journal.entries] == [256, 44]
    first = journal.entries[0].score_pairs.pairs[0]
    assert (first.decision_id, first.champion_score, first.challenger_score) == ("0", 0.9, 0.2)
    assert (first.champion_trades, first.challenger_trades, first.challenger_decided) == (True, False, False)
    assert (first.challenger_us, first.recorded_at_ns) == (1_500, 42)
    assert (recorder.recorded, recorder.lost) == (300, 0)


def together(ids: list[str], ours: list[float], theirs: list[float]) -> Pairs:
    views: list[Any] = [SimpleNamespace(mid=100.0, snapshot=SimpleNamespace(sequence=1))] * len(ids)
    names, sides = [INSTRUMENT] * len(ids), [pb.SIDE_BUY] * len(ids)
    return Pairs(ids, names, sides, views, "aa" * 8, 0.5, ours, "bb" * 8, 0.4, theirs, 0.0015)


@pytest.mark.parametrize("challenger_decided", [False, True])
def test_pairs_of_columns_are_recorded_as_one_by_one(challenger_decided: bool) -> None:
    scores = [0.0, 0.3, 0.5, 1.0]
    ours, theirs = [one for one in scores for _ in scores], scores * len(scores)
    pairs = together([f"decision-{place}" for place in range(len(ours))], ours, theirs)
    pairs = pairs._replace(challenger_decided=challenger_decided)
    apart, columns = Entries(), Entries()
    one_by_one, at_once = PairRecorder(apart, lambda: 42), PairRecorder(columns, lambda: 42)
    for each in pairs.each():
        one_by_one.add(each)
    at_once.add_together(pairs)
    one_by_one.flush()
    at_once.flush()
    assert columns.entries == apart.entries
    assert {one.challenger_decided for one in columns.entries[0].score_pairs.pairs} == {challenger_decided}
    assert {(one.champion_trades, one.challenger_trades) for one in columns.entries[0].score_pairs.pairs} == {
        (False, False), (False, True), (True, False), (True, True)
    }  # fmt: skip


def test_of_columns_no_more_than_so_many_pairs_wait_and_full_entries_leave_first() -> None:
    journal = Entries()
    recorder = PairRecorder(journal, lambda: 42)
    for first in range(0, 5_000, 1_000):
        ids = [str(number) for number in range(first, first + 1_000)]
        recorder.add_together(together(ids, [0.9] * 1_000, [0.2] * 1_000))
    assert recorder.lost == 5_000 - 4_096
    recorder.flush(256)
    assert recorder.recorded == 4_096
    recorder.add(pair("last"))
    recorder.flush(256)
    assert recorder.recorded == 4_096
    recorder.flush()
    found = [one.decision_id for entry in journal.entries for one in entry.score_pairs.pairs]
    assert found == [*(str(number) for number in range(4_096)), "last"]


def test_pairs_that_cannot_be_kept_are_counted_and_no_more_than_so_many_wait() -> None:
    journal = Entries()
    recorder = PairRecorder(journal, lambda: 42)
    for number in range(5_000):
        recorder.add(pair(str(number)))
    assert recorder.lost == 5_000 - 4_096
    journal.broken = True
    recorder.flush()
    assert (recorder.recorded, recorder.lost) == (0, 5_000)
    journal.broken, journal.writable = False, False
    recorder.add(pair())
    recorder.flush()
    assert (journal.entries, recorder.lost) == ([], 5_001)
