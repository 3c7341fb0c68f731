"""`pretrade bench-capacity`: measures the costs that `loadtest.capacity` plans with, and how well it foretells.

The whole stack decides at several rates, one after the other; orders come at random. At each of them it is seen how
large batches are, how long they take, and what CPU every part uses. The CPU of a part is the line through these points
that has no negative coefficient, and through one more, where there is an h2load: a crowd of callers, which tells what
rows cost apart from batches. The rates of `_HELD_OUT` take no part in it, and what the model says of them is compared
with what they were. It wants a machine of its own, or a priority (`nice -n -10`) that makes it one.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import grpc.aio
import numpy as np
import psutil
import psycopg
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url

from loadtest import h2load
from loadtest.costs import Costs
from loadtest.open_loop import Answer, call_decide_at_rate
from loadtest.orders import OrderFlow
from local.capacity_fit import Batches, Point, check, fit, quantile
from local.command import OK, run_with_stack
from local.settings import LocalSettings
from local.stack import Stack
from pretrade.decision.v1 import decision_pb2_grpc

_HELD_OUT: Final = (1, 3)
"""The second and the fourth rate."""
_CROWD: Final = 64
_SETTLE_SECONDS: Final = 3.0
_SHIPPED_SECONDS: Final = 60.0
_QUANTILES: Final = (0.5, 0.95)
_ROWS: Final = "pretrade_journal_rows_total"


@dataclass(frozen=True, slots=True)
class _Reading:
    """Counters at an instant."""

    at: float
    metrics: Mapping[tuple[str, str, str], float]
    """By sample, replica and upper edge of the bucket; other labels are summed over."""
    cpu: Mapping[str, float]
    generator: float

    def total(self, name: str) -> float:
        """A metric's value, over all its labels."""
        return math.fsum(value for (of, _, _), value in self.metrics.items() if of == name)


def run_capacity_bench(
    given: Mapping[str, Any], rates: Sequence[float], seconds: float, report: Path | None, costs_path: Path | None
) -> int:
    """Measures, prints, and writes what was asked for.

    Args:
        given: Settings of the stack.
        rates: Orders a second, ascending, at least five.
        seconds: Of each rate.
        report: JSON file for the points, the costs and the check.
        costs_path: TOML file for the costs.

    Returns:
        The exit code.
    """

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        idle, points, crowd, database = _measure(stack, rates, seconds, console)
        known = Costs.read()
        told = [point for i, point in enumerate(points) if i not in _HELD_OUT]
        costs = fit(idle, told, crowd, database, known)
        checks = [check(costs, points[i], os.cpu_count() or 1) for i in _HELD_OUT]
        console.print(_table([*points, *crowd]))
        console.print(_check_table(checks))
        said = f"pretrade bench-capacity, {', '.join(f'{rate:g}' for rate in rates)} orders a second"
        document = {
            "command": said,
            "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
            "edge": os.environ.get("PRETRADE_GRPC__EDGE", "grpcio"),
            "seconds": seconds,
            "load_average": os.getloadavg(),
            "idle": dict(idle),
            "points": [asdict(point) for point in points],
            "crowd": [asdict(point) for point in crowd],
            "held_out": list(_HELD_OUT),
            "checks": checks,
            "costs": costs.model_dump(),
        }
        if report is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(json.dumps(document, indent=1) + "\n")
        if costs_path is not None:
            costs.write(costs_path, f"{said}, {document['edge']} edge, {os.cpu_count()} cores, load generator included")
        return OK

    return run_with_stack(given, use)


