"""What the points of `local.capacity_bench` cost, and what the model makes of them."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from loadtest.capacity import OverloadError, commits, load, meanwhile, queue, stretch
from loadtest.costs import Costs, Cpu, Measured, Replica, Stage

_STORES: Final = ("valkey", "postgres")
_FULL: Final = 0.97
"""Of a machine that is busier than that nothing can be said."""


@dataclass(frozen=True, slots=True)
class Batches:
    """What a histogram of batches says of one stretch of time."""

    a_second: float
    rows: float
    """On average."""
    mean_ms: float
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True)
class Point:
    """One rate."""

    rate: float
    """Decisions a second that were made."""
    errors: int
    p50_ms: float
    """Of the callers', as the next two."""
    p99_ms: float
    mean_ms: float
    replica: Batches
    journal: Batches
    cores: Mapping[str, float]
    """CPU that each part used, in cores; `loop` is the busiest thread of the server."""
    generator: float
    """That of the load generator, in cores."""
    utilisation: float
    """Share of the machine's cores that the stack and the generator used."""
    shadow_batches: float
    """A second."""


def quantile(cumulative: Sequence[tuple[float, float]], share: float) -> float:
    """A quantile of a histogram, by geometric interpolation within its bucket.

    Args:
        cumulative: (upper edge, count up to it), ascending; the last edge is infinite.
        share: In (0, 1).
    """
    wanted = share * cumulative[-1][1]
    below, count = cumulative[0][0] / 2, 0.0
    for edge, upto in cumulative:
        if upto >= wanted and upto > count:
            if math.isinf(edge):
                return below
            return below * math.pow(edge / below, (wanted - count) / (upto - count))
        below, count = edge, upto
    return below


def fit(
    idle: Mapping[str, float],
    points: Sequence[Point],
    crowd: Sequence[Point],
    database: Mapping[str, float],
    known: Costs,
) -> Costs:
    """The costs that explain the points best.

    Args:
        idle: Cores of each part while nobody asks.
        points: At least three.
        crowd: More, for the CPU alone: no orders that come at random.
        database: What was measured of `Database`.
        known: For what is not measured here: features, database, and rows of a batch on the replica.
    """
    cores = os.cpu_count() or 1

    def cpu(parts: Iterable[str], batches: Sequence[float]) -> Cpu:
        base = sum(idle[part] for part in parts)
        all_of_them = (*points, *crowd)
        used = [sum(point.cores[part] for part in parts) - base for point in all_of_them]
        a_batch, a_row = _line([(each, point.rate) for each, point in zip(batches, all_of_them, strict=True)], used)
        return Cpu(base_cores=base, batch_us=1e6 * a_batch, row_us=1e6 * a_row)

    def stage(found: Sequence[Batches], times_ms: Sequence[float], row_us: float) -> Stage:
        batch_ms = [ms - each.rows * row_us / 1e3 for each, ms in zip(found, times_ms, strict=True)]
        sigmas = [math.log(each.p95_ms / each.p50_ms) / 1.645 for each in found]
        return Stage(batch_ms=max(0.0, statistics.median(batch_ms)), row_us=row_us, sigma=statistics.median(sigmas))

    sent = [point.replica.a_second for point in (*points, *crowd)]
    scored = stage([one.replica for one in points], [one.replica.mean_ms for one in points], known.replica.row_us)
    gaps = [
        1e3 * meanwhile(point.replica.rows) / point.rate - point.replica.rows * scored.row_us / 1e3 for point in points
    ]
    replica = Replica(**scored.model_dump(), gap_ms=max(0.0, statistics.median(gaps)))
    journal = stage([one.journal for one in points], [one.journal.mean_ms for one in points], known.journal.row_us)
    rest = []
    for point in points:
        at = queue(replica, point.rate)
        written = commits(journal, point.rate, at)
        waits = at.busy / 2 * replica.gap_seconds(at.rows) * math.exp(replica.sigma**2)
        waits += written.busy / 2 * written.seconds * math.exp(journal.sigma**2)
        known_ms = 1e3 * (waits + at.seconds + written.seconds)
        rest.append((point.mean_ms - known_ms) / stretch(min(_FULL, point.utilisation), cores))
    return Costs(
        measured=Measured(rate=max(point.rate for point in (*points, *crowd))),
        replica=replica,
        journal=journal,
        rest=Stage(batch_ms=max(0.0, statistics.median(rest)), row_us=0.0, sigma=replica.sigma),
        loop=cpu(("loop",), sent),
        server=cpu(("server",), sent),
        primary=cpu(("primary",), sent),
        shadow=cpu(("challenger",), [point.shadow_batches for point in (*points, *crowd)]),
        standby=cpu(("secondary",), sent),
        stores=cpu(_STORES, sent),
        features=known.features,
        database=known.database.model_copy(update=dict(database)),
    )


def _line(features: Sequence[tuple[float, float]], values: Sequence[float]) -> tuple[float, float]:
    """Least squares without negative coefficients."""
    from sklearn.linear_model import LinearRegression  # noqa: PLC0415 - slow to import

    fitted = LinearRegression(positive=True, fit_intercept=False).fit(np.asarray(features), np.asarray(values))
    a, b = fitted.coef_
    return float(a), float(b)


def check(costs: Costs, point: Point, cores: int) -> dict[str, dict[str, float]]:
    """What the model says of a point, next to what was measured there.

    The rest of the stack and the load generator run beside the server.
    """
    own = sum(point.cores[part] for part in ("server", "primary", "secondary", "challenger", *_STORES))
    beside = min(_FULL, point.utilisation) * cores - own
    measured = {
        "rate": point.rate,
        "rows of a batch": point.replica.rows,
        "ms of a batch": point.replica.mean_ms,
        "gap after it, ms": 1e3 * meanwhile(point.replica.rows) / point.rate,
        "rows of a commit": point.journal.rows,
        "ms of a commit": point.journal.mean_ms,
        "server cores": point.cores["server"],
        "event loop": point.cores["loop"],
        "p50 ms": point.p50_ms,
        "p99 ms": point.p99_ms,
    }
    try:
        said = load(costs, point.rate, cores, beside=beside)
    except OverloadError:
        return {"measured": measured, "model": {}}
    model = {
        "rate": said.rate,
        "rows of a batch": said.replica.rows,
        "ms of a batch": 1e3 * said.replica.seconds,
        "gap after it, ms": 1e3 * costs.replica.gap_seconds(said.replica.rows),
        "rows of a commit": said.journal.rows,
        "ms of a commit": 1e3 * said.journal.seconds,
        "server cores": costs.server.cores(said.rate, said.replica.batches),
        "event loop": said.loop,
        "p50 ms": said.p50_ms,
        "p99 ms": said.p99_ms,
    }
    return {"measured": measured, "model": model}
