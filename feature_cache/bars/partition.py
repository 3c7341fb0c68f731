"""The bars of the instruments of one partition, and from where the log would have to be read to make them again."""

from __future__ import annotations

from collections import deque
from typing import Final

from google.protobuf.message import DecodeError

from feature_cache.bars.bar import INTERVALS, Bar
from feature_cache.bars.maker import BarMaker
from feature_cache.engine.book import EventError
from pretrade.market.v1 import market_pb2 as pb

LEAD_NS: Final = max(INTERVALS.values())
"""Event time between two marks: a longest bar."""


class Partition:
    """Records in, bars out.

    Args:
        offset: Of the first record that will be taken.
    """

    def __init__(self, offset: int) -> None:
        self._makers: dict[str, BarMaker] = {}
        self._marks: deque[int] = deque([offset], maxlen=3)
        self._next_mark_ns = 0
        self.ended: list[Bar] = []
        """Bars that have ended and are not written yet."""
        self.refused = 0
        """Records that are no sound market event. The feature worker sends them to its dead letters."""

    @property
    def read_again_from(self) -> int:
        """Offset from which every bar that has not ended is made again, whole and with a known book.

        It lies two to three longest bars back. The bars under way may begin one before the newest event, where an
        instrument is late; the one before those is for the book to become known.
        """
        return self._marks[0]

    def take(self, offset: int, value: bytes | None) -> None:
        """Takes one record in; one that is refused changes nothing."""
        try:
            event = pb.MarketEvent.FromString(value or b"")
            maker = self._makers.get(event.instrument) or BarMaker(event.instrument, self.ended.append)
            maker.on_event(event)
        except (DecodeError, EventError):
            self.refused += 1
            return
        self._makers[event.instrument] = maker
        if maker.time_ns >= self._next_mark_ns:
            self._marks.append(offset)
            self._next_mark_ns = maker.time_ns - maker.time_ns % LEAD_NS + LEAD_NS
