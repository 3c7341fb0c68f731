"""Records the scores of champion and challenger for the same rows: in the audit journal, and from there in SQL."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pretrade.audit.v1 import packet_pb2
from server.errors import JournalError, JournalFullError

if TYPE_CHECKING:
    from server.inference.shadow import Pair
    from server.journal.journal import Journal

_MOST_IN_ENTRY: Final = 256
_MOST_WAITING: Final = 4_096


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
        self._waiting: list[packet_pb2.ScorePair] = []
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
            )
        )

    def flush(self) -> None:
        """Hands what has gathered to the journal."""
        while self._waiting:
            pairs, self._waiting = self._waiting[:_MOST_IN_ENTRY], self._waiting[_MOST_IN_ENTRY:]
            entry = packet_pb2.JournalEntry(score_pairs=packet_pb2.ScorePairs(pairs=pairs)).SerializeToString()
            try:
                if self._journal.full or not self._journal.writable:  # decisions need what room there is
                    raise JournalFullError
                self._journal.append(entry)
            except JournalError:
                self.lost += len(pairs)
            else:
                self.recorded += len(pairs)
