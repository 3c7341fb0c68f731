"""The capacity model: its formulas against a simulated queue, its plans, and its costs file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from capacity_costs import COSTS
from numpy.typing import NDArray

from loadtest.capacity import Demand, OverloadError, load, meanwhile, plan, queue, stretch
from loadtest.costs import Costs, Measured, Replica, Stage

ONE_SLOT = Replica(batch_ms=1.2, gap_ms=1.2, row_us=5.0, sigma=0.4)


def simulated(stage: Replica, rate: float, orders: int = 60_000) -> tuple[float, NDArray[np.float64]]:
    """Mean rows of a batch, and every row's time, in a queue with one slot that is played through order by order."""
    random = np.random.default_rng(3)
    arrivals = np.cumsum(random.exponential(1 / rate, orders))
    times, first, free, batches = np.empty(orders), 0, 0.0, 0
    while first < orders:
        leaves = max(free, arrivals[first])
        last = int(np.searchsorted(arrivals, leaves, side="right"))
        took = stage.seconds(last - first) * random.lognormal(-(stage.sigma**2) / 2, stage.sigma)
        free = leaves + took
        times[first:last] = free - arrivals[first:last]
        first, batches = last, batches + 1
    return orders / batches, times


@pytest.mark.parametrize("rate", [50.0, 500.0, 1_500.0, 6_000.0])
def test_batch_sizes_and_latencies_are_those_of_a_simulated_queue(rate: float) -> None:
    rows, times = simulated(ONE_SLOT, rate)
    at = queue(ONE_SLOT, rate)
    assert at.rows == pytest.approx(rows, rel=0.1)
    nothing = Stage(batch_ms=0.0, row_us=0.0, sigma=0.0)
    only = COSTS.model_copy(update={"replica": ONE_SLOT, "journal": nothing, "rest": nothing})
    found = load(only, rate, cores=10_000)  # so many that nothing is slowed down
    assert found.p50_ms == pytest.approx(1e3 * np.median(times), rel=0.12)
    assert found.p99_ms == pytest.approx(1e3 * np.percentile(times, 99), rel=0.15)


@pytest.mark.parametrize("rate", [1.0, 300.0, 3_000.0])
def test_the_time_of_a_batch_can_be_read_off_its_size(rate: float) -> None:
    at = queue(ONE_SLOT, rate)
    assert meanwhile(at.rows) / rate == pytest.approx(ONE_SLOT.gap_seconds(at.rows), rel=1e-3)


def test_a_lone_order_waits_for_nobody() -> None:
    at = queue(ONE_SLOT, 1e-6)
    assert at.rows == pytest.approx(1)
    assert at.busy == pytest.approx(0, abs=1e-6)
    assert at.seconds == pytest.approx(ONE_SLOT.seconds(1))


def test_batches_grow_until_they_are_full() -> None:
    sizes = [queue(ONE_SLOT, rate).rows for rate in (100, 1_000, 10_000, 50_000)]
    assert sizes == sorted(sizes)
    with pytest.raises(OverloadError, match="more than 256 rows"):
        queue(ONE_SLOT, 200_000)


def test_busy_cores_slow_everything_down_without_end() -> None:
    assert stretch(0.0, 2) == 1
    assert 1 < stretch(0.5, 2) < stretch(0.9, 2) < stretch(0.99, 2)
    assert stretch(0.5, 1) == pytest.approx(2)  # M/M/1: 1 / (1 - U)
    assert stretch(0.8, 16) < stretch(0.8, 2)
    with pytest.raises(OverloadError, match="cores are full"):
        stretch(1.0, 2)


def test_a_load_beside_it_makes_a_server_slower() -> None:
    assert load(COSTS, 200, cores=4, beside=2.0).p99_ms > load(COSTS, 200, cores=4).p99_ms


def test_a_plan_keeps_its_promises() -> None:
    demand = Demand(rate=10_000, deadline_ms=50, cores=16, events=100_000)
    found = plan(COSTS, demand)
    assert found.processes * found.load.rate == pytest.approx(demand.rate)
    assert found.load.p99_ms <= demand.deadline_ms
    assert found.load.utilisation <= demand.limit
    assert found.load.loop <= demand.limit
    assert found.per_machine * found.machines >= found.processes
    assert found.workers == math.ceil(100_000 * COSTS.features.event_us / 1e6 / demand.limit)
    assert found.database_rows == 10_000 * COSTS.database.rows_per_decision
    # One process fewer would break a promise.
    assert load(COSTS, demand.rate / (found.processes - 1), demand.cores).loop > demand.limit


def test_more_orders_take_no_fewer_processes() -> None:
    processes = [plan(COSTS, Demand(rate, 50, 16)).processes for rate in (500, 2_000, 8_000, 32_000)]
    assert processes == sorted(processes)


def test_no_process_is_given_more_than_one_was_seen_to_do() -> None:
    known = COSTS.model_copy(update={"measured": Measured(rate=700.0)})
    found = plan(known, Demand(rate=10_000, deadline_ms=50, cores=16))
    assert found.processes == 15
    assert found.load.rate <= 700


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(OverloadError, match="p99"):
        plan(COSTS, Demand(rate=100, deadline_ms=0.01, cores=64))
    busy = COSTS.model_copy(update={"loop": COSTS.loop.model_copy(update={"base_cores": 0.9})})
    with pytest.raises(OverloadError, match="event loop"):
        plan(busy, Demand(rate=100, deadline_ms=1e4, cores=64))


def test_costs_are_read_as_they_were_written(tmp_path: Path) -> None:
    COSTS.write(tmp_path / "costs.toml", "for a test")
    again = Costs.read(tmp_path / "costs.toml")
    for name, section in COSTS.model_dump().items():
        assert again.model_dump()[name] == pytest.approx(section, rel=1e-3)
    (tmp_path / "costs.toml").write_text("[replica]\nbatch_ms = -1\n")
    with pytest.raises(ValueError, match="batch_ms"):
        Costs.read(tmp_path / "costs.toml")


def test_a_demand_without_events_needs_no_worker() -> None:
    found = plan(COSTS, Demand(rate=100, deadline_ms=100, cores=16))
    assert (found.workers, found.partitions) == (0, 1)
