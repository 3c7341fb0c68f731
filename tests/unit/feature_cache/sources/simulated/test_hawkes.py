from __future__ import annotations

import math
import random

import numpy as np
import pytest

from feature_cache.sources.simulated.hawkes import Hawkes, Kernel


def test_an_arrival_adds_its_kernel_which_decays() -> None:
    process = Hawkes(2.0, [Kernel(0.5, 10.0), Kernel(0.25, 1.0)])
    assert process.intensity() == 2.0
    process.arrive()
    assert process.intensity() == pytest.approx(2.0 + 5.0 + 0.25)
    process.elapse(0.3)
    assert process.intensity() == pytest.approx(2.0 + 5.0 * math.exp(-3.0) + 0.25 * math.exp(-0.3))


def test_news_brings_as_many_arrivals_as_it_says() -> None:
    process = Hawkes(0.0, [Kernel(0.5, 10.0)])
    process.excite(3.0)
    total = 0.0
    for _ in range(40_000):
        total += process.intensity() * 1e-4
        process.elapse(1e-4)
    assert total == pytest.approx(3.0, rel=0.01), "the integral of the intensity"


def test_thinning_gives_the_mean_rate_and_the_bursts_of_the_formula() -> None:
    source, process = random.Random(1), Hawkes(5.0, [Kernel(0.5, 50.0)])
    now, arrivals = 0.0, []
    while now < 2_000:
        bound = process.intensity()
        wait = source.expovariate(bound)
        now += wait
        process.elapse(wait)
        if source.random() * bound < process.intensity():
            process.arrive()
            arrivals.append(now)
    counts = np.bincount(np.array(arrivals).astype(int))
    assert counts.mean() == pytest.approx(5.0 / (1 - 0.5), rel=0.05)
    assert counts.var() / counts.mean() == pytest.approx(1 / (1 - 0.5) ** 2, rel=0.15), "Fano factor, windows ≫ 1/β"