def _measure(
    stack: Stack, rates: Sequence[float], seconds: float, console: Console
) -> tuple[Mapping[str, float], list[Point], list[Point], Mapping[str, float]]:
    """CPU of the idle parts, a point for each rate, one of a crowd or none, and what the decisions fill on disk."""
    with console.status("warming up"):
        _run(stack, rates[0], _SETTLE_SECONDS)
        _wait_until_shipped(stack)
    bytes_before, began = _database_bytes(stack), _reading(stack)
    with console.status("idle"):
        before = _reading(stack)
        time.sleep(seconds)  # what is measured is what it costs to do nothing
        after = _reading(stack)
    idle = {part: (after.cpu[part] - before.cpu[part]) / (after.at - before.at) for part in after.cpu}
    points = []
    for rate in rates:
        with console.status(f"{rate:g} orders a second"):
            _run(stack, rate, _SETTLE_SECONDS)
            before = _reading(stack)
            answers = _run(stack, rate, seconds)
            points.append(_point(before, _reading(stack), _latencies(answers), len(answers)))
    crowd = []
    if h2load.is_installed():
        with console.status(f"{_CROWD} callers at once"):
            order = OrderFlow(stack.endpoints.instruments, ref_prefix=f"capacity-{time.time_ns():x}-").next({})
            h2load.call_decide(str(stack.endpoints.decision), order, _CROWD, _SETTLE_SECONDS)
            before = _reading(stack)
            run = h2load.call_decide(str(stack.endpoints.decision), order, _CROWD, seconds)
            crowd.append(_point(before, _reading(stack), list(run.latencies), run.answers))
    with console.status("the disk"):
        _wait_until_shipped(stack)
        ended = _reading(stack)
        decisions = ended.total("pretrade_decisions_total") - began.total("pretrade_decisions_total")
        database = {
            "rows_per_decision": (ended.total(_ROWS) - began.total(_ROWS)) / decisions,
            "bytes_per_decision": (_database_bytes(stack) - bytes_before) / decisions,
            "journal_bytes_per_decision": _journal_bytes(stack, rates[0]),
        }
    return idle, points, crowd, database


def _journal_bytes(stack: Stack, rate: float) -> float:
    """What a decision fills of the journal, seen while the database takes none."""
    stack["postgres"].pause()
    try:
        before = _reading(stack)
        _run(stack, rate, _SETTLE_SECONDS)
        after = _reading(stack)
    finally:
        stack["postgres"].resume()
    grown = after.total("pretrade_journal_bytes") - before.total("pretrade_journal_bytes")
    return grown / (after.total("pretrade_decisions_total") - before.total("pretrade_decisions_total"))


def _run(stack: Stack, rate: float, seconds: float) -> list[Answer]:
    """Sends orders from this process, whose CPU is the generator's."""
    answers: list[Answer] = []

    async def run() -> None:
        async with grpc.aio.insecure_channel(str(stack.endpoints.decision)) as channel:
            stub: Any = decision_pb2_grpc.DecisionServiceStub(channel)
            flow = OrderFlow(stack.endpoints.instruments, ref_prefix=f"capacity-{time.time_ns():x}-")
            await call_decide_at_rate(
                stub, flow, rate=rate, seconds=seconds, deadline_seconds=1.0, observe=answers.append, seed=1
            )

    uvloop.run(run())
    return answers


def _reading(stack: Stack) -> _Reading:
    with urlopen(f"{stack.endpoints.metrics_url}/metrics", timeout=10.0) as response:  # noqa: S310 - our own
        families = text_string_to_metric_families(response.read().decode())
    metrics: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    for family in families:
        for sample in family.samples:
            metrics[sample.name, sample.labels.get("replica", ""), sample.labels.get("le", "")] += sample.value
    cpu = {part: _tree_seconds(process.pid) for part, process in stack.processes.items() if process.pid is not None}
    server = psutil.Process(stack["server"].pid)
    threads = [thread for each in (server, *server.children(recursive=True)) for thread in each.threads()]
    cpu["loop"] = max(thread.user_time + thread.system_time for thread in threads)
    own = resource.getrusage(resource.RUSAGE_SELF)
    return _Reading(time.monotonic(), metrics, cpu, own.ru_utime + own.ru_stime)


def _tree_seconds(pid: int) -> float:
    process = psutil.Process(pid)
    return sum(sum(each.cpu_times()[:2]) for each in (process, *process.children(recursive=True)))


def _latencies(answers: Sequence[Answer]) -> list[float]:
    return [answer.seconds for answer in answers if answer.decision is not None]


