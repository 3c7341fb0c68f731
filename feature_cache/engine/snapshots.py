"""Maintains books from a stream of events, and makes snapshots of them so that a reader can begin anywhere."""

from __future__ import annotations

from typing import Final

from feature_cache.engine.book import OrderBook
from pretrade.market.v1 import market_pb2 as pb

INTERVAL_NS: Final = 10_000_000_000


class Snapshots:
    """Follows the books of every instrument and makes a snapshot of each now and then.

    Args:
        interval_ns: How much event time passes between two snapshots of a book, the feed's own included.
    """

    def __init__(self, interval_ns: int = INTERVAL_NS) -> None:
        self.books: dict[str, OrderBook] = {}
        """By instrument, as of the last event."""
        self._interval_ns = interval_ns
        self._due_ns: dict[str, int] = {}

    def after(self, event: pb.MarketEvent) -> pb.MarketEvent | None:
        """Takes the next event in; returns the snapshot that is due after it, at the same times."""
        kind = event.WhichOneof("event")
        book = self.books.setdefault(event.instrument, OrderBook())
        if kind == "snapshot":
            if book.apply_snapshot(event.snapshot):
                self._due_ns[event.instrument] = event.event_time_ns + self._interval_ns
        elif kind == "delta":
            book.apply_delta(event.delta)
            if book.valid and event.event_time_ns >= self._due_ns[event.instrument]:
                self._due_ns[event.instrument] = event.event_time_ns + self._interval_ns
                snapshot = sibling(event)
                snapshot.snapshot.CopyFrom(book.to_snapshot())
                return snapshot
        elif kind == "reset":
            book.reset()
        return None


def sibling(event: pb.MarketEvent) -> pb.MarketEvent:
    """An event of the same instrument and times, without a body."""
    return pb.MarketEvent(
        instrument=event.instrument,
        price_decimals=event.price_decimals,
        size_decimals=event.size_decimals,
        event_time_ns=event.event_time_ns,
        receive_time_ns=event.receive_time_ns,
        event_time_estimated=event.event_time_estimated,
    )
