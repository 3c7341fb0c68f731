"""The sequential test errs as rarely as it promises, however often it is looked at, and is quick where it can be."""

from __future__ import annotations

import numpy as np
import pytest

from server.canary.sequential import SequentialTest

RUNS = 200


def observed(test: SequentialTest, differences: np.ndarray) -> int | None:
    """After how many differences it says `exceeded`; None when it never does."""
    for number, difference in enumerate(differences.tolist(), 1):
        test.add(difference)
        if test.exceeded:
            return number
    return None


def three_valued(random: np.random.Generator, mean: float, n: int) -> np.ndarray:
    """Differences of -1, 0 and 1 with this mean, most of them 0."""
    return random.choice([-1.0, 0.0, 1.0], n, p=[0.2 - mean / 2, 0.6, 0.2 + mean / 2])


@pytest.mark.parametrize("mean", [0.0, 0.1])
def test_false_alarms_are_as_rare_as_promised_though_every_observation_is_looked_at(mean: float) -> None:
    """The tolerance is 0.1: at 0.1 the null hypothesis is at its boundary, the worst case."""
    random = np.random.default_rng(7)
    promised = 0.1
    alarms = sum(
        observed(SequentialTest(0.1, promised, 0.05, 100), three_valued(random, mean, 1_000)) is not None
        for _ in range(RUNS)
    )
    assert alarms <= RUNS * promised


def test_false_proofs_are_as_rare_as_promised() -> None:
    random = np.random.default_rng(8)
    promised, proofs = 0.1, 0
    for _ in range(RUNS):
        test = SequentialTest(0.1, 0.001, promised, 100)
        for difference in three_valued(random, 0.1, 1_000).tolist():
            test.add(difference)
        proofs += test.kept
    assert proofs <= RUNS * promised


def test_differences_that_depend_on_the_past_are_covered_too() -> None:
    """Half of the time well below the tolerance, half of the time at it, in long phases: no more alarms."""
    random = np.random.default_rng(9)
    promised, alarms = 0.1, 0
    for _ in range(RUNS):
        phases = [three_valued(random, mean, 250) for mean in (-0.2, 0.1, -0.2, 0.1)]
        alarms += observed(SequentialTest(0.1, promised, 0.05, 100), np.concatenate(phases)) is not None
    assert alarms <= RUNS * promised


def test_what_is_always_worse_is_found_within_thirty_observations() -> None:
    found = observed(SequentialTest(0.1, 1e-4, 0.05, 100), np.ones(100))
    assert found is not None
    assert found <= 30


@pytest.mark.parametrize("good", [0, 2_000, 2_050, 2_090, 10_000])
def test_what_turns_worse_after_a_good_time_is_found_soon_whenever_that_is(good: int) -> None:
    bad = (np.random.default_rng(10).random(1_000) < 0.5).astype(float)
    found = observed(SequentialTest(0.1, 1e-4, 0.05, 100), np.concatenate([np.zeros(good), bad]))
    assert found is not None
    assert 20 < found - good <= 130


def test_what_is_never_worse_is_proven_soon_and_anew_after_a_restart() -> None:
    test = SequentialTest(0.05, 1e-4, 0.05, 100)
    kept = []
    for _ in range(2):
        test.restart()
        for _ in range(150):
            kept.append(test.kept)
            test.add(0.0)
        kept.append(test.kept)
    assert kept[0] is kept[151] is False
    assert kept[150] is kept[-1] is True
    assert kept[:151] == kept[151:]
    assert not test.exceeded


def test_an_alarm_is_kept_over_a_restart_and_over_better_times() -> None:
    test = SequentialTest(0.1, 1e-4, 0.05, 100)
    observed(test, np.ones(50))
    test.restart()
    observed(test, -np.ones(500))
    assert test.exceeded


@pytest.mark.parametrize("difference", [-1.0, 1.0])
def test_the_extremes_ruin_no_gambler_for_ever(difference: float) -> None:
    test = SequentialTest(0.5, 1e-4, 0.05, 100)
    observed(test, np.full(1_000, difference))
    observed(test, np.full(300, -difference))
    assert test.exceeded
