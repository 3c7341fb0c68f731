"""A forecast of volatility from the realised volatility of the features (HAR-RV), and the regimes that it makes.

The variance of the next 5 s is taken to be linear in the mean variances a second, v, of the last 1, 5 and 30::

    v(t, t + 5 s) = intercept + a * v(t - 1 s, t) + b * v(t - 5 s, t) + c * v(t - 30 s, t)      bps² a second
    v(t - w, t) = rv_w(t)² / w

All of them are in the feature vector already, so a forecast needs no other feature, and its four coefficients stand in
the metadata of a model: training fits them (`torchserve/volatility.py`), and whoever reads decisions forecasts the same
(`server/drift/regimes.py`). What is shown is the volatility of the next 5 s, sqrt(5 v), in bps; a negative variance
counts as 0.

Source: F. Corsi, A Simple Approximate Long-Memory Model of Realized Volatility (2009), there with days, weeks and
months.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_cache import features

WINDOWS: Final = {"rv_1s_bps": 1.0, "rv_5s_bps": 5.0, "rv_30s_bps": 30.0}
"""Feature → its window in s."""
AHEAD: Final = "rv_5s_bps"
"""The feature that holds, after its window, what was forecast."""
REGIMES: Final = ("calm", "usual", "restless")
"""Thirds of the forecasts where the forecast was fitted."""
METADATA: Final = "volatility_forecast"
"""Where it stands in a model's metadata."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A fitted forecast, as it stands in a model's metadata."""

    intercept: float
    weights: tuple[float, float, float]
    """Of the windows, the shortest first."""
    edges: tuple[float, float]
    """Thirds of the forecasts where it was fitted, bps in 5 s."""

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Forecast | None:
        """From a model's metadata; None where it has none.

        Raises:
            KeyError, TypeError, ValueError: What stands there is no forecast.
        """
        said = metadata.get(METADATA)
        if said is None:
            return None
        one, five, thirty = map(float, said["weights"])
        low, high = map(float, said["edges"])
        return cls(float(said["intercept"]), (one, five, thirty), (low, high))

    def volatility(self, rows: NDArray[np.float32]) -> NDArray[np.float64]:
        """float32[n, features of `mf1`] → float64[n]: bps in the next 5 s; NaN where a window is not known."""
        variance = self.intercept + variances(rows) @ np.array(self.weights)
        volatility: NDArray[np.float64] = np.sqrt(WINDOWS[AHEAD] * np.maximum(variance, 0.0))
        return volatility

    def regimes(self, rows: NDArray[np.float32]) -> NDArray[np.intp]:
        """float32[n, features of `mf1`] → intp[n]: index into `REGIMES`; -1 where nothing is forecast."""
        return regimes(self.volatility(rows), self.edges)


def variances(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """float32[n, features of `mf1`] → float64[n, 3]: the mean variance a second of each window, bps²."""
    realised = rows[:, [features.MF1.index[name] for name in WINDOWS]].astype(np.float64)
    mean: NDArray[np.float64] = realised**2 / np.array(list(WINDOWS.values()))
    return mean


def regimes(volatility: NDArray[np.float64], edges: tuple[float, float]) -> NDArray[np.intp]:
    """float64[n] → intp[n]: index into `REGIMES`, where an edge belongs to the calmer one; -1 where it is NaN."""
    found = np.searchsorted(np.array(edges), volatility, side="left")
    return np.where(np.isnan(volatility), -1, found)
