"""The verdict of a soak: what leaks is told from what fills a cache, jumps about, or shrinks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from loadtest.studies.trend import Allowance, trend

MEMORY = Allowance(absolute=8.0, relative=0.05)
MINUTE = 60.0
TIMES = np.arange(0, 30 * MINUTE, 5.0)
"""Half an hour, a sample every five seconds."""


def noise(scale: float) -> NDArray[np.float64]:
    return np.random.default_rng(7).normal(scale=scale, size=len(TIMES))


def judged(values: NDArray[np.float64]) -> tuple[bool, float]:
    found = trend(TIMES.tolist(), values.tolist(), MEMORY, warm_up_seconds=6 * MINUTE)
    return found.flat, found.growth


def test_a_level_that_jumps_about_is_flat() -> None:
    flat, growth = judged(150 + noise(3))
    assert flat
    assert abs(growth) < 2


def test_a_steady_leak_is_found_and_measured() -> None:
    flat, growth = judged(150 + 0.5 * TIMES / MINUTE + noise(1))
    assert not flat
    assert growth == pytest.approx(12, abs=0.5)  # half a MiB a minute over the 24 minutes after the warm-up


def test_a_leak_in_steps_is_found() -> None:
    flat, _ = judged(150 + 4 * np.floor(TIMES / (5 * MINUTE)))
    assert not flat


def test_a_cache_that_fills_up_at_first_is_flat() -> None:
    flat, _ = judged(250 - 100 * np.exp(-TIMES / (1.5 * MINUTE)) + noise(1))
    assert flat


def test_what_goes_up_and_comes_down_every_minute_is_flat() -> None:
    flat, _ = judged(150 + 20 * (TIMES / MINUTE % 1))
    assert flat


def test_a_few_bursts_do_not_make_a_leak() -> None:
    values = 150 + noise(0.5)
    values[-20::3] += 300
    flat, _ = judged(values)
    assert flat


def test_what_shrinks_is_flat() -> None:
    flat, growth = judged(150 - 2 * TIMES / MINUTE)
    assert flat
    assert growth < 0


def test_a_large_series_may_grow_by_its_share() -> None:
    values = 1_000 + TIMES / MINUTE  # 24 MiB after the warm-up, of about a thousand
    assert judged(values)[0]
    assert not trend(TIMES.tolist(), values.tolist(), Allowance(8.0, 0.02), 6 * MINUTE).flat


def test_one_descriptor_a_minute_is_a_leak() -> None:
    found = trend(TIMES.tolist(), (40 + TIMES // MINUTE).tolist(), Allowance(8, 0.0), 6 * MINUTE)
    assert not found.flat
    assert found.growth_per_hour == pytest.approx(60, rel=0.05)


def test_samples_that_are_missing_are_left_out() -> None:
    values = np.full(len(TIMES), 150.0)
    values[::2] = math.nan
    found = trend(TIMES.tolist(), values.tolist(), MEMORY, 0.0)
    assert found.samples == len(TIMES) // 2
    assert found.flat


def test_too_short_a_series_is_refused() -> None:
    with pytest.raises(ValueError, match="there are 4"):
        trend([0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0], MEMORY, 0.0)
    with pytest.raises(ValueError, match="there are 0"):
        trend([0.0], [math.nan], MEMORY, 0.0)
