from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from feature_cache.sources.market_facts import (
    FACTS,
    Fact,
    Tape,
    autocorrelation,
    facts,
    kurtosis,
    medians,
    order_signs,
    response,
    tape,
    variance_ratio,
)
from feature_cache.sources.session import read_session, session_files
from feature_cache.sources.simulator import simulate

RECORDED = Path(__file__).parents[4] / "../shared/data/binance_spot"
# Each alone of these depends on where its grid begins by more than a few hundredths.
APART = {"kurtosis of 100 ms returns": 0.25, "kurtosis of 1 s returns": 0.25, "response after 5 s, bp": 0.1}
STEADY = ("autocorrelation", "trade size", "trades that", "spread", "P(next")


def made(*, quotes: Sequence[tuple[float, ...]], trades: Sequence[tuple[float, ...]]) -> Tape:
    return Tape(*np.array(quotes, dtype=float).T, *np.array(trades, dtype=float).T)


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded sessions are not there")
def test_the_recorded_session_has_the_figures_of_the_table() -> None:
    found = facts(tape(read_session(session_files([RECORDED]), {"BTCUSDT.BINANCE"})))
    for fact in FACTS:
        assert found[fact.name] == pytest.approx(fact.recorded, rel=APART.get(fact.name, 0.1), abs=0.025), fact.name


def test_what_varies_little_between_simulated_sessions_is_near_the_recorded_one() -> None:
    # One short session: the others depend on the one or two large moves that it may hold.
    found = facts(tape(simulate(1, ["BTCUSDT.SIM"], duration_seconds=120)))
    for fact in FACTS:
        if fact.name.startswith(STEADY):
            assert abs(found[fact.name] - fact.recorded) <= 2 * fact.tolerance, fact.name


def test_the_median_is_that_of_each_statistic() -> None:
    assert medians([{"a": 1.0, "b": 9.0}, {"a": 2.0, "b": 5.0}, {"a": 7.0, "b": 4.0}]) == {"a": 2.0, "b": 5.0}


def test_a_kurtosis_is_the_excess_over_the_normal_distributions() -> None:
    draws = np.random.default_rng(1).normal(size=100_000)
    assert kurtosis(draws) == pytest.approx(0.0, abs=0.1)
    assert kurtosis(np.where(np.arange(100) < 50, 1.0, -1.0)) == pytest.approx(-2.0)


def test_a_random_walk_has_a_variance_ratio_of_one_and_a_trend_more() -> None:
    steps = np.random.default_rng(1).normal(size=100_000)
    assert variance_ratio(np.cumsum(steps), 30) == pytest.approx(1.0, abs=0.1)
    assert variance_ratio(np.cumsum(np.convolve(steps, np.ones(50))), 30) > 10


def test_an_autocorrelation_is_that_of_the_process() -> None:
    draws = np.random.default_rng(1).normal(size=100_000)
    path = [0.0]
    for draw in draws:
        path.append(0.7 * path[-1] + draw)
    assert autocorrelation(np.array(path), 1) == pytest.approx(0.7, abs=0.01)
    assert autocorrelation(np.array(path), 3) == pytest.approx(0.343, abs=0.02)


QUOTES = [
    (0.0, 100, 9, 101, 1),
    (1.05, 101, 2, 102, 9),
    (2.05, 100, 9, 101, 9),
    (40.0, 100, 9, 101, 9),
]
TRADES = [(1.0, 1000, 1, 1), (1.01, 1000, 2, 1), (2.0, 2000, 1, -1)]


def test_trades_of_one_time_and_side_are_one_order() -> None:
    assert order_signs(made(quotes=QUOTES, trades=TRADES)).tolist() == [1, -1]


def test_a_response_is_the_move_in_the_direction_of_the_trade() -> None:
    after = 1e4 * np.log(101.5 / 100.5)
    assert response(made(quotes=QUOTES, trades=TRADES), 0.5) == pytest.approx(after)
    assert response(made(quotes=QUOTES, trades=TRADES), 5.0) == pytest.approx(after / 3)


def test_the_shares_are_of_the_trades_and_quotes_that_they_say() -> None:
    found = facts(made(quotes=QUOTES, trades=TRADES))
    assert found["trades that empty the level"] == pytest.approx(2 / 3), "of 1, 2 and 1 where 1, 1 and 2 were offered"
    assert found["spread at one tick"] == 1.0
    assert found["P(next mid up | imbalance > 0.6)"] == 1.0


def test_a_tolerance_is_a_distance_or_a_ratio() -> None:
    assert Fact("", 10.0, 2.0).bounds == (8.0, 12.0)
    assert Fact("", 10.0, 2.0, ratio=True).bounds == (5.0, 20.0)
    assert Fact("", -0.3, 1.0).met(0.6)
    assert not Fact("", 10.0, 2.0).met(float("nan"))


def test_without_trades_there_are_no_statistics() -> None:
    with pytest.raises(ValueError, match="no quotes or no trades"):
        tape([])
