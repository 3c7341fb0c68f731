"""A market as the chart draws it: bars in columns, and decisions as marks."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.audit.v1 import audit_pb2
from pretrade.console.rendering import figure, named, when
from pretrade.decision.v1 import decision_pb2

INTERVALS: Final = {"1s": 1, "10s": 10, "1m": 60, "5m": 300}
"""Seconds of each interval that bars have."""
PANES: Final[Mapping[str, str]] = {
    "volume": "Volume, units of the base",
    "sma_20_bps": "Close above its mean over 20 bars, bps",
    "macd_hist_bps": "MACD 12, 26 less its signal, bps",
    "adx_14": "ADX 14",
    "rsi_14": "RSI 14, less 50",
    "stoch_k_14": "Stochastic %K 14, less 50",
    "cci_20": "Commodity channel index, 20 bars",
    "bollinger_20_position": "Position in Bollinger's bands, 20 bars",
    "atr_14_bps": "ATR 14, bps",
    "obv_20": "Change of on-balance volume, 20 bars",
    "flow_20": "Bought less sold volume over their sum, 20 bars",
}
"""What the pane below the candles may show, by name; all but the first are indicators of `ta1`."""
VOLUME: Final = next(iter(PANES))
_PRICES: Final = ("open", "high", "low", "close", "mid_open")
_GLYPHS: Final[Mapping[tuple[int, int], str]] = {
    (audit_pb2.HEARD_ACTION_TRADE, decision_pb2.SIDE_BUY): "▲",
    (audit_pb2.HEARD_ACTION_TRADE, decision_pb2.SIDE_SELL): "▼",
    (audit_pb2.HEARD_ACTION_NO_TRADE, decision_pb2.SIDE_BUY): "△",
    (audit_pb2.HEARD_ACTION_NO_TRADE, decision_pb2.SIDE_SELL): "▽",
}
"""Of the others nothing was decided: `OTHERS`."""
OTHERS: Final = "✕"
_TONES: Final[Mapping[int, str]] = {audit_pb2.HEARD_ACTION_TRADE: "good", audit_pb2.HEARD_ACTION_NO_TRADE: "plain"}
_MOST_DIGITS: Final = 8


class _Kind(NamedTuple):
    """Decisions that are one mark."""

    bar: int
    """Seconds since the Unix epoch at which its bar begins."""
    heard: int
    side: int


def columns(bars: Sequence[pb.Bar]) -> dict[str, Any]:
    """Bars in columns, for the chart; None where a bar has no such price."""
    found: dict[str, Any] = {"time": [bar.start.seconds for bar in bars]}
    for name in _PRICES:
        found[name] = [getattr(bar, name) if bar.HasField(name) else None for bar in bars]
    found["whole"] = [bar.complete for bar in bars]
    found["digits"] = digits([price for name in _PRICES for price in found[name] if price is not None])
    return found


def pane(bars: Sequence[pb.Bar], name: str) -> list[float | None]:
    """What the pane below the candles shows of each bar."""
    if name == VOLUME:
        return [bar.volume for bar in bars]
    return [bar.indicators.get(name) for bar in bars]


def newest(bars: Sequence[pb.Bar]) -> str:
    """The newest bar in a sentence; empty without one."""
    if not bars:
        return ""
    bar = bars[-1]
    lacks = f" It lacks: {', '.join(bar.lacks)}." if bar.lacks else ""
    if not bar.trades:
        return f"Newest bar: {when(bar.start)}, no trade.{lacks}"
    prices = ", ".join(f"{name} {getattr(bar, name):,.10g}" for name in ("open", "high", "low", "close"))
    plural = "" if bar.trades == 1 else "s"
    return f"Newest bar: {when(bar.start)}, {prices}, volume {bar.volume:,.6g} in {bar.trades:,} trade{plural}.{lacks}"


def marks(decisions: Iterable[audit_pb2.AuditedDecision], interval: str) -> list[dict[str, Any]]:
    """Where the chart has a mark, and which decision it leads to.

    Decisions of one bar and side that ended alike are one mark, which leads to the newest of them.

    Args:
        decisions: The newest first.
        interval: Of the bars.
    """
    width = INTERVALS[interval]
    groups: dict[_Kind, list[audit_pb2.AuditedDecision]] = {}
    for one in decisions:
        seconds = one.packet.decision.decided_at.seconds
        groups.setdefault(_Kind(seconds - seconds % width, one.heard_action, one.packet.order.side), []).append(one)
    return [_mark(kind, group) for kind, group in groups.items()]


def _mark(kind: _Kind, group: Sequence[audit_pb2.AuditedDecision]) -> dict[str, Any]:
    packet = group[0].packet
    what = f"{named(kind.heard, 'heard')} {named(kind.side, 'side').lower()}"
    score = f", score {figure(packet.decision.score)}" if packet.decision.HasField("score") else ""
    by = named(packet.decision.source, "source")
    at = when(packet.decision.decided_at)
    return {
        "time": kind.bar,
        "below": kind.side == decision_pb2.SIDE_BUY,
        "glyph": _GLYPHS.get((kind.heard, kind.side), OTHERS),
        "tone": _TONES.get(kind.heard, "warn"),
        "label": f"{what} at {at} by {by}{score}" if len(group) == 1 else f"{len(group)} × {what}, the newest at {at}",
        "href": f"/decisions/{packet.decision.decision_id}",
    }


def last_second(bars: Sequence[pb.Bar], interval: str) -> dt.datetime:
    """Where the newest bar ends."""
    return bars[-1].start.ToDatetime(dt.UTC) + dt.timedelta(seconds=INTERVALS[interval])


def digits(prices: Sequence[float]) -> int:
    """Decimals with which all of these prices are told apart; at least 2 where one has any, since prices are money."""
    longest = max((len(f"{price:.{_MOST_DIGITS}f}".rstrip("0").partition(".")[2]) for price in prices), default=0)
    return longest if longest != 1 else 2
