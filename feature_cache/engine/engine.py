"""Market events in, feature snapshots out: the one implementation for live, replay and training.

    engine = FeatureEngine("BTCUSDT.BINANCE")
    for event in session:                      # in the order in which the events were received
        engine.on_event(event)
        if time_to_decide:
            snapshot = engine.snapshot()       # as of the newest event, which is what a server sees
            row = snapshot.values              # float32[N_FEATURES], features.for_sell(row) for a sell

Feature set `mf1`. Best bid (Pb, qb) and best ask (Pa, qa) are those of the newest of book and quote by update id; the
deeper levels come from the book as of its last delta. M = (Pa + Pb)/2, I = qb/(qb + qa), W = Pa·I + Pb·(1 − I)::

    spread_bps          1e4·(Pa − Pb)/M
    weighted_mid_bps    1e4·(W − M)/M
    imbalance_l{1,5,10} (Σbid − Σask)/(Σbid + Σask) over the first k levels
    ofi_w               Σ e_n / mean((qb_n + qa_n)/2) over the changes n of the best level in the window, 0 without one
                        e_n = 1{Pb_n ≥ Pb_n−1}·qb_n − 1{Pb_n ≤ Pb_n−1}·qb_n−1
                            − 1{Pa_n ≤ Pa_n−1}·qa_n + 1{Pa_n ≥ Pa_n−1}·qa_n−1
    trade_imbalance_w   (buy − sell)/(buy + sell) volume by taker side, 0 without a trade;  trade_rate_w  trades/s
    ret_w_bps           1e4·ln(M_t/M_t−w), M_t−w the last mid at or before t − w
    ret_mean_50 …       over the last 50 trade-price log returns, standard deviation with n − 1
    rv_w_bps            1e4·sqrt(Σ r²), r the log mid returns on a 100 ms grid by previous tick
    depth_l5_notional_* Σ price·size over the first 5 levels, quote currency
    book_age_ms, trade_age_ms   since the newest book or quote event, and the newest trade

A missing side has price ∓∞ and size 0 in e_n; everything else that needs it is undefined (NaN). While the book is
unknown, or the quote that replaces it is crossed, every feature is undefined. The first best level after that, or after
a start, gives no e_n. The mids begin anew: nobody knows where the mid was meanwhile, so ret_w and rv_w are undefined
until it has been known for the whole of w. Order flow and trades from before a gap stay in their windows.

Time is event time, made monotonic. Streams that interleave run slightly backwards, so the engine's time is the running
maximum, and an event counts at that time. Three rules limit the harm that a wrong clock can do:

* An event may be ahead of its feed, that is of receive time less the feed's smallest lag. If it is ahead by more than a
  second, it counts as one second ahead.
* An event may be behind the engine's time. If it is behind by more than ten seconds, the windows start anew and the
  book is unknown, because neither the book's age nor the order of the events still to come is known any more.
* A `BookReset` starts everything anew.

Age counts from event time: the time since publication, plus what the newest message took beyond the clock offset. The
offset is the feed's smallest recent lag, taken for at most `lag.MAX_OFFSET_NS`.

The sequence of a snapshot orders what different workers write about one instrument. It comes from the events alone: it
is the publish time of the newest event, or one more than the sequence before where that is higher. No worker's clock
matters. Two workers that read the same log agree as soon as both have read one event that was published later than all
before it. Offsets of the log would give an order as well, but they start again at 0 when a log is lost; publish times
go on. One case remains: the publisher's clock is set back by more than a new owner of the instrument reads again. The
former owner's vectors then stay in the store in place of the new ones until they expire.

Source of e_n: Cont, Kukanov, Stoikov, "The Price Impact of Order Book Events" (2014).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_cache.engine.book import EventError, OrderBook, check_delta, check_snapshot
from feature_cache.engine.lag import MAX_OFFSET_NS, MinimumLag
from feature_cache.engine.windows import FlowWindow, LookBack, RealisedVariance, TradeReturns, TradeWindow
from feature_cache.features import N_FEATURES
from feature_cache.store.codec import BookState, FeatureSnapshot
from pretrade.market.v1 import market_pb2 as pb

MAX_AHEAD_NS: Final = 1_000_000_000
"""How far an event may be ahead of its feed before it counts at that bound."""
MAX_BEHIND_NS: Final = 10_000_000_000
"""How far an event may be behind the engine's time before the windows start again."""

