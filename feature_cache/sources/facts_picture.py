"""Recorded and simulated market side by side, as SVG: the same tapes give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from feature_cache.sources.market_facts import Floats, Tape, autocorrelation, order_signs, response

_LAGS: Final = np.array([1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100], dtype=np.float64)
_DELAYS: Final = np.array([0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0])
_PATH_SECONDS: Final = 5.0
_POINTS: Final = 60
"""Of a distribution."""

_WIDTH, _HEIGHT = 360, 190  # of a panel with its title and its labels
_LEFT, _RIGHT, _ABOVE, _BELOW = 48, 14, 26, 34  # from its edges to its frame
_HEAD: Final = 24
_RECORDED: Final = 'stroke="black" stroke-width="1.6"'
_SIMULATED: Final = 'stroke="#1f77b4" stroke-width="0.8"'
_STEPS: Final = (1.0, 2.0, 5.0, 10.0)


class _Line(NamedTuple):
    x: Floats
    y: Floats


@dataclass(frozen=True, slots=True)
class _Axis:
    """From values to places between 0 and 1; a logarithmic one begins and ends at a power of ten."""

    low: float
    high: float
    logarithmic: bool

    @staticmethod
    def of(parts: Sequence[Floats], *, logarithmic: bool) -> _Axis:
        """Whatever the values need."""
        values = np.concatenate(parts)
        low, high = float(values.min()), float(values.max())
        if logarithmic:
            return _Axis(math.floor(math.log10(low)), math.ceil(math.log10(high)), logarithmic=True)
        margin = 0.05 * (high - low or 1.0)
        return _Axis(low - margin, high + margin, logarithmic=False)

    def places(self, values: Floats) -> Floats:
        found: Floats = ((np.log10(values) if self.logarithmic else values) - self.low) / (self.high - self.low)
        return found

    def ticks(self) -> Floats:
        """At most seven round values."""
        if self.logarithmic:
            powers = np.arange(self.low, self.high + 1)
            shown: Floats = np.power(10.0, powers[:: 1 + len(powers) // 8])
            return shown
        power: float = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step = next(power * factor for factor in _STEPS if (self.high - self.low) / (power * factor) <= 5)
        return np.arange(math.ceil(self.low / step), math.floor(self.high / step) + 1, dtype=np.float64) * step


class _Panel(NamedTuple):
    title: str
    along: str
    """What x is."""
    lines: Sequence[_Line]
    """The recorded session's, then the simulated ones'."""
    logarithmic: tuple[bool, bool]


def picture(recorded: Tape, sessions: Sequence[Tape]) -> str:
    """Six panels; the recorded session is black, the simulated ones are blue."""
    tapes = (recorded, *sessions)
    moves = [np.abs(np.diff(_path(each, 0.1).y)) for each in tapes]
    rates = [np.bincount(each.trade_time.astype(np.int64)).astype(np.float64) for each in tapes]
    signs = [order_signs(each) for each in tapes]
    panels = [
        _Panel("mid, bp from the start", "seconds", [_path(each, _PATH_SECONDS) for each in tapes], (False, False)),
        _Panel("share of 100 ms moves that are larger", "move, bp", [_survival(each) for each in moves], (True, True)),
        _Panel("autocorrelation of takers' signs", "lag, orders", [_signs(each) for each in signs], (False, False)),
        _Panel("share of seconds with more trades", "trades", [_survival(each) for each in rates], (True, True)),
        _Panel(
            "share of trades that are larger",
            "size over its median",
            [_survival(each.lots / np.median(each.lots)) for each in tapes],
            (True, True),
        ),
        _Panel("response of the mid, bp", "seconds after a trade", [_response(each) for each in tapes], (True, False)),
    ]
    width, height = 2 * _WIDTH, _HEAD + _HEIGHT * (len(panels) // 2)
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<path d="M{_LEFT} 14h24" {_RECORDED}/>',
            _text(_LEFT + 30, 18, "recorded", 11),
            f'<path d="M{_LEFT + 110} 14h24" {_SIMULATED}/>',
            _text(_LEFT + 140, 18, "simulated", 11),
            *(line for number, panel in enumerate(panels) for line in _drawn(panel, number)),
            "</svg>\n",
        )
    )


def _drawn(panel: _Panel, number: int) -> Iterator[str]:
    """One panel in its place: two beside each other."""
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _ABOVE - _BELOW
    left, top = _WIDTH * (number % 2) + _LEFT, _HEAD + _HEIGHT * (number // 2) + _ABOVE
    x = _Axis.of([line.x for line in panel.lines], logarithmic=panel.logarithmic[0])
    y = _Axis.of([line.y for line in panel.lines], logarithmic=panel.logarithmic[1])
    yield f'<g transform="translate({left} {top})">'
    yield _text(0, -8, panel.title, 12)
    yield _text(width / 2, height + 28, panel.along, 10, "middle")
    for place, tick in zip(x.places(x.ticks()) * width, x.ticks(), strict=True):
        yield f'<path d="M{place:.1f} 0v{height}" stroke="#ddd"/>'
        yield _text(place, height + 14, f"{tick:g}", 9, "middle")
    for place, tick in zip((1 - y.places(y.ticks())) * height, y.ticks(), strict=True):
        yield f'<path d="M0 {place:.1f}h{width}" stroke="#ddd"/>'
        yield _text(-5, place + 3, f"{tick:.6g}", 9, "end")
    for line, style in reversed([*zip(panel.lines, [_RECORDED] + [_SIMULATED] * len(panel.lines), strict=False)]):
        points = zip(x.places(line.x) * width, (1 - y.places(line.y)) * height, strict=True)
        yield f'<polyline fill="none" {style} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}"/>'
    yield f'<rect width="{width}" height="{height}" fill="none" stroke="#888"/>'
    yield "</g>"


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def _path(of: Tape, step: float) -> _Line:
    times = np.arange(of.quote_time[0], of.quote_time[-1], step)
    mid = of.mid_bps[np.searchsorted(of.quote_time, times, "right") - 1]
    return _Line(times, mid - mid[0])


def _signs(signs: Floats) -> _Line:
    return _Line(_LAGS, np.array([autocorrelation(signs, int(lag)) for lag in _LAGS]))


def _response(of: Tape) -> _Line:
    found = np.array([response(of, delay) for delay in _DELAYS])
    known = np.isfinite(found)  # not of delays that are longer than the session
    return _Line(_DELAYS[known], found[known])


def _survival(values: Floats) -> _Line:
    """P(X > x) at some of the values that are above 0."""
    ordered = np.sort(values[values > 0])
    shown = np.unique(np.geomspace(1, max(1, len(ordered)), _POINTS).astype(np.int64))[: len(ordered)]
    return _Line(ordered[-shown], shown / len(values))
