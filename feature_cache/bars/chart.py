"""Bars as a picture: candles of the trades, the mid as a line, volume below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from feature_cache.bars.store import width_of

_RISE: Final = "#2a9d5c"
_FALL: Final = "#c8413b"
_MID: Final = "#888888"
_INCOMPLETE: Final = "#f2e3b6"


def draw(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws rows of one interval, oldest first. Bars that are not complete stand on a yellow ground.

    Raises:
        OSError: The file cannot be written.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    prices, volume = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = width_of(rows[0])
    prices.plot(
        [row["start"] + width / 2 for row in rows],
        [float("nan") if row["mid_close"] is None else row["mid_close"] for row in rows],
        color=_MID,
        linewidth=0.8,
        label="mid at the end",
    )
    for row in rows:
        middle = row["start"] + width / 2
        if not row["complete"]:
            prices.axvspan(row["start"], row["start"] + width, color=_INCOMPLETE)
        if not row["trades"]:
            continue
        colour = _RISE if row["close"] >= row["open"] else _FALL
        prices.vlines(middle, row["low"], row["high"], color=colour, linewidth=0.8)
        prices.bar(middle, row["close"] - row["open"], width * 0.7, bottom=row["open"], color=colour)
        volume.bar(middle, row["volume"], width * 0.7, color=colour)
    prices.set_title(title)
    prices.set_ylabel("price")
    prices.legend(loc="upper left", frameon=False)
    volume.set_ylabel("volume")
    volume.set_xlabel("event time, UTC")
    figure.savefig(path)
