"""Computes `ta1` and `ta1_long` for one instrument: events in, values out.

    computer = Ta1Computer("ETHUSDT.BINANCE", "BTCUSDT.BINANCE", Board())
    for event in session:
        computer.on_event(event)
    computer.values()           # float32[len(TA1)], as of the last bars that have ended

Values change when a bar ends, and with nothing else: between two bars of 1 s they stand still.

`ta1_long` is `Indicators` alone. `ta1` also looks at a partner, whose mid is read from the `Board` of the process when
one of our own bars ends. Computers of one process write their mids there. That is best effort: if the partner's
partition is on another worker, its features are undefined here. A mid older than five seconds of event time is no mid.
In a replay, or on one partition, the order of the events decides all; between partitions it decides which of two events
of the same millisecond is seen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from feature_cache.bars.bar import SECOND_NS, Bar, Lacks
from feature_cache.bars.maker import BarMaker
from feature_cache.ta1.definition import CORRELATION_SECONDS, CROSS, INTERVALS, TA1
from feature_cache.ta1.past import Join, Past
from feature_cache.ta1.series import Series
from pretrade.market.v1 import market_pb2 as pb

_OLDEST_NS: Final = 5 * SECOND_NS
_NO_CROSS: Final = np.full(len(CROSS), math.nan, dtype=np.float32)


class Board:
    """The newest mid of each instrument that this process computes."""

    def __init__(self) -> None:
        self._mids: dict[str, tuple[int, float]] = {}

    def put(self, instrument: str, time_ns: int, mid: float | None) -> None:
        """Notes a mid; None takes it away."""
        if mid is None:
            self._mids.pop(instrument, None)
        else:
            self._mids[instrument] = (time_ns, mid)

    def mid(self, instrument: str, at_ns: int) -> float:
        """The newest mid; NaN if there is none, or if it is too old at this event time."""
        time_ns, mid = self._mids.get(instrument, (0, math.nan))
        return mid if at_ns - time_ns <= _OLDEST_NS else math.nan


BOARD: Final = Board()
"""That of this process."""


class Pair:
    """Our mid and the partner's at the ends of bars of a second, and what they say of each other."""

    def __init__(self) -> None:
        self._ours: deque[float] = deque(maxlen=CORRELATION_SECONDS + 2)
        self._theirs: deque[float] = deque(maxlen=CORRELATION_SECONDS + 2)

    def add(self, ours: float, theirs: float) -> list[float]:
        """Takes both in, NaN for unknown; returns the values of `CROSS`."""
        self._ours.append(ours)
        self._theirs.append(theirs)
        own, their = _returns(self._ours), _returns(self._theirs)
        return [
            _sum(their, 1),
            _sum(their, 10),
            _sum(their, 5) - _sum(own, 5),
            _correlation(own, their),
            _correlation(own[1:], their[:-1]),
        ]


class Indicators:
    """The indicators over the bars of some intervals, of one instrument.

    Args:
        instrument: `SYMBOL.VENUE`.
        intervals: Names of the intervals, the shortest first.
        past: Where bars from before the first event are looked up; None for a history that begins with that event.
        take: Also called with each bar when it has ended.
    """

    def __init__(
        self,
        instrument: str,
        intervals: Sequence[str],
        past: Past | None = None,
        take: Callable[[Bar], object] | None = None,
    ) -> None:
        self.maker = BarMaker(instrument, self._take, intervals[-1])
        self._further = take
        self._series = {interval: Series() for interval in intervals}
        self._joins = {} if past is None else {one: Join(past, instrument, one) for one in intervals}
        self._values: NDArray[np.float32] | None = None

    @property
    def is_joined(self) -> bool:
        """Whether nothing is looked up any more."""
        return not self._joins

    def on_event(self, event: pb.MarketEvent) -> None:
        """Takes one event in.

        Raises:
            EventError: The event breaks the contract; the state is as before.
        """
        self.maker.on_event(event)

    def values(self) -> NDArray[np.float32]:
        """Of each interval, the values as of its last bar that has ended; not to be written to."""
        for interval in tuple(self._joins):
            self._look_back(interval)
        if self._values is None:
            self._values = np.concatenate([one.values for one in self._series.values()])
        return self._values

    def _take(self, bar: Bar) -> None:
        series = self._series.get(bar.interval)
        if series is not None:
            series.add(bar)
            self._values = None
            if (join := self._joins.get(bar.interval)) is not None:
                join.add(bar)
                self._look_back(bar.interval)
        if self._further is not None:
            self._further(bar)

    def _look_back(self, interval: str) -> None:
        """Takes the indicators with stored bars before ours, if there are some by now."""
        join = self._joins[interval]
        series = join.found(self.maker.begun_ns, self.maker.time_ns)
        if series is not None:
            self._series[interval] = series
            self._values = None
        if join.is_over:
            del self._joins[interval]


class Ta1Computer:
    """The set `ta1` of one instrument.

    Args:
        instrument: `SYMBOL.VENUE`.
        partner: Another one; None for none.
        board: Where computers of one process leave their mids.
        past: See `Indicators`.
    """

    def __init__(self, instrument: str, partner: str | None, board: Board, past: Past | None = None) -> None:
        self._instrument = instrument
        self._partner = partner
        self._board = board
        self.indicators = Indicators(instrument, INTERVALS, past, self._take)
        self._pair = Pair()
        self._cross = _NO_CROSS
        self._of_bars: NDArray[np.float32] | None = None
        self._values: NDArray[np.float32] | None = None

    def on_event(self, event: pb.MarketEvent) -> None:
        """Takes one event in.

        Raises:
            EventError: The event breaks the contract; the state is as before.
        """
        self.indicators.on_event(event)
        maker = self.indicators.maker
        self._board.put(self._instrument, maker.time_ns, maker.mid)

    def values(self) -> NDArray[np.float32]:
        """The values of `TA1` as of the last bars that have ended; not to be written to."""
        of_bars = self.indicators.values()
        if self._values is None or of_bars is not self._of_bars:
            self._of_bars, self._values = of_bars, np.concatenate([of_bars, self._cross])
            assert len(self._values) == len(TA1)
        return self._values

    def _take(self, bar: Bar) -> None:
        """Puts the partner beside us at the end of each bar of a second."""
        if bar.width_ns != SECOND_NS or self._partner is None:
            return
        if bar.lacks & Lacks.BEGINNING:
            self._pair = Pair()
        ours = math.nan if bar.lacks & Lacks.MID else bar.mid(bar.mid_close)
        theirs = self._board.mid(self._partner, bar.end_ns)
        self._cross = np.array(self._pair.add(ours, theirs), dtype=np.float32)
        self._values = None


def _returns(mids: Sequence[float]) -> NDArray[np.float64]:
    """Log returns in basis points."""
    returns: NDArray[np.float64] = np.diff(np.log(np.array(mids))) * 1e4
    return returns


def _sum(returns: NDArray[np.float64], count: int) -> float:
    return float(returns[-count:].sum()) if len(returns) >= count else math.nan


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Of the last returns; NaN if one of them is unknown, or if one side did not move."""
    if len(first) < CORRELATION_SECONDS:
        return math.nan
    first = first[-CORRELATION_SECONDS:] - first[-CORRELATION_SECONDS:].mean()
    second = second[-CORRELATION_SECONDS:] - second[-CORRELATION_SECONDS:].mean()
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return min(1.0, max(-1.0, float(first @ second) / scale)) if scale > 0 else math.nan
