"""How a model does in calm and in restless markets: its decisions by the volatility that its metadata forecast.

The regimes are the thirds of the forecasts where the model learnt (`feature_cache/har.py`), so each held a third of its
samples. A share far from that says that the market is another one; a precision that differs between regimes says what
follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feature_cache.har import REGIMES, Forecast


@dataclass(frozen=True, slots=True)
class Regime:
    """A model's decisions in one regime of volatility."""

    name: str
    inputs: int
    """Different states of the market, by side."""
    share: float
    """Of all inputs whose volatility is forecast; a third where the model learnt."""
    coverage: float
    """Share of them that were decided as TRADE."""
    labelled: int
    """Of those that were decided as TRADE, those whose outcome is known."""
    precision: float | None
    """Share of these that were eligible; None without one."""


def by_regime(
    forecast: Forecast,
    rows: NDArray[np.float32],
    traded: Sequence[bool],
    decision_ids: Sequence[str],
    eligible: Mapping[str, bool],
) -> tuple[Regime, ...]:
    """The regimes, the calmest first; none where no volatility is forecast.

    Args:
        forecast: Of the model.
        rows: float32[n, features of `mf1`], different inputs of the model.
        traded: Whether each was decided as TRADE.
        decision_ids: Of these decisions.
        eligible: Decision id → the market's own label, where it is known.
    """
    places = forecast.regimes(rows)
    known = int((places >= 0).sum())
    found = []
    for number, name in enumerate(REGIMES if known else ()):
        inside = np.flatnonzero(places == number)
        trades = [decision_ids[i] for i in inside.tolist() if traded[i]]
        labels = [eligible[one] for one in trades if one in eligible]
        found.append(
            Regime(
                name=name,
                inputs=len(inside),
                share=len(inside) / known,
                coverage=len(trades) / len(inside) if len(inside) else 0.0,
                labelled=len(labels),
                precision=sum(labels) / len(labels) if labels else None,
            )
        )
    return tuple(found)
