"""Computes `ta1` for one instrument: events in, values out.

    computer = Ta1Computer("ETHUSDT.BINANCE", "BTCUSDT.BINANCE", Board())
    for event in session:
        computer.on_event(event)
    computer.values()           # float32[len(TA1)], as of the last bars that have ended

Values change when a bar ends, and with nothing else: between two bars of 1 s they stand still.

The partner's mid is read from the `Board` of the process when one of our own bars ends. Computers of one process write
their mids there. That is best effort: if the partner's partition is on another worker, its features are undefined here.
A mid older than five seconds of event time is no mid. In a replay, or on one partition, the order of the events decides
all; between partitions it decides which of two events of the same millisecond is seen.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
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


class Ta1Computer:
    """The set `ta1` of one instrument.

    Args:
        instrument: `SYMBOL.VENUE`.
        partner: Another one; None for none.
        board: Where computers of one process leave their mids.
        past: Where bars from before the first event are looked up; None for a history that begins with that event.
    """

    def __init__(self, instrument: str, partner: str | None, board: Board, past: Past | None = None) -> None:
        self._instrument = instrument
        self._partner = partner
        self._board = board
        self._maker = BarMaker(instrument, self._take, INTERVALS[-1])
        self._series = {interval: Series() for interval in INTERVALS}
        self._joins = {} if past is None else {interval: Join(past) for interval in INTERVALS}
        self._pair = Pair()
        self._cross = _NO_CROSS
        self._values: NDArray[np.float32] | None = None

    def on_event(self, event: pb.MarketEvent) -> None:
        """Takes one event in.

        Raises:
            EventError: The event breaks the contract; the state is as before.
        """
        maker = self._maker
        maker.on_event(event)
        self._board.put(self._instrument, maker.time_ns, maker.mid)

    def values(self) -> NDArray[np.float32]:
        """The values of `TA1` as of the last bars that have ended; not to be written to."""
        for interval in tuple(self._joins):
            self._look_back(interval)
        if self._values is None:
            self._values = np.concatenate([*(one.values for one in self._series.values()), self._cross])
            assert len(self._values) == len(TA1)
        return self._values

    def _take(self, bar: Bar) -> None:
        self._series[bar.interval].add(bar)
        self._values = None
        if (join := self._joins.get(bar.interval)) is not None:
            join.add(bar)
            self._look_back(bar.interval)
        if bar.width_ns != SECOND_NS or self._partner is None:
            return
        if bar.lacks & Lacks.BEGINNING:
            self._pair = Pair()
        ours = math.nan if bar.lacks & Lacks.MID else bar.mid(bar.mid_close)
        theirs = self._board.mid(self._partner, bar.end_ns)
        self._cross = np.array(self._pair.add(ours, theirs), dtype=np.float32)

    def _look_back(self, interval: str) -> None:
        """Puts stored bars before ours, if they have been found by now."""
        join = self._joins[interval]
        history = join.found()
        if history is not None:
            self._series[interval].resume(history)
            self._values = None
        if join.is_over:
            del self._joins[interval]


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
