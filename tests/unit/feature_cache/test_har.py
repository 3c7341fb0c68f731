"""A forecast of volatility and its regimes, from the realised volatilities that are in the vector."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from feature_cache import features
from feature_cache.har import METADATA, REGIMES, Forecast, regimes

FORECAST = Forecast(0.5, (0.25, 0.5, 1.0), (2.0, 3.0))


def row(one: float, five: float, thirty: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = np.zeros((1, features.N_FEATURES), dtype=np.float32)
    for name, value in (("rv_1s_bps", one), ("rv_5s_bps", five), ("rv_30s_bps", thirty)):
        values[0, features.INDEX[name]] = value
    return values


def test_the_forecast_is_linear_in_the_mean_variances_a_second() -> None:
    # Variances a second of 4, 5 and 30 bps²: 0.5 + 0.25 * 4 + 0.5 * 5 + 1 * 30 = 34, and five seconds of that.
    assert FORECAST.volatility(row(2.0, 5.0, 30.0))[0] == pytest.approx(math.sqrt(5 * 34))


def test_a_negative_variance_counts_as_none_and_an_unknown_window_as_unknown() -> None:
    assert Forecast(-1.0, (0.0, 0.0, 0.0), (2.0, 3.0)).volatility(row(1.0, 1.0, 1.0))[0] == 0.0
    assert math.isnan(FORECAST.volatility(row(1.0, math.nan, 1.0))[0])


def test_an_edge_belongs_to_the_calmer_regime() -> None:
    found = regimes(np.array([0.0, 2.0, 2.1, 3.0, 3.1, math.nan]), FORECAST.edges)
    assert found.tolist() == [0, 0, 1, 1, 2, -1]
    assert len(REGIMES) == 3


def test_it_stands_in_the_metadata_of_a_model() -> None:
    assert Forecast.of({METADATA: asdict(FORECAST)}) == FORECAST
    assert Forecast.of({METADATA: None}) is None
    assert Forecast.of({}) is None, "of a model from before"
    with pytest.raises(ValueError, match="unpack"):
        Forecast.of({METADATA: asdict(FORECAST) | {"weights": [1.0]}})
