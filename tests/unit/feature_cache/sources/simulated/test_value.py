from __future__ import annotations

import math

import numpy as np
import pytest

from feature_cache.sources.simulated.value import Value, Volatility

STILL = Volatility(diffusion=0.0, jumps=0.0)


def test_the_path_does_not_depend_on_when_it_is_asked_for() -> None:
    often, rarely = (Value("1", 100.0, Volatility()) for _ in range(2))
    for moment in range(1, 1000):
        often.at(moment / 100)
    assert often.at(20.0) == rarely.at(20.0)
    assert often.at(20.0) != Value("2", 100.0, Volatility()).at(20.0)


def test_the_diffusion_has_its_standard_deviation() -> None:
    value = Value("1", 100.0, Volatility(diffusion=2.0, sigma=0.0, jumps=0.0))
    path = np.log([value.at(float(second)) for second in range(1_000)]) * 1e4
    assert np.diff(path).std() == pytest.approx(2.0, rel=0.08), "basis points over a second"


def test_jumps_come_as_often_and_are_as_large_as_they_should_be() -> None:
    volatility = Volatility(diffusion=0.0, jumps=0.5, smallest=1.0, tail=2.0, largest=10.0)
    value = Value("1", 100.0, volatility)
    path = np.log([value.at((step + 0.5) / 100) for step in range(200_000)]) * 1e4
    jumps = np.abs(np.diff(path))
    jumps = jumps[jumps > 1e-6]
    assert len(jumps) / 2_000 == pytest.approx(0.5, rel=0.1)
    assert jumps.min() > 1 - 1e-6
    assert jumps.max() < 10 + 1e-6
    assert np.mean(jumps > 2) == pytest.approx(0.25, abs=0.04), "P(jump > x) = x^-2"


def test_news_moves_the_value_and_is_remembered() -> None:
    value = Value("1", 100.0, STILL)
    value.shift(-30.0)
    assert value.at(1.0) == pytest.approx(100 * math.exp(-0.003))
    assert value.news == 30.0


def test_a_scaled_volatility_moves_by_so_much_more() -> None:
    double = Volatility(diffusion=1.0, smallest=0.5, largest=9.0).scaled(2.0)
    assert (double.diffusion, double.smallest, double.largest) == (2.0, 1.0, 18.0)
