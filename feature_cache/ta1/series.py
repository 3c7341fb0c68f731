"""The indicators over the bars of one interval, bar by bar.

A handle of TA-Lib's `stream` carries each indicator forward at a constant cost a bar. It gives bit by bit what TA-Lib's
function gives for the whole history, recursive indicators such as RSI, EMA, ATR and ADX included; a test holds every
one of them, at every bar, against the function. A handle needs some bars to be opened on: until then its indicator is
undefined.

The history is that of a series of bars (see `feature_cache/bars/maker.py`), from its first trade on. A bar without a
trade stands at the close before it, without volume. Prices are ticks and sizes lots, so that TA-Lib's sums of volumes
are exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from talib import InsufficientHistory, abstract, stream  # type: ignore[attr-defined]  # not all is in its stubs

from feature_cache.bars.bar import Bar, Lacks
from feature_cache.ta1.indicators import CHANGE_BARS, FEATURES, FLOW_BARS, INDICATORS, Indicator, Outputs

_INPUTS: Final = "ohlcv"
_ROUNDING: Final = 1e-6
"""How far beyond its range, relatively, a value may lie for rounding; what lies further is undefined."""
_Row = tuple[float, float, float, float, float]
_Columns = Sequence[NDArray[np.float64]]

_MOST: Final = float(np.finfo(np.float32).max)
_LOWEST: Final = np.array([max(-_MOST, one.lowest) for one in FEATURES])
_HIGHEST: Final = np.array([min(_MOST, one.highest) for one in FEATURES])
_SLACK: Final = _ROUNDING * np.minimum(1.0, _HIGHEST - _LOWEST)


@cache
def _needed(function: str, parameters: tuple[tuple[str, float], ...]) -> int:
    """How many bars a function of TA-Lib needs for its first value, or a few less."""
    return 1 + int(abstract.Function(function, **dict(parameters)).lookback)  # type: ignore[attr-defined]  # as above


class Running:
    """One indicator, bar by bar.

    Args:
        indicator: Which.
    """

    def __init__(self, indicator: Indicator) -> None:
        self.indicator = indicator
        self._places = [_INPUTS.index(one) for one in indicator.inputs]
        self._needed = _needed(indicator.function, tuple(indicator.parameters.items()))
        self._update: Callable[..., float | Outputs] | None = None

    @property
    def is_open(self) -> bool:
        """Whether it no longer needs the history."""
        return self._update is not None

    def add(self, row: _Row, history: _Columns | None) -> Outputs | None:
        """TA-Lib's outputs after a bar; None while there are too few.

        Args:
            row: The bar: open, high, low, close, volume.
            history: The same of all bars, this one included; None once `is_open`.
        """
        if self._update is not None:
            found = self._update(*[row[place] for place in self._places])
        else:
            assert history is not None
            opened = self._open(history)
            if opened is None:
                return None
            found = opened
        return found if isinstance(found, tuple) else (found,)

    def _open(self, history: _Columns) -> float | Outputs | None:
        if len(history[0]) < self._needed:
            return None
        columns = [history[place] for place in self._places]
        try:
            handle: Any = getattr(stream, self.indicator.function)(*columns, **self.indicator.parameters)
        except InsufficientHistory:
            return None
        self._update = handle.update
        value: float | Outputs = handle.value
        return value


class _Total:
    """How much a running total changed over `CHANGE_BARS`, and the lots meanwhile."""

    def __init__(self) -> None:
        self._entries: deque[tuple[float, float]] = deque(maxlen=CHANGE_BARS + 1)
        self._lots = 0.0

    def add(self, total: float, lots: float) -> Outputs | None:
        self._lots += lots
        self._entries.append((total, self._lots))
        if len(self._entries) <= CHANGE_BARS:
            return None
        before, lots_before = self._entries[0]
        return total - before, self._lots - lots_before


class _Flow:
    """The features of `FLOW`."""

    def __init__(self) -> None:
        self._bars: deque[Bar] = deque(maxlen=FLOW_BARS)

    def add(self, bar: Bar, close: float, before: float | None) -> list[float]:
        self._bars.append(bar)
        above_mid = math.nan if bar.mid_close is None else 1e4 * (2 * close / bar.mid_close - 1)
        change = math.nan if before is None else 1e4 * math.log(close / before)
        if len(self._bars) < FLOW_BARS:
            return [change, math.nan, math.nan, math.nan, math.nan, above_mid]
        lots = sum(one.lots for one in self._bars)
        bought, sold = sum(one.bought for one in self._bars), sum(one.sold for one in self._bars)
        # In doubles, bar by bar, so that bars that were stored give the same bits.
        paid = sum(one.vwap * one.lots for one in self._bars if one.lots)
        vwap = paid / lots if lots else math.nan
        price = close / 10**bar.price_decimals
        return [
            change,
            1e4 * (price - vwap) / price,
            (bought - sold) / (bought + sold) if bought + sold else 0.0,
            sum(one.trades for one in self._bars) / FLOW_BARS,
            sum(not one.trades for one in self._bars) / FLOW_BARS,
            above_mid,
        ]


class Series:
    """Bars of one interval in, the values of `FEATURES` out."""

    def __init__(self) -> None:
        self._start_anew()

    def _start_anew(self) -> None:
        self._running = [Running(one) for one in INDICATORS]
        self._totals = [_Total() if one.is_total else None for one in INDICATORS]
        self._spoilt_until = [0] * len(INDICATORS)
        self._flow = _Flow()
        self._history: list[_Row] | None = []
        self._count = 0
        self._unmoved = 0
        self._close: float | None = None
        self.values: NDArray[np.float32] = np.full(len(FEATURES), math.nan, dtype=np.float32)
        """float32[n] as of the last bar; never written to."""

    def resume(self, bars: Sequence[Bar]) -> None:
        """Begins anew with bars that follow on each other, which gives what adding them one by one does, sooner.

        Handles are opened on the whole history but its last bars. A test holds that to be the same, to the bit.
        """
        self._start_anew()
        shown = max(len(bars) - CHANGE_BARS - 1, 0)  # totals and flow look at that many bars
        for bar in bars[:shown]:
            self._remember(bar)
        for bar in bars[shown:]:
            self._add(bar)

    def add(self, bar: Bar) -> None:
        """Takes the bar that follows on the one before it, or one that begins a series."""
        if bar.lacks & Lacks.BEGINNING:
            self._start_anew()
        self._add(bar)

    def _remember(self, bar: Bar) -> _Row | None:
        """Makes a bar a part of the history; None before the first trade."""
        before = self._close
        row = _row_of(bar, before)
        if row is None:
            return None
        self._count += 1
        self._close = row[3]
        self._unmoved = self._unmoved + 1 if row[:4] == (before,) * 4 else 0
        if self._unmoved:
            for place, indicator in enumerate(INDICATORS):
                if indicator.window and self._unmoved >= indicator.window:
                    self._spoilt_until[place] = self._count + indicator.memory
        if self._history is not None:
            self._history.append(row)
        return row

    def _add(self, bar: Bar) -> None:
        before = self._close
        row = self._remember(bar)
        if row is None:
            return
        history = None if self._history is None else list(np.array(self._history).T.copy())
        found: list[float] = []
        for place, running in enumerate(self._running):
            found += self._derived(place, running, row, history)
        if self._history is not None and all(running.is_open for running in self._running):
            self._history = None
        found += self._flow.add(bar, row[3], before)
        self.values = _in_range(np.array(found))

    def _derived(self, place: int, running: Running, row: _Row, history: _Columns | None) -> list[float]:
        indicator = running.indicator
        out = running.add(row, history)
        total = self._totals[place]
        if total is not None and out is not None:
            out = total.add(out[0], row[4])
        if out is None or self._count < self._spoilt_until[place]:
            return [math.nan] * len(indicator.derived)
        return [one.value(out, row[3]) for one in indicator.derived]


def along(bars: Sequence[Bar], count: int) -> list[NDArray[np.float32]]:
    """The values of `FEATURES` after each of the last `count` bars, oldest first; those before are their history.

    They are what a worker has that begins with this history. After a gap they begin anew, as they do there.
    """
    first = max(len(bars) - count, 0)
    series = Series()
    series.resume(without_gap(bars[:first]))
    found = []
    for place in range(first, len(bars)):
        bar = bars[place]
        if place and bar.start_ns != bars[place - 1].end_ns:
            series.resume(())
        series.add(bar)
        found.append(series.values)
    return found


def without_gap(stored: Sequence[Bar]) -> list[Bar]:
    """The bars after the last gap."""
    history: list[Bar] = []
    for bar in stored:
        if bar.lacks & Lacks.BEGINNING or (history and bar.start_ns != history[-1].end_ns):
            history = []
        history.append(bar)
    return history


def _row_of(bar: Bar, before: float | None) -> _Row | None:
    if bar.open is None or bar.high is None or bar.low is None or bar.close is None:
        return None if before is None else (before, before, before, before, 0.0)
    return float(bar.open), float(bar.high), float(bar.low), float(bar.close), float(bar.lots)


def _in_range(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Values that are beyond what their definition leaves possible, other than by rounding, are undefined."""
    clipped = np.clip(values, _LOWEST, _HIGHEST)
    clipped[~(np.abs(values - clipped) <= _SLACK)] = math.nan
    return clipped.astype(np.float32)
