"""Recorded and simulated market side by side, as SVG: the same tapes give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from feature_cache.sources.market_facts import Floats, Tape, autocorrelation, order_signs, response

_LAGS: Final = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
_DELAYS: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)


def picture(recorded: Tape, sessions: Sequence[Tape]) -> str:
    """Six panels; the recorded session is black, the simulated ones are in colour."""
    figure = Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplots(3, 2)
    for each, color, width, label in [
        *((session, "C0", 0.8, "simulated" if number == 0 else None) for number, session in enumerate(sessions)),
        (recorded, "black", 1.4, "recorded"),
    ]:
        style = {"color": color, "linewidth": width}
        axes[0, 0].plot(*_path(each), label=label, **style)
        axes[0, 1].loglog(*_survival(np.abs(np.diff(_path(each, 0.1)[1]))), **style)
        axes[1, 0].plot(_LAGS, [autocorrelation(order_signs(each), lag) for lag in _LAGS], **style)
        axes[1, 1].loglog(*_survival(np.bincount(each.trade_time.astype(np.int64)).astype(np.float64)), **style)
        axes[2, 0].loglog(*_survival(each.lots / np.median(each.lots)), **style)
        axes[2, 1].semilogx(_DELAYS, [response(each, delay) for delay in _DELAYS], **style)
    _name(axes[0, 0], "mid, bp from the start", "seconds")
    _name(axes[0, 1], "share of 100 ms moves that are larger", "move, bp")
    _name(axes[1, 0], "autocorrelation of takers' signs", "lag in orders")
    _name(axes[1, 1], "share of seconds with more trades", "trades in a second")
    _name(axes[2, 0], "share of trades that are larger", "size over its median")
    _name(axes[2, 1], "response of the mid to a trade, bp", "seconds after it")
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    return _svg(figure)


def _path(of: Tape, step: float = 1.0) -> tuple[Floats, Floats]:
    times = np.arange(of.quote_time[0], of.quote_time[-1], step)
    mid = of.mid_bps[np.searchsorted(of.quote_time, times, "right") - 1]
    return times, mid - mid[0]


def _survival(values: Floats) -> tuple[Floats, Floats]:
    """P(X > x) at up to 200 of the values, which are above 0."""
    ordered = np.sort(values[values > 0])
    shown = np.unique(np.geomspace(1, len(ordered), 200).astype(np.int64))
    return ordered[-shown], shown / len(values)


def _name(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize="small", loc="left")
    axes.set_xlabel(x, fontsize="small")
    axes.tick_params(labelsize="x-small")
    axes.grid(visible=True, linewidth=0.3)


def _svg(figure: Figure) -> str:
    written = io.StringIO()
    with rc_context({"svg.hashsalt": "pretrade", "svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    # Lines without trailing spaces, which version control would complain about.
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"
