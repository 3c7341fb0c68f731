"""How many servers, replicas, workers and disks a rate of decisions needs: a calculator over measured costs.

Rows wait only until the next batch may leave and then leave together (no timer; `server/inference/batcher.py`). For
orders that come at random at a rate λ to one server process, with G the gap after a batch and m = λG the rows that come
in it:

    rows of a batch    n = m + e^−m            (the next batch is what came, or the one row that comes next)
    a gap              G = g + b·n
    in a gap           ρ = G / (G + e^−m / λ)  (share of the time in which a row must wait)
    a row's time       0 with probability 1 − ρ, else the rest of the gap; and then its batch's own a + b·n

so batches grow with the rate, and what costs by the batch gets cheaper by the decision. Gaps and times vary
log-normally; the rest of a gap that somebody comes into is a uniform share of a length-biased one. The rows of a batch
come to the journal together and are one commit, or share it with those of others that came during the last. The latency
of an order is the sum of its score, its commit and the rest of its way, drawn 20,000 times with a fixed seed.

On a machine whose c cores are busy to a share U the rest of the way waits for one of them, as in the queue M/M/c: not
at all with probability 1 − P, else for an exponential time of mean (its own time) / (c·(1 − U)), where
P ≈ U^(√(2(c+1)) − 1) (Sakasegawa). Batches, whose threads mostly sleep and are woken at once, were not seen to get
slower. CPU is base + batches·(µs a batch) + decisions·(µs a decision) for each part.

What it leaves out: orders that come in bunches, garbage collections, a noisy neighbour, several processes that share a
replica, and rates of a process beyond those measured: no plan has them. Plan for the peak rate, and leave the
utilisation below one.

Sources: H. Sakasegawa, An approximation formula L_q ≈ α·ρ^β/(1 − ρ), Ann. Inst. Stat. Math. 29 (1977); the wait is the
residual life of a renewal process (e.g. Kleinrock, Queueing Systems I, 5.2). `docs/capacity.md` has the check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from loadtest.costs import Costs, Replica, Stage

_DRAWS: Final = 20_000
_MOST_ROWS: Final = 256
"""Rows of a batch, by default, and so the end of what one replica takes."""
_LINGER_SECONDS: Final = 0.05
"""Shadow rows gather this long."""
_MOST_PROCESSES: Final = 10_000
_SECONDS_A_DAY: Final = 86_400
_NOBODY: Final = 0.01
"""Decisions a second of an idle process."""

Draws = NDArray[np.float64]


class OverloadError(Exception):
    """The rate is more than this can do; says what is full."""


@dataclass(frozen=True, slots=True)
class Queue:
    """Batches at a rate."""

    rows: float
    """Of one, on average."""
    batches: float
    """A second."""
    seconds: float
    """Of one, on average."""
    busy: float
    """Share of the time in which the next one may not leave yet."""


@dataclass(frozen=True, slots=True)
class Load:
    """One server process at a rate, with its primary and its share of everything else."""

    rate: float
    """Decisions a second."""
    replica: Queue
    journal: Queue
    loop: float
    """Share of one core that the event loop takes."""
    cores: float
    """Of the server process, its replicas and its share of the stores."""
    utilisation: float
    """Of the machine's cores."""
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for."""

    rate: float
    """Decisions a second, at the peak."""
    deadline_ms: float
    """In which 99 of 100 are to be answered."""
    cores: int
    """Of one machine."""
    events: float = 0.0
    """Market events a second."""
    limit: float = 0.7
    """Highest utilisation of the cores, of an event loop and of a replica; what is left takes bursts and failures."""
    retention_days: float = 30.0
    """How long the database keeps decisions."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What it takes."""

    processes: int
    """Server processes, each with a primary of its own."""
    per_machine: int
    """Of them on one machine."""
    machines: int
    secondaries: int
    """One for each primary: they are to take all orders when the primaries are lost."""
    challengers: int
    workers: int
    """Feature workers; 0 without events."""
    partitions: int
    """Of the topic of market events: two for each worker, so that it can grow."""
    database_rows: float
    """A second."""
    database_bytes: float
    """After `retention_days` at this rate."""
    journal_bytes: float
    """A second, over all processes."""
    cold_bytes: float
    """A day, as Parquet."""
    load: Load
    """Of each process."""


