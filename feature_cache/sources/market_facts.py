"""Statistics by which a market is told from a toy, of recorded and of simulated events, by the same code.

All times are those of receipt, on one clock. Returns are logarithmic, of the mid by previous tick, in basis points.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pretrade.market.v1 import market_pb2 as pb

Floats = NDArray[np.float64]

RECORDED_SECONDS: Final = 650.0
"""Length of the recorded session that the figures below are of; simulated ones are held against it at this length."""
RECORDED: Final = "BTCUSDT on Binance, 2024-08-08 23:54 to 2024-08-09 00:05 UTC"

_PHASES: Final = 10
"""Offsets of the grid over which a kurtosis and a variance ratio are averaged: each alone depends on the offset."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One statistic, what it was in the recorded session, and how far from there a simulated one may be."""

    name: str
    recorded: float
    tolerance: float
    """How far away it may be, or, for a `ratio`, how many times larger or smaller."""
    ratio: bool = False

    def met(self, value: float) -> bool:
        """Whether a value is close enough."""
        low, high = self.bounds
        return low <= value <= high

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value that is close enough."""
        if self.ratio:
            return self.recorded / self.tolerance, self.recorded * self.tolerance
        return self.recorded - self.tolerance, self.recorded + self.tolerance


FACTS: Final = (
    # One session holds one or two of the moves that make a kurtosis: that of 650 s is known to a factor.
    Fact("kurtosis of 100 ms returns", 268.0, 3.0, ratio=True),
    Fact("kurtosis of 1 s returns", 14.5, 3.0, ratio=True),
    Fact("variance ratio 30 s / 1 s", 1.08, 0.4),
    Fact("autocorrelation of signs, lag 1", 0.44, 0.05),
    Fact("autocorrelation of signs, lag 10", 0.19, 0.05),
    Fact("autocorrelation of signs, lag 50", 0.02, 0.055),
    Fact("Fano factor of trades in 1 s", 121.0, 2.0, ratio=True),
    Fact("trade size, q99.9 / median", 1082.0, 400.0),
    Fact("trades that empty the level", 0.18, 0.02),
    Fact("spread at one tick", 0.89, 0.04),
    Fact("response after 0.1 s, bp", 0.42, 0.15),
    Fact("response after 1 s, bp", 0.46, 0.25),
    Fact("response after 5 s, bp", 0.32, 0.5),
    Fact("response after 30 s, bp", -0.27, 1.4),
    Fact("P(next mid up | imbalance > 0.6)", 0.83, 0.035),
)
"""The acceptance table. A tolerance is at most about two standard errors of the recorded session itself, by a bootstrap
of blocks of 50 s. Exceptions: the ratios, as one session cannot tell how heavy its own tails are, and the spread, of
which the bootstrap knows nothing."""


@dataclass(frozen=True, slots=True)
class Tape:
    """Quotes and trades of one instrument, in the order of receipt; times in seconds."""

    quote_time: Floats
    bid: Floats
    bid_lots: Floats
    ask: Floats
    ask_lots: Floats
    trade_time: Floats
    order: Floats
    """The event time of each trade: one taker's order has one, and one side."""
    lots: Floats
    sign: Floats
    """1 where the taker bought, −1 where it sold."""

    @property
    def mid_bps(self) -> Floats:
        """The logarithm of the mid after each quote, in basis points."""
        found: Floats = np.log((self.bid + self.ask) / 2) * 1e4
        return found


def tape(events: Iterable[pb.MarketEvent]) -> Tape:
    """The tape of one instrument's events."""
    quotes: list[tuple[int, int, int, int, int]] = []
    trades: list[tuple[int, int, int, int]] = []
    for event in events:
        kind = event.WhichOneof("event")
        if kind == "quote":
            quote = event.quote
            row = event.receive_time_ns, quote.bid_ticks, quote.bid_lots, quote.ask_ticks, quote.ask_lots
            quotes.append(row)
        elif kind == "trade":
            trade = event.trade
            sign = 1 if trade.taker_side == pb.TAKER_SIDE_BUY else -1
            trades.append((event.receive_time_ns, event.event_time_ns, trade.lots, sign))
    if len(quotes) < 2 or len(trades) < 2:
        raise ValueError("no quotes or no trades: nothing to compute statistics of")
    start = min(quotes[0][0], trades[0][0])
    quoted, traded = np.array(quotes, dtype=np.int64), np.array(trades, dtype=np.int64)
    quoted[:, 0] -= start
    traded[:, :2] -= start
    q, t = quoted.astype(np.float64).T, traded.astype(np.float64).T
    return Tape(q[0] / 1e9, q[1], q[2], q[3], q[4], t[0] / 1e9, t[1], t[2], t[3])


