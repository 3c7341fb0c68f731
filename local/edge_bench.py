"""`pretrade bench-edges`: decisions a second on each edge, next to bare echoes behind the same transports.

One stack; a server on each edge with a journal of its own. Every point is measured in rounds, all four in turn, and
medians are shown, so that whatever else the machine does hits all alike. h2load calls, where it is installed; else
callers in Python, whose own cost then bounds what can be seen.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.request import urlopen

import grpc
import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest import h2load
from loadtest.bench import echo_server
from loadtest.callers import call_decide, percentile
from loadtest.envoy_echo import RESPONSE
from loadtest.orders import OrderFlow
from local import server
from local.command import OK, run_with_stack
from local.errors import NotReadyError
from local.ports import free_ports
from local.settings import LocalSettings
from local.stack import Stack
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

EDGES: Final = ("grpcio", "envoy")
CALLERS: Final = (1, 16, 64, 256)
_WARM_UP_SECONDS: Final = 1.0
_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 20.0
_LOOK_SECONDS: Final = 0.05

Load = Callable[[str, pb.Order, int, float], h2load.Run]


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the rounds of one point."""

    edge: str
    callers: int
    decisions_per_second: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    errors: int
    """Calls without a decision, in all rounds."""
    from_model: float
    """Share of decisions whose source is a replica."""
    cpu_us: float
    """CPU of the server and all its processes per decision, in microseconds."""
    memory_mebibytes: float
    echo_per_second: Mapping[str, float]
    """Bare echoes a second by edge."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server under load."""

    address: str
    metrics_url: str
    process: psutil.Process

    def count(self, name: str, **labels: str) -> float:
        """The sum of the series of a metric that carry these labels."""
        with urlopen(self.metrics_url, timeout=5.0) as response:  # noqa: S310 - our own
            families = list(text_string_to_metric_families(response.read().decode()))
        samples = (sample for family in families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def cpu_seconds(self) -> float:
        """What it and all its processes have used so far."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in family)

    def memory_bytes(self) -> int:
        """What it and all its processes hold."""
        return sum(process.memory_info().rss for process in [self.process, *self.process.children(recursive=True)])


def run_edge_bench(given: Mapping[str, Any], seconds: float, rounds: int, report: Path | None) -> int:
    """Measures, prints and returns the exit code.

    Args:
        given: Settings of the stack.
        seconds: Load of one round on each of the four.
        rounds: Rounds of each point.
        report: JSON file for all figures.
    """
    parts = {"valkey", "broker", "worker", "market", "primary", "secondary", "challenger"}

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        results = uvloop.run(_measure(stack, settings.dir, seconds, rounds, console))
        generator = "h2load" if h2load.is_installed() else "callers in Python (there is no h2load here)"
        console.print(_table(results, f"{generator}, {rounds} rounds of {seconds:g} s"))
        if report is not None:
            document = {
                "commit": commit(),
                "generator": generator,
                "rounds": rounds,
                "seconds": seconds,
                "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "grpc": grpc.__version__},
                "load_average": os.getloadavg(),
                "results": [asdict(result) for result in results],
            }
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(json.dumps(document, indent=2) + "\n")
        return OK

    return run_with_stack(given, use, parts=parts)


async def _measure(stack: Stack, directory: Path, seconds: float, rounds: int, console: Console) -> list[Result]:
    instruments = stack.endpoints.instruments
    order = OrderFlow(instruments, ref_prefix=f"bench-{time.time_ns():x}-").next({})
    order.ClearField("idempotency_key")
    load: Load = h2load.call_decide if h2load.is_installed() else call_decide_from_python
    results = []
    async with AsyncExitStack() as opened:
        targets = {
            edge: opened.enter_context(decision_server(stack, directory / f"edge-{edge}", edge)) for edge in EDGES
        }
        response = await asyncio.to_thread(warm_up, targets["grpcio"].address, order)
        echoes = {
            "grpcio": await opened.enter_async_context(echo_server(response)),
            "envoy": await opened.enter_async_context(envoy_echo(response)),
        }
        for callers in CALLERS:
            with console.status(f"{callers} callers"):
                point = partial(_point, load, order, callers, seconds, rounds)
                results += await asyncio.to_thread(point, targets, echoes)
    return results


def _point(
    load: Load,
    order: pb.Order,
    callers: int,
    seconds: float,
    rounds: int,
    targets: Mapping[str, Target],
    echoes: Mapping[str, str],
) -> list[Result]:
    """One number of callers on each of the four, in turn."""
    echoed: dict[str, list[float]] = {edge: [] for edge in EDGES}
    found: dict[str, list[tuple[float, h2load.Run, float]]] = {edge: [] for edge in EDGES}
    errors, decided, from_model = (dict.fromkeys(EDGES, 0.0) for _ in range(3))
    for _ in range(rounds):
        for edge, target in targets.items():
            load(target.address, order, callers, _WARM_UP_SECONDS)
            before = _counts(target)
            cpu = target.cpu_seconds()
            run = load(target.address, order, callers, seconds)
            cpu = target.cpu_seconds() - cpu
            failed, made, by_model = (after - was for after, was in zip(_counts(target), before, strict=True))
            found[edge].append((made / run.seconds, run, 1e6 * cpu / made))
            errors[edge] += failed
            decided[edge] += made
            from_model[edge] += by_model
            load(echoes[edge], order, callers, _WARM_UP_SECONDS / 2)
            echo = load(echoes[edge], order, callers, seconds)
            echoed[edge].append(echo.answers / echo.seconds)
    echo_rates = {edge: statistics.median(rates) for edge, rates in echoed.items()}
    return [
        Result(
            edge=edge,
            callers=callers,
            decisions_per_second=statistics.median(rate for rate, _, _ in found[edge]),
            p50_ms=statistics.median(run.p50_ms for _, run, _ in found[edge]),
            p99_ms=statistics.median(run.p99_ms for _, run, _ in found[edge]),
            p999_ms=statistics.median(run.p999_ms for _, run, _ in found[edge]),
            errors=int(errors[edge]),
            from_model=from_model[edge] / decided[edge],
            cpu_us=statistics.median(cpu for _, _, cpu in found[edge]),
            memory_mebibytes=targets[edge].memory_bytes() / 2**20,
            echo_per_second=echo_rates,
        )
        for edge in EDGES
    ]


def _counts(target: Target) -> tuple[float, float, float]:
    """Errors, decisions, and decisions by a replica's score, so far."""
    name = "pretrade_decisions_total"
    scored = sum(target.count(name, source=source) for source in ("PRIMARY", "SECONDARY"))
    return target.count("pretrade_errors_total"), target.count(name), scored


@contextmanager
def decision_server(
    stack: Stack, directory: Path, edge: str, settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Target]:
    """A decision server on an edge, with settings of its own, in front of the stack's replicas and features."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ("decision", "admin", "metrics")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    env = {
        **server.env(stack.endpoints, ports),
        "PRETRADE_GRPC__EDGE": edge,
        "PRETRADE_DATABASE_URL": f"sqlite:///{directory / 'audit.db'}",
        "PRETRADE_JOURNAL__PATH": str(directory / "journal.db"),
        **settings,
    }
    with (directory / "server.log").open("wb") as log:
        process = subprocess.Popen(server.argv(None), env=env, stderr=log)  # noqa: S603 - our own module
    try:
        _wait_until_ready(process, ports["decision"])
        metrics = f"http://127.0.0.1:{ports['metrics']}/metrics"
        yield Target(server.address(ports["decision"]), metrics, psutil.Process(process.pid))
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        finally:
            process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + _START_SECONDS
    while True:
        try:
            return server.ready(port)
        except NotReadyError:
            if process.poll() is not None or time.monotonic() > until:
                raise
            time.sleep(_LOOK_SECONDS)


def warm_up(address: str, order: pb.Order) -> pb.DecideResponse:
    """Decides until a replica has answered, for a while; a typical response."""
    until = time.monotonic() + _STOP_SECONDS
    with grpc.insecure_channel(address) as channel:
        stub = decision_pb2_grpc.DecisionServiceStub(channel)
        while True:
            try:
                response = stub.Decide(pb.DecideRequest(order=order), timeout=5.0)
            except grpc.RpcError:
                if time.monotonic() > until:
                    raise
                continue  # too late, on a machine that is still starting something
            if response.decision.source == pb.SOURCE_PRIMARY or time.monotonic() > until:
                return response


@asynccontextmanager
async def envoy_echo(response: pb.DecideResponse) -> AsyncIterator[str]:
    """The bare echo inside Envoy, which answers with `response`; yields its `HOST:PORT`."""
    from pyvoy import PyvoyServer  # noqa: PLC0415 - an extra that nothing else here needs

    env = {RESPONSE: response.SerializeToString().hex()}
    async with PyvoyServer("loadtest.envoy_echo:application", worker_threads=1, lifespan=False, env=env) as echo:
        yield f"{echo.listener_address}:{echo.listener_port}"


def call_decide_from_python(target: str, order: pb.Order, callers: int, seconds: float) -> h2load.Run:
    """What h2load does, by callers in a process of their own."""

    async def call() -> h2load.Run:
        async with grpc.aio.insecure_channel(target) as channel:
            stub: Any = decision_pb2_grpc.DecisionServiceStub(channel)
            measured = await call_decide(stub, [order], callers=callers, seconds=seconds, deadline_seconds=1.0)
        p50, p99, p999 = (1e3 * percentile(measured.latencies, share) for share in (0.5, 0.99, 0.999))
        return h2load.Run(measured.seconds, len(measured.latencies), p50, p99, p999)

    return uvloop.run(call())


def _table(results: list[Result], title: str) -> Table:
    table = Table(
        title=title, caption="ms; CPU in µs a decision; ratios to the bare echoes", box=SIMPLE, padding=(0, 0)
    )
    headings = ("edge", "callers", "dec./s", "p50", "p99", "p99.9", "errors", "model", "CPU", "MiB")
    for heading in (*headings, *(f"/{edge}" for edge in EDGES)):
        table.add_column(heading, justify="left" if heading == "edge" else "right")
    for each in results:
        table.add_row(
            *(each.edge, str(each.callers), f"{each.decisions_per_second:,.0f}", f"{each.p50_ms:.1f}"),
            *(f"{each.p99_ms:.1f}", f"{each.p999_ms:.1f}", str(each.errors), f"{each.from_model:.0%}"),
            *(f"{each.cpu_us:,.0f}", f"{each.memory_mebibytes:,.0f}"),
            *(f"{each.decisions_per_second / each.echo_per_second[edge]:.2f}" for edge in EDGES),
        )
    return table


def commit() -> str:
    """The commit that is measured."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