def must_wait(utilisation: float, cores: float) -> float:
    """Probability that somebody who wants a core must wait for one.

    Raises:
        OverloadError: They are all busy.
    """
    if utilisation >= 1:
        raise OverloadError(f"the cores are full: {utilisation:.0%}")
    return math.pow(utilisation, math.sqrt(2 * (cores + 1)) - 1)


def stretch(utilisation: float, cores: float) -> float:
    """How many times as long something takes on busy cores, on average.

    Raises:
        OverloadError: They are all busy.
    """
    return 1 + must_wait(utilisation, cores) / (cores * (1 - utilisation))


def queue(replica: Replica, rate: float) -> Queue:
    """Batches at a rate, by iteration to the fixed point of their size.

    Args:
        replica: Its costs.
        rate: Rows a second, more than 0.

    Raises:
        OverloadError: Batches would grow beyond 256 rows.
    """
    rows = 1.0
    while True:
        gap = replica.gap_seconds(rows)
        came = rate * gap
        following = came + math.exp(-came)
        if following > _MOST_ROWS:
            raise OverloadError(f"batches of more than {_MOST_ROWS} rows at {rate:,.0f} a second")
        if abs(following - rows) < 1e-9 * rows:
            return Queue(rows, rate / rows, replica.seconds(rows), gap / (gap + math.exp(-came) / rate))
        rows = following


def meanwhile(rows: float) -> float:
    """The m that makes batches of so many rows, n = m + e^−m: how gaps are read off the sizes of batches."""
    found = max(rows - 1, 0.0) ** 0.5 if rows < 2 else rows
    for _ in range(100):
        slope = 1 - math.exp(-found)
        if slope < 1e-9:
            return 0.0
        found = max(0.0, found - (found + math.exp(-found) - rows) / slope)
    return found


def commits(journal: Stage, rate: float, replica: Queue) -> Queue:
    """Commits of the batches' rows: one for each, or fewer where batches come faster than a commit ends.

    Raises:
        OverloadError: Rows come faster than they are written.
    """
    each = rate * journal.row_us / 1e6
    if each >= 1:
        raise OverloadError(f"the journal is full at {rate:,.0f} rows a second")
    rows = max(replica.rows, rate * journal.batch_ms / 1e3 / (1 - each))  # n = λ·S(n)
    seconds = journal.seconds(rows)
    return Queue(rows, rate / rows, seconds, min(1.0, rate / rows * seconds))


def load(costs: Costs, rate: float, cores: float, beside: float = 0.0, sharing: int = 1) -> Load:
    """One server process at a rate.

    Args:
        costs: Measured.
        rate: Decisions a second, of this process.
        cores: Of the machine.
        beside: Cores that something else takes, such as a load generator.
        sharing: Such processes on the machine.

    Raises:
        OverloadError: That is more than it can do.
    """
    replica = queue(costs.replica, rate)
    journal = commits(costs.journal, rate, replica)
    used = _cores(costs, rate, replica.batches)
    utilisation = (sharing * used + beside) / cores
    waiting = must_wait(utilisation, cores)
    loop = costs.loop.cores(rate, replica.batches)
    if loop >= 1:
        raise OverloadError(f"the event loop is full at {rate:,.0f} a second")
    draw = np.random.default_rng(1)
    gap = costs.replica.gap_seconds(replica.rows)
    total = _times(costs.replica, replica.rows, draw) + _wait(gap, costs.replica, replica, draw)
    total += _times(costs.journal, journal.rows, draw) + _wait(journal.seconds, costs.journal, journal, draw)
    turn = costs.rest.seconds(1.0) / (cores * (1 - utilisation))
    total += _times(costs.rest, 1.0, draw) + (draw.random(_DRAWS) < waiting) * draw.exponential(turn, _DRAWS)
    p50, p99 = np.percentile(1e3 * total, (50, 99))
    return Load(rate, replica, journal, loop, used, utilisation, float(p50), float(p99))


