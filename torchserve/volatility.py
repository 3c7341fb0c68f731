"""Fits the forecast of volatility (`feature_cache/har.py`): ordinary least squares, as its source does it.

How much it is worth is for the card to say. Eleven minutes hold some twenty windows of 30 s, and then it explains
little.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from feature_cache import features
from feature_cache.har import AHEAD, WINDOWS, Forecast, variances
from torchserve.dataset import Samples

_PLACE: Final = list(WINDOWS).index(AHEAD)
_FEWEST: Final = 100
"""Instants below which nothing is fitted: four coefficients would follow the noise."""


def fit_forecast(samples: Samples) -> Forecast | None:
    """The forecast that explains these samples best; None where there are too few to say.

    Args:
        samples: In time order.
    """
    known, ahead = pairs(samples)
    if len(ahead) < _FEWEST:
        return None
    intercept, one, five, thirty = least_squares(known, ahead)
    fitted = Forecast(intercept, (one, five, thirty), (0.0, 0.0))
    low, high = np.nanquantile(fitted.volatility(samples.rows), (1 / 3, 2 / 3))
    return Forecast(intercept, (one, five, thirty), (float(low), float(high)))


def forecasts(forecast: Forecast | None, rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64[n]: bps in the next 5 s; NaN where there is no forecast."""
    return np.full(len(rows), np.nan) if forecast is None else forecast.volatility(rows)


def explained(samples: Samples, volatility: NDArray[np.float64]) -> float:
    """How well forecasts rank what became of them: Spearman's correlation, over the samples whose next 5 s are known.

    Ranks, because one jump would decide any other figure. NaN where there are too few to say.

    Args:
        samples: In time order.
        volatility: float64[n], what was forecast for each.
    """
    index, later = followed(samples)
    outcome = samples.rows[later, features.MF1.index[AHEAD]]
    usable = np.isfinite(outcome) & np.isfinite(volatility[index])
    if usable.sum() < _FEWEST:
        return float("nan")
    one, other = (_ranks(values[usable]) for values in (outcome, volatility[index]))
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def pairs(samples: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """float64[n, 3] variances that were known, and float64[n] that of the 5 s after, where all are defined."""
    index, later = followed(samples)
    known: NDArray[np.float64] = variances(samples.rows[index])
    after: NDArray[np.float64] = variances(samples.rows[later])[:, _PLACE]
    usable = np.isfinite(known).all(axis=1) & np.isfinite(after)
    return known[usable], after[usable]


def followed(samples: Samples) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Samples of buys, and the one of the same instrument 5 s after each: indices, where there is one.

    A sell at the same instant knows the same volatility.
    """
    ahead_ns = round(WINDOWS[AHEAD] * 1e9)
    index, later = [np.empty(0, np.intp)], [np.empty(0, np.intp)]
    for number in range(len(samples.instruments)):
        buys = np.flatnonzero((samples.instrument == number) & ~samples.sell)
        time = samples.time_ns[buys]
        place = np.searchsorted(time, time + ahead_ns)
        place = np.minimum(place, max(0, len(time) - 1))
        found = time[place] == time + ahead_ns
        index.append(buys[found])
        later.append(buys[place[found]])
    return np.concatenate(index), np.concatenate(later)


def least_squares(known: NDArray[np.float64], outcome: NDArray[np.float64]) -> tuple[float, ...]:
    """Intercept and weights with the least sum of squared errors."""
    design = np.column_stack([np.ones(len(known)), known])
    coefficients, *_ = np.linalg.lstsq(design, outcome)
    return tuple(coefficients.tolist())


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """float64[n]: the rank of each value; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks
