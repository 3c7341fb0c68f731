"""`pretrade bench-observability`: what metrics, traces and logs cost, by two servers that differ in nothing else.

Both decide side by side on one stack, each with a journal of its own, and are loaded in turn in short rounds; what the
machine does besides hits both alike. One counts, is scraped every five seconds, traces one in a hundred decisions to a
collector and logs as in production; the other counts nothing, is not scraped, and neither traces nor logs decisions.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest.benchmark.bench import commit
from loadtest.generators.orders import OrderFlow
from local.bench.servers import Target, call_decide, decision_server, warm_up
from local.stack.command import OK, run_with_stack
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.decision.v1 import decision_pb2 as pb

CALLERS: Final = (16, 64)
_WARM_UP_SECONDS: Final = 1.0
_SCRAPE_SECONDS: Final = 5.0
ON: Final = "on"
OFF: Final = "off"
_QUIET: Final = {"PRETRADE_LOG_LEVEL": "error"}


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the rounds of one point, and of the pairs of rounds."""

    edge: str
    callers: int
    decisions_per_second: Mapping[str, float]
    """By server, `on` and `off`."""
    p50_ms: Mapping[str, float]
    p99_ms: Mapping[str, float]
    cpu_us: Mapping[str, float]
    """CPU of the server and all its processes per decision, in microseconds."""
    throughput_cost: float
    """Median over pairs of rounds of 1 - on / off: the share of decisions a second that it costs."""
    cpu_cost: float
    """The same of the CPU per decision: on / off - 1."""
    spans: int
    """Spans that the collector took."""


def run_observability_bench(
    given: Mapping[str, Any], edge: str, seconds: float, rounds: int, report: Path | None
) -> int:
    """Measures, prints and returns the exit code.

    Args:
        given: Settings of the stack.
        edge: Who speaks HTTP/2 with the callers.
        seconds: Load of one round on each server.
        rounds: Pairs of rounds at each number of callers.
        report: JSON file for all figures.
    """
    parts = {"valkey", "broker", "worker", "market", "primary", "secondary", "challenger"}

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        results = _measure(stack, settings.dir, edge, seconds, rounds, console)
        console.print(_table(results, f"{edge} edge, {rounds} pairs of rounds of {seconds:g} s"))
        if report is not None:
            document = {
                "commit": commit(),
                "rounds": rounds,
                "seconds": seconds,
                "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
                "load_average": os.getloadavg(),
                "results": [asdict(result) for result in results],
            }
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(json.dumps(document, indent=2) + "\n")
        return OK

    return run_with_stack(given, use, parts=parts)


def _measure(stack: Stack, directory: Path, edge: str, seconds: float, rounds: int, console: Console) -> list[Result]:
    order = OrderFlow(stack.endpoints.instruments, ref_prefix=f"bench-{time.time_ns():x}-").next({})
    order.ClearField("idempotency_key")
    with ExitStack() as opened:
        collector = opened.enter_context(_collector())
        traced = {"PRETRADE_TRACING__OTLP_ENDPOINT": collector.address, "PRETRADE_TRACING__ONE_IN": "100"}
        # Only what is sampled: on a machine that is short of cores most decisions would be slow ones.
        traced |= {"PRETRADE_TRACING__SLOW_SECONDS": "10", "PRETRADE_DECISION_LOG__SLOW_SECONDS": "10"}
        watched = opened.enter_context(decision_server(stack, directory / ON, edge, traced))
        uncounted = {"PYTHONPATH": _in_the_way(directory / "uncounted")}
        unwatched = opened.enter_context(decision_server(stack, directory / OFF, edge, _QUIET | uncounted))
        servers = {ON: watched, OFF: unwatched}
        for server in servers.values():
            warm_up(server.address, order)
        opened.enter_context(_scraping(watched))
        results = []
        for callers in CALLERS:
            with console.status(f"{callers} callers"):
                before = collector.spans
                point = _point(order, callers, seconds, rounds, servers)
                results.append(Result(edge=edge, callers=callers, spans=collector.spans - before, **point))
        return results


def _point(order: pb.Order, callers: int, seconds: float, rounds: int, servers: Mapping[str, Target]) -> dict[str, Any]:
    rates, p50, p99, cpu = _lists(), _lists(), _lists(), _lists()
    for number in range(rounds):
        # Whoever comes second finds the caches of the other: in turn.
        for name in (ON, OFF) if number % 2 else (OFF, ON):
            call_decide(servers[name].address, order, callers, _WARM_UP_SECONDS)
            used = servers[name].cpu_seconds()
            run = call_decide(servers[name].address, order, callers, seconds)
            used = servers[name].cpu_seconds() - used
            rates[name].append(run.answers / run.seconds)
            p50[name].append(run.p50_ms)
            p99[name].append(run.p99_ms)
            cpu[name].append(1e6 * used / run.answers)
    pairs = list(zip(rates[ON], rates[OFF], strict=True))
    return {
        "decisions_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "p50_ms": {name: statistics.median(values) for name, values in p50.items()},
        "p99_ms": {name: statistics.median(values) for name, values in p99.items()},
        "cpu_us": {name: statistics.median(values) for name, values in cpu.items()},
        "throughput_cost": statistics.median(1 - on / off for on, off in pairs),
        "cpu_cost": statistics.median(on / off - 1 for on, off in zip(cpu[ON], cpu[OFF], strict=True)),
    }


def _lists() -> dict[str, list[float]]:
    return {ON: [], OFF: []}


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector that counts the spans it is sent."""

    def __init__(self) -> None:
        self.spans = 0
        self.address = ""

    def Export(  # noqa: N802 - the protocol's name
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Takes some spans."""
        self.spans += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def _collector() -> Iterator[_Collector]:
    """A running collector."""
    collector, server = _Collector(), grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()


@contextmanager
def _scraping(target: Target) -> Iterator[None]:
    """Scrapes a server as often as `prometheus.yaml` does."""
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(_SCRAPE_SECONDS):
            with urlopen(target.metrics_url, timeout=5.0) as response:  # noqa: S310 - our own
                response.read()

    thread = threading.Thread(target=scrape, name="scrape")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _in_the_way(directory: Path) -> str:
    """A `PYTHONPATH` that has every Python below it import `local.bench.uncounted` first."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sitecustomize.py").write_text("import local.bench.uncounted\n")
    root = Path(__file__).parents[2]
    others = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(filter(None, (str(directory), str(root), str(root / "proto" / "gen"), others)))


def _table(results: list[Result], title: str) -> Table:
    table = Table(
        title=title,
        caption="metrics scraped every 5 s, 1 % of decisions traced, logs; against none of these. ms; CPU in µs",
        box=SIMPLE,
        padding=0,
    )
    for heading in ("callers", "dec./s on", "off", "cost", "p99 on", "off", "CPU on", "off", "cost", "spans"):
        table.add_column(heading, justify="right")
    for each in results:
        table.add_row(
            str(each.callers),
            *(f"{each.decisions_per_second[name]:,.0f}" for name in (ON, OFF)),
            f"{each.throughput_cost:.1%}",
            *(f"{each.p99_ms[name]:.1f}" for name in (ON, OFF)),
            *(f"{each.cpu_us[name]:,.0f}" for name in (ON, OFF)),
            f"{each.cpu_cost:.1%}",
            f"{each.spans:,.0f}",
        )
    return table
