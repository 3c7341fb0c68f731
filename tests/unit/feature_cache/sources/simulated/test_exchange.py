from __future__ import annotations

import random

import numpy as np
import pytest

from feature_cache.sources.simulated.exchange import LEVELS, MOST_LEVELS, Exchange, Flow, Sizes
from feature_cache.sources.simulated.value import Value, Volatility

STILL = Volatility(diffusion=0.0, jumps=0.0)


def exchange(flow: Flow | None = None, volatility: Volatility = STILL) -> Exchange:
    return Exchange("1", Value("1", 60_000.0, volatility), 0.01, 1e8, flow or Flow())


def test_the_book_is_never_crossed_nor_short_of_levels_nor_too_long() -> None:
    market = exchange(volatility=Volatility())
    while market.now < 12:
        market.step(12.0)
        assert market.bids.best() < market.asks.best()
        for side in (market.bids, market.asks):
            assert LEVELS <= len(side.keys) <= MOST_LEVELS
            assert side.keys == sorted(side.sizes[price] and side.sign * price for price in side.sizes)


def test_a_levels_size_is_that_of_its_orders() -> None:
    market = exchange(volatility=Volatility())
    while market.now < 20:
        market.step(20.0)
    for side in (market.bids, market.asks):
        assert {price: sum(queue) for price, queue in side.queues.items()} == side.sizes


def test_the_mid_follows_the_value() -> None:
    market = exchange()
    while market.now < 5:
        market.step(5.0)
    market._value.shift(20.0)
    while market.now < 8:
        market.step(8.0)
    mid = (market.bids.best() + market.asks.best()) / 2
    assert 1e4 * (mid / 6_000_000 - 1) == pytest.approx(20, abs=6), "basis points"


def test_a_pause_lets_time_pass_and_changes_nothing() -> None:
    market = exchange()
    updates = market.bids.updates
    market.pause(5.0)
    assert market.now == 5.0
    assert market.bids.updates == updates


def test_sizes_are_log_uniform_with_a_power_law_tail() -> None:
    source, sizes = random.Random(1), Sizes(0.01, 1.0, 1000.0, 0.2, 1.0)
    drawn = np.array([sizes.draw(source) for _ in range(50_000)])
    assert np.mean(drawn > 1.0) == pytest.approx(0.2, abs=0.01)
    assert np.mean(drawn > 10.0) == pytest.approx(0.02, abs=0.004)
    assert np.mean(drawn < 0.1) == pytest.approx(0.4, abs=0.01)
    assert drawn.min() >= 0.01
    assert drawn.max() <= 1000.0