_MS: Final = 1_000_000
_SECOND: Final = 1_000_000_000
_MAX_DECIMALS: Final = 18
_LATEST_NS: Final = 1 << 62  # in the year 2116; sequences and differences of times stay within 64 bits
_NO_BID: Final = -(1 << 62)
_NO_ASK: Final = 1 << 62
_UNDEFINED: Final = np.full(N_FEATURES, math.nan, dtype=np.float32)
_UNDEFINED.flags.writeable = False

_Best = tuple[int, int, int, int]  # Pb, qb, Pa, qa


class FeatureEngine:
    """Book, windows and features of one instrument.

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
    def state(self) -> BookState:
        """What is known of the book."""
        best = self._best
        if best is None:
            return BookState.UNKNOWN
        return BookState.LOCKED if best[0] == best[2] else BookState.VALID

    @property
    def best(self) -> tuple[int, int, int, int] | None:
        """Best bid and its lots, best ask and its lots, in ticks; None while the book is unknown."""
        return self._best

    @property
    def time_ns(self) -> int:
        """Event time, made monotonic; see the module."""
        return self._time_ns

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
        self._sequence = max(self._sequence + 1, event.publish_time_ns)
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
        self._publish_time_ns = event.publish_time_ns
        return True

    def snapshot(self, at_ns: int | None = None) -> FeatureSnapshot:
        """The features as of `at_ns`.

        Args:
            at_ns: Event time, nanoseconds; the newest event's by default. An instant before that counts as that one; a
                later one moves the engine's time there.
        """
        if at_ns is not None and at_ns > self._time_ns:
            self._time_ns = at_ns
        best = self._best
        return self._with(_UNDEFINED if best is None else np.array(self._features(best), dtype=np.float32))

    def outline(self) -> FeatureSnapshot:
        """What `snapshot` says besides the features, which are undefined here: it takes a tenth of the time."""
        return self._with(_UNDEFINED)

    def _with(self, values: NDArray[np.float32]) -> FeatureSnapshot:
        best = self._best
        if best is None:
            bid = ask = math.nan
        else:
            price_bid, lots_bid, price_ask, lots_ask = best
            unit: int = 10**self._price_decimals
            bid = price_bid / unit if lots_bid else math.nan
            ask = price_ask / unit if lots_ask else math.nan
        return FeatureSnapshot(
            instrument=self.instrument,
            sequence=self._sequence,
            event_time_ns=self._time_ns,
            book_time_ns=self._book_time_ns,
            trade_time_ns=self._trade_time_ns,
            publish_time_ns=self._publish_time_ns,
            transit_ns=self._transit_ns,
            bid=bid,
            ask=ask,
            state=self.state,
            values=values,
        )

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
        self._quote: _Best = (_NO_BID, 0, _NO_ASK, 0)
        self._quote_id: int = 0
        self._trade_id: int = 0
        self._start_windows(time_ns)

    def _start_windows(self, time_ns: int) -> None:
        self._time_ns = time_ns
        self._trade_time_ns: int = 0
        self._best: _Best | None = None
        self._flow = (FlowWindow(_SECOND // 10), FlowWindow(_SECOND), FlowWindow(5 * _SECOND))
        self._trades = (TradeWindow(_SECOND), TradeWindow(5 * _SECOND))
        self._trade_returns = TradeReturns(50)
        self._start_mids()

    def _start_mids(self) -> None:
        self._mid: int | None = None
        self._look_back = (LookBack(_SECOND), LookBack(5 * _SECOND), LookBack(30 * _SECOND))
        self._variance = RealisedVariance(30 * _SECOND)

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
        lots, side = trade.lots, trade.taker_side
        entry = (
            self._time_ns,
            lots if side == pb.TAKER_SIDE_BUY else 0,
            lots if side == pb.TAKER_SIDE_SELL else 0,
        )
        for window in self._trades:
            window.add(entry)
        self._trade_returns.add(trade.price_ticks)

    def _update_best(self) -> None:
        """Takes the newer of book and quote as the best level, and its change into the windows."""
        best = self._newest_best()
        before = self._best
        if best == before:
            return
        self._best = best
        if best is None:
            # Else the time without a book would count as one without a return, and its end as a single jump.
            self._start_mids()
            return
        if before is not None:
            entry = (self._time_ns, order_flow(before, best), best[1] + best[3])
            for window in self._flow:
                window.add(entry)
        if best[1] and best[3]:
            mid = best[0] + best[2]
            if mid != self._mid:
                self._mid = mid
                for look_back in self._look_back:
                    look_back.add((self._time_ns, mid))
                self._variance.add(self._time_ns, mid)

    def _newest_best(self) -> _Best | None:
        book = self.book
        if not book.valid:
            return None
        if self._quote_id > book.last_update_id:
            best = self._quote
        else:
            bid, ask = book.bids.best(), book.asks.best()
            best = (*(bid or (_NO_BID, 0)), *(ask or (_NO_ASK, 0)))
        return None if best[0] > best[2] else best

    def _features(self, best: _Best) -> list[float]:
        now = self._time_ns
        return [
            *_level_one(best),
            *self._depth_imbalances(),
            *(window.value(now) for window in self._flow),
            *(window.imbalance(now) for window in self._trades),
            *(window.rate(now) for window in self._trades),
            *self._returns(best, now),
            *self._trade_returns.moments(),
            *(1e4 * math.sqrt(self._variance.sum(width, now)) for width in (_SECOND, 5 * _SECOND, 30 * _SECOND)),
            *self._notionals(),
            (now - self._book_time_ns) / _MS,
            (now - self._trade_time_ns) / _MS if self._trade_time_ns else math.nan,
        ]

    def _depth_imbalances(self) -> tuple[float, float]:
        bids, asks = self.book.bids.top(10), self.book.asks.top(10)
        if not bids or not asks:
            return math.nan, math.nan
        bid5, ask5 = sum(lots for _, lots in bids[:5]), sum(lots for _, lots in asks[:5])
        bid10, ask10 = bid5 + sum(lots for _, lots in bids[5:]), ask5 + sum(lots for _, lots in asks[5:])
        return (bid5 - ask5) / (bid5 + ask5), (bid10 - ask10) / (bid10 + ask10)

    def _returns(self, best: _Best, now: int) -> list[float]:
        if not (best[1] and best[3]):
            return [math.nan] * len(self._look_back)
        mid = best[0] + best[2]
        past = (look_back.mid(now) for look_back in self._look_back)
        return [math.nan if base is None else 1e4 * math.log(mid / base) for base in past]

    def _notionals(self) -> tuple[float, float]:
        unit: int = 10 ** (self._price_decimals + self._size_decimals)
        bids, asks = self.book.bids.top(5), self.book.asks.top(5)
        return (
            sum(ticks * lots for ticks, lots in bids) / unit if bids else math.nan,
            sum(ticks * lots for ticks, lots in asks) / unit if asks else math.nan,
        )


def order_flow(before: _Best, after: _Best) -> int:
    """e_n of one change of the best level (Pb, qb, Pa, qa), in lots."""
    bid0, bid_lots0, ask0, ask_lots0 = before
    bid1, bid_lots1, ask1, ask_lots1 = after
    flow = 0
    if bid1 >= bid0:
        flow += bid_lots1
    if bid1 <= bid0:
        flow -= bid_lots0
    if ask1 <= ask0:
        flow -= ask_lots1
    if ask1 >= ask0:
        flow += ask_lots0
    return flow


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


def _level_one(best: _Best) -> tuple[float, float, float]:
    """spread_bps, weighted_mid_bps, imbalance_l1; NaN when a side is missing."""
    bid, bid_lots, ask, ask_lots = best
    if not (bid_lots and ask_lots):
        return math.nan, math.nan, math.nan
    twice_mid, spread, depth = bid + ask, ask - bid, bid_lots + ask_lots
    # W − M = (Pa − Pb)(I − 1/2), so that nothing large cancels.
    return (
        2e4 * spread / twice_mid,
        1e4 * spread * (bid_lots - ask_lots) / depth / twice_mid,
        (bid_lots - ask_lots) / depth,
    )
