"""What the events of one instrument say of its market: event time, order book, best level, trades.

`Market` decides what an event counts for and when. What follows a market derives from it and says what it makes of a
trade and of a new best level: `FeatureEngine` makes features, `bars.BarMaker` makes bars. So all of them agree.

Time is event time, made monotonic. Streams that interleave run slightly backwards, so the engine's time is the running
maximum, and an event counts at that time. Three rules limit the harm that a wrong clock can do:

* An event may be ahead of its feed, that is of receive time less the feed's smallest lag. If it is ahead by more than a
  second, it counts as one second ahead.
* An event may be behind the engine's time. If it is behind by more than ten seconds, the windows start anew and the
  book is unknown, because neither the book's age nor the order of the events still to come is known any more.
* A `BookReset` starts everything anew.
"""

from __future__ import annotations

from typing import Final

from feature_cache.engine.book import EventError, Levels, OrderBook, check_delta, check_snapshot
from feature_cache.engine.lag import MAX_OFFSET_NS, MinimumLag
from pretrade.market.v1 import market_pb2 as pb

MAX_AHEAD_NS: Final = 1_000_000_000
"""How far an event may be ahead of its feed before it counts at that bound."""
MAX_BEHIND_NS: Final = 10_000_000_000
"""How far an event may be behind the engine's time before the windows start again."""

_MAX_DECIMALS: Final = 18
_LATEST_NS: Final = 1 << 62  # in the year 2116; sequences and differences of times stay within 64 bits
_NO_BID: Final = -(1 << 62)
_NO_ASK: Final = 1 << 62

Best = tuple[int, int, int, int]
"""Best bid Pb in ticks, its lots qb, best ask Pa, its lots qa. A side that is missing has no lots."""


