"""The forecast of volatility: least squares as the package `arch` does them, and what it is worth is said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from feature_cache import features
from feature_cache.har import variances
from torchserve.dataset import STEP_NS, Samples
from torchserve.training import TrainedModel
from torchserve.volatility import explained, fit_forecast, forecasts, least_squares, pairs

ARCH: tuple[float, ...] = (0.14915528134153505, 0.3627087901366221, 0.13320679246687323, 0.3831937929949908)
"""What `HARX(variance_of_seconds(), lags=[1, 5, 30], rescale=False).fit()` of arch 8.0.0 makes of the series: constant,
and the weights of the means of the last 1, 5 and 30 values."""


def variance_of_seconds() -> NDArray[np.float64]:
    """float64[570]: a second's realised variance, which remembers the last 1, 5 and 30 seconds."""
    random = np.random.default_rng(11)
    y = np.ones(600)
    for t in range(30, 600):
        mean = 0.1 + 0.3 * y[t - 1] + 0.35 * y[t - 5 : t].mean() + 0.25 * y[t - 30 : t].mean()
        y[t] = mean * random.gamma(4.0, 0.25)
    return y[30:]


def rows_of(y: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32[n - 29, n_features]: vectors at the end of each second from the thirtieth on."""
    ends = np.arange(30, len(y) + 1)
    rows = np.zeros((len(ends), features.N_FEATURES), np.float32)
    for window, name in ((1, "rv_1s_bps"), (5, "rv_5s_bps"), (30, "rv_30s_bps")):
        rows[:, features.INDEX[name]] = [math.sqrt(y[end - window : end].sum()) for end in ends]
    return rows


def test_the_coefficients_are_those_of_the_package_arch() -> None:
    y = variance_of_seconds()
    known = variances(rows_of(y))[:-1]
    assert least_squares(known, y[30:]) == pytest.approx(ARCH, rel=1e-5)
    exact = np.array([[y[t - 1], y[t - 5 : t].mean(), y[t - 30 : t].mean()] for t in range(30, len(y))])
    assert least_squares(exact, y[30:]) == pytest.approx(ARCH, rel=1e-9)


def samples_of(rows: NDArray[np.float32], time_ns: NDArray[np.int64]) -> Samples:
    n = len(rows)
    return Samples(
        rows=np.concatenate([rows, features.MF1.for_sell(rows)]),
        eligible=np.ones(2 * n, np.bool_),
        markout_bps=np.zeros(2 * n),
        time_ns=np.concatenate([time_ns, time_ns]),
        sell=np.repeat([False, True], n),
        instrument=np.zeros(2 * n, np.int16),
        instruments=("A.SIM",),
        source="test",
    )


def test_what_is_forecast_is_the_variance_of_the_five_seconds_after() -> None:
    y = variance_of_seconds()
    rows = rows_of(y)
    time = np.arange(len(rows), dtype=np.int64) * 10**9
    known, after = pairs(samples_of(rows, time))
    assert len(after) == len(rows) - 5, "each instant counts once, and the last ones have no future"
    assert after[0] == pytest.approx(y[30:35].mean(), rel=1e-5)
    gap = time + np.where(np.arange(len(time)) >= 100, STEP_NS // 2, 0)
    assert len(pairs(samples_of(rows, gap))[1]) == len(rows) - 10, "nor have those before a gap"
    assert known.shape == (len(after), 3)


def test_thirds_of_the_forecasts_are_the_regimes() -> None:
    samples = samples_of(rows_of(variance_of_seconds()), np.arange(541, dtype=np.int64) * 10**9)
    fitted = fit_forecast(samples)
    assert fitted is not None
    counts = np.bincount(fitted.regimes(samples.rows), minlength=3)
    assert counts == pytest.approx([len(samples.rows) / 3] * 3, abs=2)
    forecast, outcome = fitted.volatility(samples.rows[:536]), samples.rows[5:541, features.INDEX["rv_5s_bps"]]
    said = explained(samples, fitted.volatility(samples.rows))
    assert said == pytest.approx(spearmanr(forecast, outcome)[0], abs=1e-6)
    assert said > 0.3, "this market remembers"


def test_of_too_few_samples_nothing_is_forecast() -> None:
    few = samples_of(rows_of(variance_of_seconds())[:90], np.arange(90, dtype=np.int64) * 10**9)
    assert fit_forecast(few) is None
    assert np.isnan(forecasts(None, few.rows)).all()
    assert math.isnan(explained(few, forecasts(None, few.rows)))


def test_a_model_carries_the_forecast_of_what_fitted_it(models: dict[str, TrainedModel]) -> None:
    champion, challenger = models["champion"].volatility, models["challenger"].volatility
    assert champion == challenger is not None