def plan(costs: Costs, demand: Demand) -> Plan:
    """The fewest server processes that meet a demand.

    Raises:
        OverloadError: No number of them does; says what stands in the way.
    """
    _fit(costs, replace(demand, rate=_NOBODY), 1)  # what an idle process cannot keep, no number of them does
    why, processes = "", math.ceil(demand.rate / costs.measured.rate)
    while processes <= _MOST_PROCESSES:
        try:
            per_machine, found = _fit(costs, demand, processes)
            return _around(costs, demand, processes, per_machine, found)
        except OverloadError as error:
            why = str(error)
        # One by one at first; beyond, a few too many do no harm.
        processes += max(1, processes // 50)
    raise OverloadError(why)


def _fit(costs: Costs, demand: Demand, processes: int) -> tuple[int, Load]:
    """As many processes as a machine takes, and their load."""
    rate = demand.rate / processes
    alone = load(costs, rate, demand.cores)
    if alone.utilisation > demand.limit:
        raise OverloadError(f"a server process with its replicas fills {alone.utilisation:.0%} of {demand.cores} cores")
    if alone.loop > demand.limit:
        raise OverloadError(f"its event loop is busy to {alone.loop:.0%}")
    if alone.p99_ms > demand.deadline_ms:
        raise OverloadError(f"its p99 is {alone.p99_ms:.1f} ms")
    for per_machine in range(min(processes, int(demand.limit * demand.cores / alone.cores)), 1, -1):
        found = load(costs, rate, demand.cores, sharing=per_machine)
        if found.p99_ms <= demand.deadline_ms and found.utilisation <= demand.limit:
            return per_machine, found
    return 1, alone


def _around(costs: Costs, demand: Demand, processes: int, per_machine: int, found: Load) -> Plan:
    """The rest of the house."""
    database = costs.database
    shadow = max(1 / _LINGER_SECONDS, found.rate / _MOST_ROWS) * found.replica.seconds
    event_cores = demand.events * costs.features.event_us / 1e6
    workers = math.ceil(event_cores / demand.limit)
    return Plan(
        processes=processes,
        per_machine=per_machine,
        machines=math.ceil(processes / per_machine),
        secondaries=processes,
        challengers=math.ceil(processes * shadow / demand.limit),
        workers=workers,
        partitions=max(1, 2 * workers),
        database_rows=demand.rate * database.rows_per_decision,
        database_bytes=demand.rate * database.bytes_per_decision * demand.retention_days * _SECONDS_A_DAY,
        journal_bytes=demand.rate * database.journal_bytes_per_decision,
        cold_bytes=demand.rate * database.cold_bytes_per_decision * _SECONDS_A_DAY,
        load=found,
    )


def _cores(costs: Costs, rate: float, batches: float) -> float:
    """Of a server process and all that works for it."""
    shadows = max(1 / _LINGER_SECONDS, rate / _MOST_ROWS)
    return (
        costs.server.cores(rate, batches)
        + costs.primary.cores(rate, batches)
        + costs.standby.cores(rate, batches)
        + costs.shadow.cores(rate, shadows)
        + costs.stores.cores(rate, batches)
    )


def _times(stage: Stage, rows: float, draw: np.random.Generator) -> Draws:
    """Times of batches of so many rows."""
    return stage.seconds(rows) * draw.lognormal(-(stage.sigma**2) / 2, stage.sigma, _DRAWS)


def _wait(mean: float, stage: Stage, at: Queue, draw: np.random.Generator) -> Draws:
    """What is left of a gap when a row comes: nothing, or a uniform share of a length-biased one."""
    gap = mean * draw.lognormal(stage.sigma**2 / 2, stage.sigma, _DRAWS)
    return (draw.random(_DRAWS) < at.busy) * draw.random(_DRAWS) * gap
