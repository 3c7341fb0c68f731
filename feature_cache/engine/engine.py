"""Market events in, feature snapshots out: the one implementation for live, replay and training.

    engine = FeatureEngine("BTCUSDT.BINANCE")
    for event in session:                      # in the order in which the events were received
        engine.on_event(event)
        if time_to_decide:
            snapshot = engine.snapshot()       # as of the newest event, which is what a server sees
            row = snapshot.values              # float32[features of `mf1`], features.MF1.for_sell(row) for a sell

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

Time is event time, made monotonic by the rules of `market.py`.

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

from feature_cache.engine.market import Best, Market
from feature_cache.engine.windows import FlowWindow, LookBack, RealisedVariance, TradeReturns, TradeWindow
from feature_cache.features import MF1
from feature_cache.store.codec import BookState, FeatureSnapshot
from pretrade.market.v1 import market_pb2 as pb

_MS: Final = 1_000_000
_SECOND: Final = 1_000_000_000
_UNDEFINED: Final = np.full(len(MF1), math.nan, dtype=np.float32)
_UNDEFINED.flags.writeable = False


class FeatureEngine(Market):
    """Book, windows and features of one instrument.

    Args:
        instrument: `SYMBOL.VENUE`; an event of another one is an error.
    """

    @property
    def state(self) -> BookState:
        """What is known of the book."""
        best = self._best
        if best is None:
            return BookState.UNKNOWN
        return BookState.LOCKED if best[0] == best[2] else BookState.VALID

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

    def _start_windows(self, time_ns: int) -> None:
        super()._start_windows(time_ns)
        self._flow = (FlowWindow(_SECOND // 10), FlowWindow(_SECOND), FlowWindow(5 * _SECOND))
        self._trades = (TradeWindow(_SECOND), TradeWindow(5 * _SECOND))
        self._trade_returns = TradeReturns(50)
        self._start_mids()

    def _start_mids(self) -> None:
        self._mid: int | None = None
        self._look_back = (LookBack(_SECOND), LookBack(5 * _SECOND), LookBack(30 * _SECOND))
        self._variance = RealisedVariance(30 * _SECOND)

    def _on_trade(self, trade: pb.Trade) -> None:
        lots, side = trade.lots, trade.taker_side
        entry = (
            self._time_ns,
            lots if side == pb.TAKER_SIDE_BUY else 0,
            lots if side == pb.TAKER_SIDE_SELL else 0,
        )
        for window in self._trades:
            window.add(entry)
        self._trade_returns.add(trade.price_ticks)

    def _on_best(self, before: Best | None, best: Best | None) -> None:
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

    def _features(self, best: Best) -> list[float]:
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

    def _returns(self, best: Best, now: int) -> list[float]:
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


def order_flow(before: Best, after: Best) -> int:
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


def _level_one(best: Best) -> tuple[float, float, float]:
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
