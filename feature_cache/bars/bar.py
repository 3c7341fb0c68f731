"""What a bar is.

A bar of an interval w holds what happened in [start, start + w) of event time; starts are whole multiples of w since
the Unix epoch. Prices are ticks and sizes are lots, as the venue sends them: every sum is exact, and a bar that is made
twice is the same twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from fractions import Fraction
from typing import Final

SECOND_NS: Final = 1_000_000_000
INTERVALS: Final = {"1s": SECOND_NS, "10s": 10 * SECOND_NS, "1m": 60 * SECOND_NS, "5m": 300 * SECOND_NS}
"""Nanoseconds by the name that people use; each is a multiple of the one before."""
INTERVAL_NAMES: Final = {width: name for name, width in INTERVALS.items()}


class Lacks(IntFlag):
    """What a bar cannot say; a greater number is the worse bar."""

    NOTHING = 0
    MID = 1
    """For part of it the book was unknown, or had one side only: the mid's prices are of the rest."""
    CONTINUITY = 2
    """The feed lost continuity in it: trades may be missing."""
    BEGINNING = 4
    """What was before is not known: the reading began in it, or again after a pause that is too long to fill."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar. Without a trade it has no trade prices; without a known mid, none of the mid."""

    instrument: str
    start_ns: int
    """Event time, nanoseconds since the Unix epoch."""
    width_ns: int
    price_decimals: int
    """Price = ticks / 10^price_decimals."""
    size_decimals: int
    """Size = lots / 10^size_decimals."""
    open: int | None
    """Price of the first trade in ticks; None without a trade."""
    high: int | None
    low: int | None
    close: int | None
    trades: int
    """How many trades."""
    bought: int
    """Lots that buyers took."""
    sold: int
    """Lots that sellers took."""
    lots: int
    """All lots, those of an unknown side included."""
    notional: int
    """Σ ticks·lots."""
    mid_open: int | None
    """Twice the mid in ticks at the start; where that is not known, the first one known in the bar."""
    mid_high: int | None
    mid_low: int | None
    mid_close: int | None
    lacks: Lacks

    @property
    def end_ns(self) -> int:
        """Where the next one starts."""
        return self.start_ns + self.width_ns

    @property
    def interval(self) -> str:
        """Its interval as people call it, `10s`."""
        return INTERVAL_NAMES[self.width_ns]

    @property
    def is_complete(self) -> bool:
        """Whether every trade of it is in it."""
        return self.lacks <= Lacks.MID

    @property
    def vwap(self) -> float:
        """Mean price of its trades weighted by size, in the quote currency; NaN without a trade."""
        if not self.lots:
            return math.nan
        return float(self.notional / (self.lots * 10**self.price_decimals))  # rounded once: see `notional_of`

    def price(self, ticks: int | None) -> float:
        """A trade price of it in the quote currency; NaN for None."""
        return math.nan if ticks is None else float(ticks / 10**self.price_decimals)

    def mid(self, twice: int | None) -> float:
        """A mid of it in the quote currency; NaN for None."""
        return math.nan if twice is None else float(twice / (2 * 10**self.price_decimals))

    def size(self, lots: int) -> float:
        """A size of it in units of the base."""
        return float(lots / 10**self.size_decimals)


def notional_of(vwap: float, lots: int, price_decimals: int) -> int:
    """A notional that gives this mean price again, to the bit: the bar's own below 2^52, else the nearest to it."""
    notional: int = round(Fraction(vwap) * lots * 10**price_decimals)
    return notional


def merged(bars: Sequence[Bar], width_ns: int) -> Bar:
    """One longer bar.

    Args:
        bars: Shorter ones of it that follow on each other; at least one. None is missing but at its two ends.
        width_ns: Its interval.
    """
    first = bars[0]
    traded = [bar for bar in bars if bar.trades]
    lacks = Lacks.NOTHING
    for bar in bars:
        lacks |= bar.lacks
    return Bar(
        instrument=first.instrument,
        start_ns=first.start_ns - first.start_ns % width_ns,
        width_ns=width_ns,
        price_decimals=first.price_decimals,
        size_decimals=first.size_decimals,
        open=traded[0].open if traded else None,
        high=max((bar.high for bar in traded if bar.high is not None), default=None),
        low=min((bar.low for bar in traded if bar.low is not None), default=None),
        close=traded[-1].close if traded else None,
        trades=sum(bar.trades for bar in traded),
        bought=sum(bar.bought for bar in traded),
        sold=sum(bar.sold for bar in traded),
        lots=sum(bar.lots for bar in traded),
        notional=sum(bar.notional for bar in traded),
        mid_open=next((bar.mid_open for bar in bars if bar.mid_open is not None), None),
        mid_high=max((bar.mid_high for bar in bars if bar.mid_high is not None), default=None),
        mid_low=min((bar.mid_low for bar in bars if bar.mid_low is not None), default=None),
        mid_close=next((bar.mid_close for bar in reversed(bars) if bar.mid_close is not None), None),
        lacks=lacks,
    )
