"""The features of `mf1` directly from their definitions, over the full list of events: slow, but obviously right.

    history = History(events)
    history.features(i)           # after event i, as of its time: float64[N_FEATURES]
    history.features(i, now_ns)   # after event i, as of a later instant

The walk stores everything: after every event the time, the best level and the deeper ones, and whole series of mids,
order flows and trades. Each feature is then computed from these series, over all that lies in its window. Nothing is
shared with the engine but the messages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_cache import features
from pretrade.market.v1 import market_pb2 as pb

MS: Final = 1_000_000
SECOND: Final = 1000 * MS
Levels = list[tuple[int, int]]
Best = tuple[float, int, float, int]


class Series:
    """Rows (index of the event, time, values …), in order of both."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, ...]] = []
        self._keys: NDArray[np.int64] = np.empty((0, 2), np.int64)
        self._values: NDArray[np.float64] = np.empty((0, 0))

    def _build(self) -> None:
        if len(self._keys) != len(self.rows):
            self._keys = np.array([row[:2] for row in self.rows], np.int64).reshape(-1, 2)
            self._values = np.array([row[2:] for row in self.rows], np.float64)

    def until(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """(times, values) of what came with or before an event."""
        self._build()
        count = int(np.searchsorted(self._keys[:, 0], index, side="right"))
        return self._keys[:count, 1], self._values[:count]

    def inside(self, index: int, now: int, width: int) -> NDArray[np.float64]:
        """Values of those in (now − width, now]."""
        times, values = self.until(index)
        return values[int(np.searchsorted(times, now - width, side="right")) :]


@dataclass
class Windows:
    """What the windows see: all since the last reset, or since time last ran far back; mids since the last gap."""

    mids: Series = field(default_factory=Series)
    flows: Series = field(default_factory=Series)
    trades: Series = field(default_factory=Series)


@dataclass(frozen=True)
class State:
    """After one event."""

    time: int
    best: Best | None
    bids: Levels
    asks: Levels
    book_time: int
    trade_time: int
    windows: Windows
    decimals: int


class History:
    def __init__(self, events: list[pb.MarketEvent]) -> None:
        self.states: list[State] = []
        self._decimals = 0
        self._start(0)
        for index, event in enumerate(events):
            before = self.states[-1].best if self.states else None
            if event.HasField("reset"):
                self._start(event.event_time_ns)
            elif not self._is_old(event):
                ran_back = self._take_time(event)
                self._take(event, index)
                self._follow_best(None if ran_back else before, index)
            self.states.append(
                State(
                    self._time,
                    self._best(),
                    *self._top,
                    self._book_time,
                    self._trade_time,
                    self._windows,
                    self._decimals,
                )
            )

    # The walk. --------------------------------------------------------------------------------------------------------

    def _start(self, time: int) -> None:
        self._time = time
        self._windows = Windows()
        self._known = False
        self._waiting: list[pb.BookDelta] = []
        self._bids: dict[int, int] = {}
        self._asks: dict[int, int] = {}
        self._top: tuple[Levels, Levels] = ([], [])
        self._book_id = self._trade_id = self._book_time = self._trade_time = 0
        self._quote = pb.Quote()
        self._least_lag: dict[int, int] = {}

    def _is_old(self, event: pb.MarketEvent) -> bool:
        if event.HasField("quote"):
            return event.quote.update_id <= self._quote.update_id
        if event.HasField("trade"):
            return event.trade.trade_id <= self._trade_id
        changed = event.delta if event.HasField("delta") else event.snapshot
        return self._known and changed.last_update_id <= self._book_id

    def _take_time(self, event: pb.MarketEvent) -> bool:
        """Time never runs back, but for more than 10 s; and is never more than 1 s ahead of the feed.

        Returns:
            Whether it ran back: the windows begin anew, and the book is unknown.
        """
        time, received = event.event_time_ns, event.receive_time_ns
        minute = received // (60 * SECOND)
        lags = [self._least_lag[at] for at in (minute - 1, minute) if at in self._least_lag]
        if lags and time > received - min(lags) + SECOND:
            time = received - min(lags) + SECOND
        elif not event.event_time_estimated:
            self._least_lag[minute] = min(received - time, self._least_lag.get(minute, received - time))
        ran_back = time < self._time - 10 * SECOND
        if ran_back:
            self._windows = Windows()
            self._known, self._waiting = False, []
            self._time, self._trade_time = time, 0
        self._time = max(self._time, time)
        return ran_back

    def _take(self, event: pb.MarketEvent, index: int) -> None:
        self._decimals = event.price_decimals + event.size_decimals
        if event.HasField("trade"):
            trade = event.trade
            self._trade_id, self._trade_time = trade.trade_id, self._time
            bought = trade.lots if trade.taker_side == pb.TAKER_SIDE_BUY else 0
            sold = trade.lots if trade.taker_side == pb.TAKER_SIDE_SELL else 0
            self._windows.trades.rows.append((index, self._time, trade.price_ticks, bought, sold))
        elif event.HasField("quote"):
            self._quote, self._book_time = event.quote, self._time
        elif event.HasField("snapshot"):
            self._take_snapshot(event.snapshot)
        else:
            self._take_delta(event.delta)

    def _take_snapshot(self, snapshot: pb.BookSnapshot) -> None:
        waiting = [delta for delta in self._waiting if delta.last_update_id > snapshot.last_update_id]
        if waiting and waiting[0].first_update_id > snapshot.last_update_id + 1:
            return
        self._known, self._waiting = True, []
        self._bids = dict(zip(snapshot.bid_ticks, snapshot.bid_lots, strict=True))
        self._asks = dict(zip(snapshot.ask_ticks, snapshot.ask_lots, strict=True))
        self._book_id, self._book_time = snapshot.last_update_id, self._time
        self._sort()
        for delta in waiting:
            self._take_delta(delta)

    def _take_delta(self, delta: pb.BookDelta) -> None:
        if not self._known:
            self._waiting.append(delta)
            return
        self._book_time = self._time
        if delta.first_update_id > self._book_id + 1:
            self._known, self._waiting = False, [delta]
            return
        self._bids.update(zip(delta.bid_ticks, delta.bid_lots, strict=True))
        self._asks.update(zip(delta.ask_ticks, delta.ask_lots, strict=True))
        self._book_id = delta.last_update_id
        self._sort()

    def _sort(self) -> None:
        bids = sorted(((price, lots) for price, lots in self._bids.items() if lots), reverse=True)[:10]
        asks = sorted((price, lots) for price, lots in self._asks.items() if lots)[:10]
        self._top = (bids, asks)
        if bids and asks and bids[0][0] > asks[0][0]:
            self._known, self._waiting = False, []

    def _best(self) -> Best | None:
        """The newer of book and quote; a missing side is a price of ∓∞ and size 0."""
        if not self._known:
            return None
        bids, asks = self._top
        bid, bid_lots, ask, ask_lots = (*(bids or [(0, 0)])[0], *(asks or [(0, 0)])[0])
        if self._quote.update_id > self._book_id:
            quote = self._quote
            bid, bid_lots, ask, ask_lots = quote.bid_ticks, quote.bid_lots, quote.ask_ticks, quote.ask_lots
        best = (bid if bid_lots else -math.inf, bid_lots, ask if ask_lots else math.inf, ask_lots)
        return None if best[0] > best[2] else best

    def _follow_best(self, before: Best | None, index: int) -> None:
        best = self._best()
        if best is None:
            self._windows = Windows(flows=self._windows.flows, trades=self._windows.trades)
            return
        pb1, qb1, pa1, qa1 = best
        if before is not None and before != best:
            pb0, qb0, pa0, qa0 = before
            e = (pb1 >= pb0) * qb1 - (pb1 <= pb0) * qb0 - (pa1 <= pa0) * qa1 + (pa1 >= pa0) * qa0
            self._windows.flows.rows.append((index, self._time, e, (qb1 + qa1) / 2))
        if qb1 and qa1:
            self._windows.mids.rows.append((index, self._time, (pb1 + pa1) / 2))

    # The definitions. -------------------------------------------------------------------------------------------------

    def features(self, index: int, now: int | None = None) -> NDArray[np.float64]:
        state = self.states[index]
        now = state.time if now is None else now
        out = np.full(features.N_FEATURES, np.nan)
        if state.best is None:
            return out
        named = {
            **_of_levels(state, state.best),
            **_of_flows(state, index, now),
            **_of_trades(state, index, now),
            **_of_mids(state, index, now),
            "book_age_ms": (now - state.book_time) / MS,
        }
        if state.trade_time:
            named["trade_age_ms"] = (now - state.trade_time) / MS
        for name, value in named.items():
            out[features.INDEX[name]] = value
        return out


def _of_levels(state: State, best: Best) -> dict[str, float]:
    out: dict[str, float] = {}
    bid, bid_lots, ask, ask_lots = best
    if bid_lots and ask_lots:
        mid = (bid + ask) / 2
        share = bid_lots / (bid_lots + ask_lots)
        weighted = ask * share + bid * (1 - share)
        out["spread_bps"] = 1e4 * (ask - bid) / mid
        out["weighted_mid_bps"] = 1e4 * (weighted - mid) / mid
        out["imbalance_l1"] = (bid_lots - ask_lots) / (bid_lots + ask_lots)
    if state.bids and state.asks:
        for k in (5, 10):
            b, a = sum(lots for _, lots in state.bids[:k]), sum(lots for _, lots in state.asks[:k])
            out[f"imbalance_l{k}"] = (b - a) / (b + a)
    for side, levels in (("bid", state.bids), ("ask", state.asks)):
        if levels:
            out[f"depth_l5_notional_{side}"] = sum(p * q for p, q in levels[:5]) / 10**state.decimals
    return out


def _of_flows(state: State, index: int, now: int) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, width in (("100ms", 100 * MS), ("1s", SECOND), ("5s", 5 * SECOND)):
        inside = state.windows.flows.inside(index, now, width)
        if not len(inside):
            out[f"ofi_{name}"] = 0.0
        elif inside[:, 1].any():
            out[f"ofi_{name}"] = inside[:, 0].sum() / inside[:, 1].mean()
    return out


def _of_trades(state: State, index: int, now: int) -> dict[str, float]:
    out: dict[str, float] = {}
    for seconds in (1, 5):
        inside = state.windows.trades.inside(index, now, seconds * SECOND)
        _, bought, sold = inside.sum(axis=0) if len(inside) else (0, 0, 0)
        out[f"trade_imbalance_{seconds}s"] = (bought - sold) / (bought + sold) if bought + sold else 0.0
        out[f"trade_rate_{seconds}s"] = len(inside) / seconds
    _, trades = state.windows.trades.until(index)
    returns = np.diff(np.log(trades[-51:, 0])) if len(trades) else np.empty(0)
    out["n_50"] = len(returns)
    if len(returns):
        out["ret_mean_50"] = returns.mean()
    if len(returns) > 1:
        out["ret_std_50"] = returns.std(ddof=1)
    return out


def _of_mids(state: State, index: int, now: int) -> dict[str, float]:
    out: dict[str, float] = {}
    times, mids = state.windows.mids.until(index)
    if not len(times):
        return out

    def mid_at(instants: NDArray[np.int64]) -> NDArray[np.float64]:
        """The last mid at or before each instant; NaN before the first."""
        place = np.searchsorted(times, instants, side="right")
        return np.where(place > 0, mids[place - 1, 0], np.nan)

    assert state.best is not None
    bid, bid_lots, ask, ask_lots = state.best
    grid = 100 * MS
    for seconds in (1, 5, 30):
        width = seconds * SECOND
        if bid_lots and ask_lots:
            past = mid_at(np.array([now - width]))[0]
            out[f"ret_{seconds}s_bps"] = 1e4 * math.log((bid + ask) / 2 / past)
        ends = np.arange((now - width) // grid + 1, now // grid + 1) * grid
        assert len(ends) == seconds * 10
        returns = np.log(mid_at(ends) / mid_at(ends - grid))
        out[f"rv_{seconds}s_bps"] = 1e4 * math.sqrt(np.square(returns).sum())
    return out
