"""Makes the bars of an instrument from its events.

    maker = BarMaker("BTCUSDT.BINANCE", print)
    for event in session:
        maker.on_event(event)       # calls print(bar) for every bar that has ended

A bar ends when an event counts at or after its end: nothing but events moves time, so that a recording gives the same
bars again. When it is made, nothing that would belong in it can still come. `Market` says at what time an event counts.

Every interval of a series has its bar, whether or not anything happened in it:

* A bar without a trade has `trades = 0` and no trade prices. Its mid is the one that stood meanwhile.
* If the feed loses continuity, each bar from then until the next event lacks `CONTINUITY`.
* If no event comes for more than ten minutes of event time, if time runs back by more than ten seconds, or if the
  number of decimals changes, the series ends: the bars that are not over end where they stand. A new series begins with
  the next event, without any bars between. Its first bar, and each longer one that begins with it, lacks `BEGINNING`.

Bars of one second are made from events, and each longer one from those of the interval before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from feature_cache.bars.bar import INTERVALS, SECOND_NS, Bar, Lacks, merged
from feature_cache.engine.market import MAX_BEHIND_NS, Best, Market
from pretrade.market.v1 import market_pb2 as pb

LONGEST_PAUSE_NS: Final = 600 * SECOND_NS
"""Time without an event for which bars are made; as much as two of the longest bars."""


class BarMaker(Market):
    """Market events in, bars out.

    Args:
        instrument: `SYMBOL.VENUE`; an event of another one is an error.
        take: Called with each bar when it has ended; of those that end together, the shortest first.
        longest: Name of the longest interval that is wanted.
    """

    # Of the bar under way.
    _open: int
    _high: int
    _low: int
    _close: int
    _trades: int
    _bought: int
    _sold: int
    _lots: int
    _notional: int
    _mid_open: int | None
    _mid_high: int | None
    _mid_low: int | None
    _mid_close: int | None
    _lacks: Lacks

    def __init__(self, instrument: str, take: Callable[[Bar], object], longest: str = "5m") -> None:
        self._take = take
        self._rolls = [(width, list[Bar]()) for width in INTERVALS.values() if SECOND_NS < width <= INTERVALS[longest]]
        self._units = (-1, -1)  # decimals of the series
        self._mid: int | None = None
        self._begin_bar(0, Lacks.BEGINNING)
        self._end_ns = 0  # of the bar under way; 0 while none is
        self.begun_ns = 0
        """Where the first bar of the series starts; 0 before the first event that counts."""
        super().__init__(instrument)

    @property
    def mid(self) -> float | None:
        """The mid now, in the quote currency; None while it is not known."""
        return None if self._mid is None else self._mid / (2 * 10 ** self._units[0])

    def on_event(self, event: pb.MarketEvent) -> bool:
        """Takes one event in.

        Returns:
            False if it was stale.

        Raises:
            EventError: The event breaks the contract; the state is as before.
        """
        is_news = super().on_event(event)
        if is_news and self._is_over():
            self._move()
        return is_news

    def _is_over(self) -> bool:
        """Whether a bar has to end, or to begin, before something can be counted. A reset alone moves no time."""
        return (self._time_ns >= self._end_ns or self._is_cut) and self._price_decimals >= 0

    def _start_windows(self, time_ns: int) -> None:
        """After a reset, and when time ran back too far."""
        super()._start_windows(time_ns)
        self._is_cut = True
        self._mid = None
        if self._end_ns:
            self._lacks |= Lacks.CONTINUITY | Lacks.MID

    def _on_trade(self, trade: pb.Trade) -> None:
        if self._is_over():
            self._move()
        ticks, lots, side = trade.price_ticks, trade.lots, trade.taker_side
        if not self._trades:
            self._open = self._high = self._low = ticks
        elif ticks > self._high:
            self._high = ticks
        elif ticks < self._low:
            self._low = ticks
        self._close = ticks
        self._trades += 1
        self._lots += lots
        self._notional += ticks * lots
        if side == pb.TAKER_SIDE_BUY:
            self._bought += lots
        elif side == pb.TAKER_SIDE_SELL:
            self._sold += lots

    def _on_best(self, before: Best | None, best: Best | None) -> None:
        if self._is_over():
            self._move()
        if best is None or not (best[1] and best[3]):
            self._mid = None
            self._lacks |= Lacks.MID
            return
        mid = best[0] + best[2]
        if mid == self._mid:
            return
        self._mid = self._mid_close = mid
        if self._mid_open is None or self._mid_high is None or self._mid_low is None:
            self._mid_open = self._mid_high = self._mid_low = mid
        elif mid > self._mid_high:
            self._mid_high = mid
        elif mid < self._mid_low:
            self._mid_low = mid

    def _move(self) -> None:
        """Ends the bars that are over by now, and begins the one that is under way."""
        now_ns, end_ns = self._time_ns, self._end_ns
        units = (self._price_decimals, self._size_decimals)
        follows_on = end_ns - SECOND_NS - MAX_BEHIND_NS <= now_ns <= end_ns + LONGEST_PAUSE_NS
        if end_ns and not (follows_on and units == self._units):
            self._end_series()
        if not self._end_ns:
            self._units = units
            self.begun_ns = now_ns - now_ns % SECOND_NS
            self._begin_bar(self.begun_ns, Lacks.BEGINNING)
        between = Lacks.CONTINUITY if self._is_cut else Lacks.NOTHING
        while now_ns >= self._end_ns:
            self._end_bar()
            self._begin_bar(self._end_ns, between)
        self._is_cut = False

    def _begin_bar(self, start_ns: int, lacks: Lacks) -> None:
        self._end_ns = start_ns + SECOND_NS
        self._open = self._high = self._low = self._close = 0
        self._trades = self._bought = self._sold = self._lots = self._notional = 0
        self._mid_open = self._mid_high = self._mid_low = self._mid_close = self._mid
        self._lacks = lacks if self._mid is not None else lacks | Lacks.MID

    def _end_bar(self) -> None:
        traded = self._trades > 0
        bar = Bar(
            instrument=self.instrument,
            start_ns=self._end_ns - SECOND_NS,
            width_ns=SECOND_NS,
            price_decimals=self._units[0],
            size_decimals=self._units[1],
            open=self._open if traded else None,
            high=self._high if traded else None,
            low=self._low if traded else None,
            close=self._close if traded else None,
            trades=self._trades,
            bought=self._bought,
            sold=self._sold,
            lots=self._lots,
            notional=self._notional,
            mid_open=self._mid_open,
            mid_high=self._mid_high,
            mid_low=self._mid_low,
            mid_close=self._mid_close,
            lacks=self._lacks,
        )
        self._take(bar)
        for width_ns, parts in self._rolls:
            parts.append(bar)
            if bar.end_ns % width_ns:
                return
            bar = merged(parts, width_ns)
            parts.clear()
            self._take(bar)

    def _end_series(self) -> None:
        """Ends every bar under way where it stands; what would have followed is not known."""
        self._end_bar()
        shorter: Bar | None = None
        for width_ns, parts in self._rolls:
            if shorter is not None:
                parts.append(shorter)
            shorter = None
            if parts:
                bar = merged(parts, width_ns)
                shorter = replace(bar, lacks=bar.lacks | Lacks.CONTINUITY)
                parts.clear()
                self._take(shorter)
        self._end_ns = 0
