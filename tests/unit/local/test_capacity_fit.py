"""What the capacity benchmark makes of its points: it finds the costs that made them."""

from __future__ import annotations

import math
import os

import pytest
from capacity_costs import COSTS

from loadtest.capacity import load
from local.capacity_fit import Batches, Point, check, fit, quantile

CORES = os.cpu_count() or 1
PARTS = {
    "loop": COSTS.loop,
    "server": COSTS.server,
    "primary": COSTS.primary,
    "secondary": COSTS.standby,
    "challenger": COSTS.shadow,
    "valkey": COSTS.stores.model_copy(update={"base_cores": 0.0, "batch_us": 0.0, "row_us": 0.0}),
    "postgres": COSTS.stores,
}


def point(rate: float) -> Point:
    """What a machine would measure whose costs are ours, and on which nothing else runs."""
    at = load(COSTS, rate, cores=1_000)
    shadows = max(20.0, rate / 256)
    cores = {
        part: cpu.cores(rate, shadows if part == "challenger" else at.replica.batches) for part, cpu in PARTS.items()
    }
    ms = COSTS.journal.seconds(at.journal.rows) * 1e3
    return Point(
        rate=rate,
        errors=0,
        p50_ms=at.p50_ms,
        p99_ms=at.p99_ms,
        mean_ms=at.p50_ms,
        replica=Batches(
            *(at.replica.batches, at.replica.rows, 1e3 * at.replica.seconds),
            *(2.0, 2.0 * math.exp(1.645 * COSTS.replica.sigma)),
        ),
        journal=Batches(at.journal.batches, at.journal.rows, ms, 0.5, 0.5 * math.exp(1.645 * COSTS.journal.sigma)),
        cores=cores,
        generator=0.1,
        utilisation=0.0,
        shadow_batches=shadows,
    )


IDLE = {part: cpu.base_cores for part, cpu in PARTS.items()}
POINTS = [point(rate) for rate in (100.0, 300.0, 600.0, 900.0, 1_200.0)]
FOUND = fit(IDLE, POINTS, [point(3_000.0)], {"bytes_per_decision": 1_234.0}, COSTS)


def test_the_time_of_a_batch_and_its_spread_are_found() -> None:
    assert FOUND.replica.batch_ms == pytest.approx(COSTS.replica.batch_ms, rel=1e-2)
    assert FOUND.replica.gap_ms == pytest.approx(COSTS.replica.gap_ms, rel=1e-2)
    assert FOUND.replica.sigma == pytest.approx(COSTS.replica.sigma, rel=1e-6)
    assert FOUND.journal.batch_ms == pytest.approx(COSTS.journal.batch_ms, rel=1e-2)


@pytest.mark.parametrize("part", ["loop", "server", "primary", "standby", "stores"])
def test_the_cpu_of_a_part_is_found(part: str) -> None:
    found, wanted = getattr(FOUND, part), getattr(COSTS, part)
    for rate, batches in ((200.0, 150.0), (1_000.0, 250.0)):
        assert found.cores(rate, batches) == pytest.approx(wanted.cores(rate, batches), rel=0.02, abs=1e-4)


def test_what_is_not_measured_here_is_kept() -> None:
    assert FOUND.features == COSTS.features
    assert FOUND.database.bytes_per_decision == 1_234.0
    assert FOUND.database.rows_per_second == COSTS.database.rows_per_second


def test_a_check_says_both() -> None:
    checked = check(FOUND, POINTS[2], CORES)
    assert checked["measured"].keys() == checked["model"].keys()
    assert checked["model"]["rows of a batch"] == pytest.approx(checked["measured"]["rows of a batch"], rel=0.02)
    assert checked["model"]["server cores"] == pytest.approx(checked["measured"]["server cores"], rel=0.02)


def test_a_quantile_is_found_within_its_bucket() -> None:
    cumulative = [(1.0, 0.0), (2.0, 50.0), (4.0, 100.0), (math.inf, 100.0)]
    assert quantile(cumulative, 0.25) == pytest.approx(2**0.5)
    assert quantile(cumulative, 0.5) == pytest.approx(2.0)
    assert quantile(cumulative, 0.75) == pytest.approx(8**0.5)
    assert quantile([(1.0, 0.0), (math.inf, 10.0)], 0.5) == 1.0
