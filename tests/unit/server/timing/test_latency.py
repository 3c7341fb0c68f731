from __future__ import annotations

import pytest
from support.cases import Clock

from server.timing.latency import LatencyWindow


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def window(clock: Clock) -> LatencyWindow:
    return LatencyWindow(clock, prior_seconds=0.002)


def test_without_samples_the_prior_holds(window: LatencyWindow) -> None:
    assert (window.p50, window.p95) == (0.002, 0.002)


def test_few_samples_count_at_once(window: LatencyWindow) -> None:
    for seconds in (0.001, 0.003, 0.010):
        window.add(seconds)
    assert (window.p50, window.p95) == (0.003, 0.010)


def test_one_slow_sample_of_two_is_not_what_is_expected(window: LatencyWindow) -> None:
    window.add(0.003)
    window.add(0.030)
    assert (window.expected, window.p95) == (0.003, 0.030)


def test_percentiles_of_many_samples(window: LatencyWindow) -> None:
    for number in range(100):
        window.add(number / 1_000)
    assert window.p50 == pytest.approx(0.050, abs=0.01)
    assert window.p95 == pytest.approx(0.095, abs=0.01)
    assert window.p99 == pytest.approx(0.099, abs=0.01)


def test_old_samples_are_forgotten(window: LatencyWindow, clock: Clock) -> None:
    window.add(0.5)
    clock.now += 1.5
    window.add(0.001)
    assert window.p95 == 0.5
    clock.now += 1.5
    assert window.p95 == 0.001
    clock.now += 1.5
    assert window.p95 == 0.002, "the prior again"


def test_clearing_forgets_at_once(window: LatencyWindow) -> None:
    window.add(0.5)
    window.clear()
    assert window.p50 == 0.002


def test_a_recovery_is_expected_from_its_first_quick_sample_on(window: LatencyWindow, clock: Clock) -> None:
    for _ in range(20):
        window.add(0.040)
    assert window.expected == 0.040
    window.add(0.003)
    assert (window.p50, window.expected) == (0.040, 0.003)


def test_one_slow_sample_changes_no_expectation(window: LatencyWindow) -> None:
    for _ in range(20):
        window.add(0.003)
    window.add(0.040)
    assert window.expected == 0.003


def test_without_samples_the_prior_is_expected(window: LatencyWindow, clock: Clock) -> None:
    window.add(0.001)
    clock.now += 3
    assert window.expected == 0.002