class Market:
    """Book, best level and time of one instrument.

    Args:
        instrument: `SYMBOL.VENUE`; an event of another one is an error.
    """

    def __init__(self, instrument: str) -> None:
        self.instrument = instrument
        self.book = OrderBook()
        self.events = 0
        """Events taken in, stale ones included."""
        self.stale = 0
        """Quotes, trades and deltas not newer than the last of their kind, and snapshots older than the book."""
        self.future = 0
        """Events too far ahead of their feed."""
        self.time_restarts = 0
        """Times that the windows started again and the book became unknown because event time had run back too far."""
        self.resets = 0
        """`BookReset` events."""
        self._sequence = 0
        self._price_decimals = -1
        self._size_decimals = -1
        self._publish_time_ns = 0
        self._time_ns = 0
        self._start_anew(0, "no snapshot yet")

    @property
    def unknown_because(self) -> str:
        """Why nothing may be decided on the book, for people; empty while something may."""
        if self._best is not None:
            return ""
        return "crossed quote" if self.book.valid else self.book.unknown_because

    @property
    def best(self) -> tuple[int, int, int, int] | None:
        """Best bid and its lots, best ask and its lots, in ticks; None while the book is unknown."""
        return self._best

    @property
    def time_ns(self) -> int:
        """Event time, made monotonic; see the module."""
        return self._time_ns

    def depth(self, levels: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """The best levels of the book, bids and asks, each best first; empty while the book is unknown.

        A level is its price in the quote currency and its size in units of the base.
        """
        if not self.book.valid:
            return [], []
        price, size = 10**self._price_decimals, 10**self._size_decimals

        def of(side: Levels) -> list[tuple[float, float]]:
            return [(ticks / price, lots / size) for ticks, lots in side.top(levels)]

        return of(self.book.bids), of(self.book.asks)

    def age_seconds(self, now_ns: int) -> float:
        """Age of the newest event at the wall-clock instant `now_ns`, as `FeatureSnapshot.age_seconds`."""
        return max(0, now_ns - self._publish_time_ns + self._transit_ns) / 1e9

    def on_event(self, event: pb.MarketEvent) -> bool:
        """Takes one event in.

        Returns:
            False if it was stale, so that nothing but the counts has changed.

        Raises:
            EventError: The event breaks the contract; the state is as before.
        """
        kind = event.WhichOneof("event")
        self._check(event, kind)
        self.events += 1
        # Stale events count too: what is stale depends on where the reading began, which owners differ in.
        publish_ns, next_one = event.publish_time_ns, self._sequence + 1
        self._sequence = publish_ns if publish_ns > next_one else next_one
        if kind == "quote":
            if event.quote.update_id <= self._quote_id:
                self.stale += 1
                return False
            self._take_time(event)
            self._take_quote(event.quote)
        elif kind == "delta":
            if self.book.valid and event.delta.last_update_id <= self.book.last_update_id:
                self.stale += 1
                return False
            self._take_time(event)
            if self.book.apply_delta(event.delta):
                self._update_best()
                self._book_time_ns = self._time_ns
        elif kind == "trade":
            if event.trade.trade_id <= self._trade_id:
                self.stale += 1
                return False
            self._take_time(event)
            self._take_trade(event.trade)
        elif kind == "snapshot":
            if self.book.valid and event.snapshot.last_update_id <= self.book.last_update_id:
                # Feeds repeat what is known so that others can begin there; only an older one is worth counting.
                self.stale += event.snapshot.last_update_id < self.book.last_update_id
                return False
            self._take_time(event)
            if self.book.apply_snapshot(event.snapshot):
                self._update_best()
                self._book_time_ns = self._time_ns
        else:
            self.resets += 1
            self._start_anew(event.event_time_ns, event.reset.reason or "reset")
        self._publish_time_ns = publish_ns
        return True

    def _check(self, event: pb.MarketEvent, kind: str | None) -> None:
        if event.instrument != self.instrument:
            raise EventError("instrument", f"is {event.instrument!r}, expected {self.instrument!r}")
        if not 0 < event.event_time_ns <= _LATEST_NS:
            raise EventError("event_time_ns", f"{event.event_time_ns} must be positive, and at most {_LATEST_NS}")
        if not 0 < event.receive_time_ns <= _LATEST_NS:
            raise EventError("receive_time_ns", f"{event.receive_time_ns} must be positive, and at most {_LATEST_NS}")
        if event.publish_time_ns > _LATEST_NS:
            raise EventError("publish_time_ns", f"{event.publish_time_ns} must be at most {_LATEST_NS}")
        if kind == "quote":
            check_quote(event.quote)
        elif kind == "delta":
            check_delta(event.delta)
        elif kind == "trade":
            check_trade(event.trade)
        elif kind == "snapshot":
            check_snapshot(event.snapshot)
        elif kind == "reset":
            return
        else:
            raise EventError("event", "is not set")
        if event.price_decimals != self._price_decimals or event.size_decimals != self._size_decimals:
            self._take_decimals(event)

    def _take_decimals(self, event: pb.MarketEvent) -> None:
        if self._price_decimals >= 0:
            raise EventError("price_decimals", "and size_decimals must not change without a reset")
        if event.price_decimals > _MAX_DECIMALS:
            raise EventError("price_decimals", f"{event.price_decimals} must be at most {_MAX_DECIMALS}")
        if event.size_decimals > _MAX_DECIMALS:
            raise EventError("size_decimals", f"{event.size_decimals} must be at most {_MAX_DECIMALS}")
        self._price_decimals = event.price_decimals
        self._size_decimals = event.size_decimals

    def _start_anew(self, time_ns: int, reason: str) -> None:
        self.book.reset(reason)
        self._price_decimals = self._size_decimals = -1
        self._lag = MinimumLag()
        self._transit_ns = 0
        self._book_time_ns = 0
        self._quote: Best = (_NO_BID, 0, _NO_ASK, 0)
        self._quote_id: int = 0
        self._trade_id: int = 0
        self._start_windows(time_ns)

    def _start_windows(self, time_ns: int) -> None:
        """Forgets everything but the book: the beginning, and whenever event time has run back too far."""
        self._time_ns = time_ns
        self._trade_time_ns: int = 0
        self._best: Best | None = None

    def _on_trade(self, trade: pb.Trade) -> None:
        """Called with each trade that is new; `_time_ns` is when it counts."""

    def _on_best(self, before: Best | None, best: Best | None) -> None:
        """Called with each change of the best level; None while the book is unknown."""

    def _take_time(self, event: pb.MarketEvent) -> None:
        time_ns = event.event_time_ns
        receive_ns = event.receive_time_ns
        smallest = self._lag.at(receive_ns)
        if smallest is not None and time_ns > receive_ns - smallest + MAX_AHEAD_NS:
            self.future += 1
            time_ns = receive_ns - smallest + MAX_AHEAD_NS
        elif not event.event_time_estimated:
            # An estimated time says nothing about the transit; the last message that had one does.
            offset = min(self._lag.observe(receive_ns, time_ns), MAX_OFFSET_NS)
            self._transit_ns = receive_ns - time_ns - offset
        if time_ns > self._time_ns:
            self._time_ns = time_ns
        elif time_ns < self._time_ns - MAX_BEHIND_NS:
            self.time_restarts += 1
            self.book.reset("time ran back")
            self._book_time_ns = 0
            self._start_windows(time_ns)

    def _take_quote(self, quote: pb.Quote) -> None:
        self._quote_id = quote.update_id
        bid_lots, ask_lots = quote.bid_lots, quote.ask_lots
        self._quote = (
            quote.bid_ticks if bid_lots else _NO_BID,
            bid_lots,
            quote.ask_ticks if ask_lots else _NO_ASK,
            ask_lots,
        )
        self._book_time_ns = self._time_ns
        self._update_best()

    def _take_trade(self, trade: pb.Trade) -> None:
        self._trade_id = trade.trade_id
        self._trade_time_ns = self._time_ns
        self._on_trade(trade)

    def _update_best(self) -> None:
        """Takes the newer of book and quote as the best level."""
        best = self._newest_best()
        before = self._best
        if best != before:
            self._best = best
            self._on_best(before, best)

    def _newest_best(self) -> Best | None:
        book = self.book
        if not book.valid:
            return None
        if self._quote_id > book.last_update_id:
            best = self._quote
        else:
            bid, ask = book.bids.best(), book.asks.best()
            best = (*(bid or (_NO_BID, 0)), *(ask or (_NO_ASK, 0)))
        return None if best[0] > best[2] else best


def check_quote(quote: pb.Quote) -> None:
    """Raises EventError when a quote breaks the contract."""
    if quote.update_id <= 0:
        raise EventError("quote.update_id", f"{quote.update_id} must be positive")
    for side, ticks, lots in (("bid", quote.bid_ticks, quote.bid_lots), ("ask", quote.ask_ticks, quote.ask_lots)):
        if lots < 0:
            raise EventError(f"quote.{side}_lots", f"{lots} must not be negative")
        if lots and ticks <= 0:
            raise EventError(f"quote.{side}_ticks", f"{ticks} must be positive")


def check_trade(trade: pb.Trade) -> None:
    """Raises EventError when a trade breaks the contract."""
    if trade.trade_id <= 0:
        raise EventError("trade.trade_id", f"{trade.trade_id} must be positive")
    if trade.price_ticks <= 0:
        raise EventError("trade.price_ticks", f"{trade.price_ticks} must be positive")
    if trade.lots <= 0:
        raise EventError("trade.lots", f"{trade.lots} must be positive")