def _point(before: _Reading, after: _Reading, latencies: Sequence[float], sent: int) -> Point:
    seconds = after.at - before.at
    ms = [1e3 * latency for latency in latencies]
    p50, p99 = np.percentile(ms, (50, 99))
    replica = _batches(before, after, "pretrade_replica_batch_rows", "pretrade_replica_batch_seconds", "primary")
    shadow = _batches(before, after, "pretrade_replica_batch_rows", "pretrade_replica_batch_seconds", "challenger")
    cores = {part: (after.cpu[part] - before.cpu[part]) / seconds for part in after.cpu}
    generator = (after.generator - before.generator) / seconds
    return Point(
        rate=len(ms) / seconds,
        errors=sent - len(ms),
        p50_ms=float(p50),
        p99_ms=float(p99),
        mean_ms=statistics.fmean(ms),
        replica=replica,
        journal=_batches(before, after, "pretrade_journal_commit_rows", "pretrade_journal_commit_seconds", ""),
        cores=cores,
        generator=generator,
        utilisation=(sum(cores.values()) - cores["loop"] + generator) / (os.cpu_count() or 1),
        shadow_batches=shadow.a_second,
    )


def _batches(before: _Reading, after: _Reading, rows: str, seconds: str, replica: str) -> Batches:
    def grown(name: str, le: str = "") -> float:
        key = (name, replica, le)
        return after.metrics[key] - before.metrics[key]

    count = grown(f"{seconds}_count")
    edges = sorted((le for name, of, le in after.metrics if (name, of) == (f"{seconds}_bucket", replica)), key=float)
    cumulative = [(float(le), grown(f"{seconds}_bucket", le)) for le in edges]
    p50, p95 = (1e3 * quantile(cumulative, share) for share in _QUANTILES)
    return Batches(
        count / (after.at - before.at),
        grown(f"{rows}_sum") / max(1.0, grown(f"{rows}_count")),
        1e3 * grown(f"{seconds}_sum") / max(1.0, count),
        p50,
        p95,
    )


def _database_bytes(stack: Stack) -> float:
    url = make_url(str(stack.endpoints.database_url)).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False)) as connection:
        row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
    assert row is not None
    return float(row[0])


def _wait_until_shipped(stack: Stack) -> None:
    until = time.monotonic() + _SHIPPED_SECONDS
    while _reading(stack).total("pretrade_shipper_unshipped") and time.monotonic() < until:
        time.sleep(0.2)  # a counter tells, no event


def _table(points: Sequence[Point]) -> Table:
    table = Table(
        title="measured", caption="CPU in cores; rows and ms of a batch on the primary", box=SIMPLE, padding=0
    )
    for heading in ("rate", "errors", "p50 ms", "p99 ms", "rows", "ms", "commit", "ms", "server", "loop", "busy"):
        table.add_column(heading, justify="right")
    for point in points:
        table.add_row(
            *(f"{point.rate:,.0f}", str(point.errors), f"{point.p50_ms:.1f}", f"{point.p99_ms:.1f}"),
            *(f"{point.replica.rows:.2f}", f"{point.replica.mean_ms:.2f}"),
            *(f"{point.journal.rows:.2f}", f"{point.journal.mean_ms:.2f}"),
            *(f"{point.cores['server']:.2f}", f"{point.cores['loop']:.2f}", f"{point.utilisation:.0%}"),
        )
    return table


def _check_table(checks: Sequence[Mapping[str, Mapping[str, float]]]) -> Table:
    table = Table(title="foretold at rates that the costs were not taken from", box=SIMPLE, padding=(0, 1))
    table.add_column("")
    for each in checks:
        table.add_column(f"measured at {each['measured']['rate']:,.0f}/s", justify="right")
        table.add_column("model", justify="right")
    for name in list(checks[0]["measured"])[1:]:
        cells = []
        for each in checks:
            cells += [f"{each['measured'][name]:.2f}", f"{each['model'].get(name, math.nan):.2f}"]
        table.add_row(name, *cells)
    return table