def facts(of: Tape) -> dict[str, float]:
    """Every statistic of `FACTS`, by name.

    - A kurtosis is the excess over the normal distribution's, the mean of ten grids.
    - The variance ratio is Var(r over 30 s) / (30·Var(r over 1 s)) with overlapping returns, the mean of ten grids.
    - The signs are those of takers' orders: trades of one time and one side are one. Everything else is of trades.
    - The Fano factor is the variance of the number of trades in a second over its mean.
    - A trade empties the level when it is no smaller than the size at the best price before it.
    - A response is sign·(mid then − mid before the trade).
    - The imbalance is (bid − ask) / (bid + ask) at the best prices, after every quote.
    """
    orders = order_signs(of)
    values = [
        float(np.mean([kurtosis(np.diff(_grid(of, 0.1, phase))) for phase in range(_PHASES)])),
        float(np.mean([kurtosis(np.diff(_grid(of, 1.0, phase))) for phase in range(_PHASES)])),
        float(np.mean([variance_ratio(_grid(of, 1.0, phase), 30) for phase in range(_PHASES)])),
        *(autocorrelation(orders, lag) for lag in (1, 10, 50)),
        _fano(of),
        float(np.quantile(of.lots, 0.999) / np.median(of.lots)),
        _emptying(of),
        _one_tick(of),
        *(response(of, seconds) for seconds in (0.1, 1.0, 5.0, 30.0)),
        _follows_imbalance(of),
    ]
    return {fact.name: value for fact, value in zip(FACTS, values, strict=True)}


def medians(sessions: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each statistic over several sessions."""
    return {name: float(np.median([session[name] for session in sessions])) for name in sessions[0]}


def kurtosis(returns: Floats) -> float:
    """Excess kurtosis; nan where nothing moves."""
    centred = returns - returns.mean()
    variance = float(np.mean(centred**2))
    return float(np.mean(centred**4)) / variance**2 - 3 if variance > 0 else float("nan")


def variance_ratio(path: Floats, steps: int) -> float:
    """Variance of the moves over many steps, overlapping, over as many times that of one step; nan if too short."""
    if len(path) <= steps + 1:
        return float("nan")
    one = float(np.diff(path).var())
    return float((path[steps:] - path[:-steps]).var()) / steps / one if one > 0 else float("nan")


def autocorrelation(values: Floats, lag: int) -> float:
    """Correlation of a series with itself, so many places later; nan if too short."""
    if len(values) <= lag:
        return float("nan")
    centred = values - values.mean()
    return float(np.mean(centred[:-lag] * centred[lag:]) / np.mean(centred**2))


def order_signs(of: Tape) -> Floats:
    """The side of each taker's order, in their order."""
    begins = np.ones(len(of.sign), dtype=bool)
    begins[1:] = (np.diff(of.order) != 0) | (np.diff(of.sign) != 0)
    return of.sign[begins]


def response(of: Tape, seconds: float) -> float:
    """Mean move of the mid from before a trade to so long after it, in its direction; bp."""
    before = _quote_before(of)
    after = np.searchsorted(of.quote_time, of.trade_time + seconds, "right") - 1
    known = (before >= 0) & (of.trade_time + seconds <= of.quote_time[-1])
    mid = of.mid_bps
    return float(np.mean((of.sign * (mid[after] - mid[before]))[known])) if known.any() else float("nan")


def _grid(of: Tape, step: float, phase: int) -> Floats:
    times = np.arange(of.quote_time[0] + step * phase / _PHASES, of.quote_time[-1], step)
    return of.mid_bps[np.searchsorted(of.quote_time, times, "right") - 1]


def _fano(of: Tape) -> float:
    counts = np.bincount(of.trade_time.astype(np.int64))
    return float(counts.var() / counts.mean())


def _quote_before(of: Tape) -> NDArray[np.intp]:
    return np.searchsorted(of.quote_time, of.trade_time, "left") - 1


def _emptying(of: Tape) -> float:
    before = _quote_before(of)
    known = before >= 0
    offered = np.where(of.sign > 0, of.ask_lots[before], of.bid_lots[before])
    return float(np.mean((of.lots >= offered)[known]))


def _one_tick(of: Tape) -> float:
    spread = of.ask - of.bid
    return float(np.mean(spread == spread[spread > 0].min()))


def _follows_imbalance(of: Tape) -> float:
    mid = of.bid + of.ask
    changes = np.flatnonzero(np.diff(mid) != 0) + 1
    following = np.searchsorted(changes, np.arange(len(mid)), "right")
    known = following < len(changes)
    imbalance = (of.bid_lots - of.ask_lots) / (of.bid_lots + of.ask_lots)
    chosen = np.flatnonzero(known & (imbalance > 0.6))
    if not len(chosen):
        return float("nan")
    return float(np.mean(mid[changes[following[chosen]]] > mid[chosen]))
