"""Records the scores of champion and challenger for the same rows: in the audit journal, and from there in SQL."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pretrade.audit.v1 import packet_pb2
from server.errors import JournalError, JournalFullError
from server.journal.protowire import prefixed, template

if TYPE_CHECKING:
    from server.inference.shadow import Pair, Pairs
    from server.journal.journal import Journal

MOST_IN_ENTRY: Final = 256
_MOST_WAITING: Final = 4_096
_OF_ENTRY: Final = template(packet_pb2.JournalEntry.DESCRIPTOR, "score_pairs")
_OF_PAIRS: Final = template(packet_pb2.ScorePairs.DESCRIPTOR, "pairs")
_OF_PAIR: Final = template(packet_pb2.ScorePair.DESCRIPTOR, "decision_id")
_TAGS: Final = [
    number << 3 | 1
    for number in (packet_pb2.ScorePair.CHAMPION_SCORE_FIELD_NUMBER, packet_pb2.ScorePair.CHALLENGER_SCORE_FIELD_NUMBER)
]
"""Before numbers of eight bytes."""
_SCORES: Final = struct.Struct("<BdBd")
_TRADES: Final = {
    (ours, theirs): packet_pb2.ScorePair(champion_trades=ours, challenger_trades=theirs).SerializeToString()
    for ours in (False, True)
    for theirs in (False, True)
}


class PairRecorder:
    """Gathers pairs and writes many of them as one journal entry.

    No decision waits for it: a pair that cannot be written is counted and lost.

    Args:
        journal: Where they go.
        wall_clock_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(self, journal: Journal, wall_clock_ns: Callable[[], int]) -> None:
        self._journal = journal
        self._wall_clock_ns = wall_clock_ns
        self._waiting: list[bytes] = []
        """Each a serialised `ScorePair`."""
        self.recorded = 0
        """Pairs handed to the journal."""
        self.lost = 0
        """Pairs that could not be kept."""

    def add(self, pair: Pair) -> None:
        """A pair, to be written with the next flush."""
        if len(self._waiting) >= _MOST_WAITING:
            self.lost += 1
            return
        self._waiting.append(
            packet_pb2.ScorePair(
                decision_id=pair.decision_id,
                champion_version=pair.champion.version,
                challenger_version=pair.challenger.version,
                champion_score=pair.champion.score,
                challenger_score=pair.challenger.score,
                champion_trades=pair.champion.trades,
                challenger_trades=pair.challenger.trades,
                challenger_decided=pair.challenger_decided,
                challenger_us=int(pair.challenger_seconds * 1e6),
                recorded_at_ns=self._wall_clock_ns(),
            ).SerializeToString()
        )

    def add_together(self, pairs: Pairs) -> None:
        """The same for rows that were decided in columns. What they have in common is serialised once."""
        versions = packet_pb2.ScorePair(
            champion_version=pairs.champion_version, challenger_version=pairs.challenger_version
        ).SerializeToString()
        common = packet_pb2.ScorePair(
            challenger_decided=pairs.challenger_decided,
            challenger_us=int(pairs.challenger_seconds * 1e6),
            recorded_at_ns=self._wall_clock_ns(),
        ).SerializeToString()
        of_champion, of_challenger = _TAGS
        least, others_least = pairs.champion_threshold, pairs.challenger_threshold
        room = _MOST_WAITING - len(self._waiting)
        self.lost += max(0, len(pairs.decision_ids) - room)
        self._waiting += [
            b"%b%b%b%b%b"
            % (
                _OF_PAIR % prefixed(decision_id.encode()),
                versions,
                _SCORES.pack(of_champion, ours, of_challenger, theirs),
                _TRADES[ours >= least, theirs >= others_least],
                common,
            )
            for decision_id, ours, theirs in list(
                zip(pairs.decision_ids, pairs.champion_scores, pairs.challenger_scores, strict=True)
            )[:room]
        ]

    def flush(self, at_least: int = 1) -> None:
        """Hands what has gathered to the journal, as long as so many pairs wait."""
        while len(self._waiting) >= at_least:
            pairs, self._waiting = self._waiting[:MOST_IN_ENTRY], self._waiting[MOST_IN_ENTRY:]
            entry = _OF_ENTRY % prefixed(b"".join([_OF_PAIRS % prefixed(pair) for pair in pairs]))
            try:
                if self._journal.full or not self._journal.writable:  # decisions need what room there is
                    raise JournalFullError
                self._journal.append(entry)
            except JournalError:
                self.lost += len(pairs)
            else:
                self.recorded += len(pairs)
