"""How seldom equal models are rolled back, and how soon worse ones are found: the promises of `docs/canary.md`."""

from __future__ import annotations

import numpy as np
import pytest
from support.cases import Clock

from server.canary.evidence import NEW_BET, GatheredCheck, Terms
from server.canary.sequential import SequentialTest
from server.canary.study import (
    NEVER,
    ROWS,
    Market,
    exceeded_at,
    false_rollbacks,
    found_within,
    gathered,
    instruments,
    judged,
    kept_at,
    lasting,
    shared_outcomes,
    tables,
    worse_by,
)


def first(test: SequentialTest, differences: list[float], said: str) -> int:
    for number, difference in enumerate(differences, 1):
        test.add(difference)
        if getattr(test, said):
            return number
    return NEVER


def test_many_tests_at_once_say_what_the_servers_own_says_of_each() -> None:
    random = np.random.default_rng(1)
    differences = np.concatenate([random.choice([-1.0, 0.0, 1.0], (12, 400)), np.full((12, 200), 0.3)], axis=1)
    differences[:4] = 1.0
    differences[4:8, 300:] = 0.0
    each = differences.tolist()
    worse = [first(SequentialTest(0.05, 1e-3, 0.05, NEW_BET), one, "exceeded") for one in each]
    kept = [first(SequentialTest(0.05, 1e-3, 0.05, NEW_BET), one, "kept") for one in each]
    assert exceeded_at(differences, 0.05, 1e-3).tolist() == worse
    assert kept_at(differences, 0.05, 0.05).tolist() == kept
    assert len({*worse}) > 2
    assert len({*kept}) > 2


def test_rows_are_gathered_as_a_server_gathers_them() -> None:
    rows = np.random.default_rng(2).random((1, 50 * ROWS))
    check, clock = GatheredCheck("brier", Terms(0.1, 1, 0.001, 0.05), 5.0), Clock()
    for row in rows[0].tolist():
        check.gather("BTCUSDT.SIM", clock.now, row, 0.0)
        clock.now += 5.0 / ROWS
    check.settle(clock.now)
    assert check.samples == 50
    assert check.canary == pytest.approx(gathered(rows).mean())


@pytest.mark.parametrize("rows", [5, 20, 50])
def test_equal_models_whose_rows_share_an_outcome_are_not_rolled_back(rows: int) -> None:
    observations = shared_outcomes(np.random.default_rng(rows), 300, 1_000)
    assert false_rollbacks(observations, "bad_trades") <= 0.01
    if rows >= 20:
        assert false_rollbacks(np.repeat(observations[:100], rows, axis=1), "bad_trades") > 0.5, "as rows they are"


@pytest.mark.parametrize("memory", [5, 10, 40])
def test_equal_models_in_a_market_whose_states_last_are_not_rolled_back(memory: int) -> None:
    """Up to four horizons, at instants that have nothing to do with the server's clock."""
    found = Market.of(np.random.default_rng(memory), 300, 500, memory).trial(np.random.default_rng(3)).differences()
    for check in ("bad_trades", "brier", "missed_trades"):
        assert false_rollbacks(gathered(found[check]), check) <= 0.01


def test_a_tenth_of_the_states_decided_otherwise_is_within_a_tolerance_of_three_tenths() -> None:
    random = np.random.default_rng(10)
    apart = (lasting(random, random.random((300, 500 * ROWS)), ROWS) < 0.1).astype(float)
    assert false_rollbacks(gathered(apart), "disagreement") <= 0.01
    lasting_apart = Market.of(random, 200, 500, 4 * ROWS).trial(random, (0.35, 0.35))
    assert 0.1 < lasting_apart.differences()["disagreement"].mean() < 0.3
    assert judged(lasting_apart).rolled_back <= 0.01, "where outcomes are waited for, to differ for 20 s is no fault"


def test_equal_models_are_not_rolled_back_because_many_instruments_share_their_outcomes() -> None:
    for check in ("bad_trades", "brier"):
        rows, observations = instruments(np.random.default_rng(4), 200, 100, 10, check)
        assert rows.shape == (200, 100 * ROWS * 10)
        assert false_rollbacks(observations, check) <= 0.01


@pytest.mark.parametrize("good", [0, 2_000, 2_050])
def test_twenty_points_of_bad_trades_are_found_within_five_hundred_observations(good: int) -> None:
    median, within = found_within(worse_by(np.random.default_rng(5), 200, 0.2, good, 500), good)
    assert within >= 0.95
    assert median <= 250


def test_ten_points_of_bad_trades_are_found_in_about_five_hundred_observations() -> None:
    median, _ = found_within(worse_by(np.random.default_rng(6), 300, 0.1, 0, 1_500), 0)
    assert median == pytest.approx(500, rel=0.1)


def test_who_is_equal_or_better_is_promoted_and_who_adds_bad_trades_is_not() -> None:
    random = np.random.default_rng(7)
    market = Market.of(random, 200, 800)
    equal, other = judged(market.trial(random)), market.trial(random, (0.1, 2.0))
    better, harmful = judged(other), judged(market.trial(random, (0.1, 0.0), added_bad=0.115))
    assert equal.promoted >= 0.95
    assert equal.rolled_back <= 0.01
    assert other.differences()["disagreement"].mean() > 0.3, "today's tolerance, beyond which it has to be better"
    assert better.promoted >= 0.95
    assert harmful.promoted < 0.01
    assert harmful.rolled_back >= 0.95


@pytest.mark.long
def test_the_tables_of_the_page_hold_with_many_runs() -> None:
    size, power, ends = (list(one) for one in tables(1_000))
    short = [line for line in size[1:] if not line[0].endswith((" 10 horizons", " 12 horizons"))]
    assert max(float(line[3].rstrip("%")) for line in short) <= 1
    assert all(float(line[3].rstrip("%")) >= 95 for line in power[1:] if line[0] != "+10 points")
    assert float(ends[-1][1].rstrip("%")) < 1
