"""`make bench`: decisions a second and latency of a running server, next to a bare echo server on the same machine.

This process generates the load; the server under load and the echo server are processes of their own. Every scenario
is measured in rounds, server and echo in turn, and the medians over the rounds are shown, so that whatever else the
machine does hits both alike. The ratio says what part of the transport's own throughput the decisions keep.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import grpc.aio
import typer
import uvloop
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest.callers import WRONG_REPLY, Measurement, call_decide, call_decide_stream, percentile
from loadtest.orders import OrderFlow
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

_ORDERS: Final = 4_096
"""Distinct orders that are sent again and again, so that making them costs the generator nothing."""
_SAMPLES: Final = 21
_WARM_UP_SECONDS: Final = 0.5
_CONNECT_SECONDS: Final = 10.0
_INSTRUMENTS: Final = ("BTCUSDT.BINANCE", "ETHUSDT.BINANCE")


class BenchError(Exception):
    """The benchmark cannot be run; the message says why."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One way of calling."""

    name: str
    callers: int
    """Calls, or orders of the stream, under way at once."""
    call: Callable[..., Awaitable[Measurement]]
    """One of `loadtest.callers`."""


SCENARIOS: Final = (
    Scenario("Decide", 1, call_decide),
    Scenario("Decide", 16, call_decide),
    Scenario("Decide", 64, call_decide),
    Scenario("DecideStream", 64, call_decide_stream),
)


@dataclass(frozen=True, slots=True)
class Result:
    """Medians over the rounds of one scenario; latencies are milliseconds of the orders that got a decision."""

    scenario: str
    callers: int
    decisions_per_second: float
    p50_ms: float
    p99_ms: float
    orders: int
    """Orders sent in all rounds."""
    errors: Mapping[str, int]
    """Orders without a decision in all rounds, by gRPC status, `WRONG_REPLY` or `NO_REPLY`."""
    actions: Mapping[str, int]
    """Decisions of all rounds by action."""
    sources: Mapping[str, int]
    """Decisions of all rounds by source."""
    echo_per_second: float
    echo_p50_ms: float
    echo_p99_ms: float
    ratio: float
    """Decisions per second over echoes per second."""


async def compare(
    scenario: Scenario,
    target: str,
    echo: str,
    orders: Sequence[pb.Order],
    *,
    rounds: int,
    seconds: float,
    deadline_seconds: float,
) -> Result:
    """Measures the server and the echo server in turn, each round on a connection of its own.

    Raises:
        BenchError: A round brought no decision.
    """
    decided: list[Measurement] = []
    echoed: list[Measurement] = []
    call = partial(scenario.call, callers=scenario.callers, deadline_seconds=deadline_seconds)
    for _ in range(rounds):
        for address, measurements in ((target, decided), (echo, echoed)):
            async with connected(address) as stub:
                await call(stub, orders, seconds=min(_WARM_UP_SECONDS, seconds))
                measured = await call(stub, orders, seconds=seconds)
            if not measured.latencies:
                raise BenchError(f"{scenario.name}, {scenario.callers} at once: {address} gave only {measured.errors}")
            measurements.append(measured)
    rate = statistics.median(each.rate for each in decided)
    echo_rate = statistics.median(each.rate for each in echoed)
    errors = _total(each.errors for each in decided)
    return Result(
        scenario=scenario.name,
        callers=scenario.callers,
        decisions_per_second=rate,
        p50_ms=_median_ms(decided, 0.5),
        p99_ms=_median_ms(decided, 0.99),
        orders=sum(len(each.latencies) for each in decided) + sum(errors.values()),
        errors=errors,
        actions=_total(each.actions for each in decided),
        sources=_total(each.sources for each in decided),
        echo_per_second=echo_rate,
        echo_p50_ms=_median_ms(echoed, 0.5),
        echo_p99_ms=_median_ms(echoed, 0.99),
        ratio=rate / echo_rate,
    )


def _median_ms(measurements: Sequence[Measurement], share: float) -> float:
    return 1e3 * statistics.median(percentile(each.latencies, share) for each in measurements)


def _total(counts: Iterable[Counter[str]]) -> dict[str, int]:
    return dict(sum(counts, Counter()))


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[decision_pb2_grpc.DecisionServiceAsyncStub]:
    """A stub of the decision service at `HOST:PORT`.

    Raises:
        BenchError: There is no connection within the time allowed.
    """
    # Channels to one address share a connection otherwise, and a round would inherit the last one's.
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await channel.channel_ready()
        except TimeoutError:
            raise BenchError(f"no connection to {address} within {_CONNECT_SECONDS:g} s") from None
        yield decision_pb2_grpc.DecisionServiceStub(channel)


async def _typical_response(target: str, orders: Iterable[pb.Order]) -> pb.DecideResponse:
    """Asks for a few decisions; the one of median size is what the echo server repeats."""
    async with connected(target) as stub:
        try:
            responses = [await stub.Decide(pb.DecideRequest(order=each), timeout=_CONNECT_SECONDS) for each in orders]
        except grpc.aio.AioRpcError as error:
            raise BenchError(f"{target} does not decide: {error.code().name}: {error.details()}") from error
    return sorted(responses, key=pb.DecideResponse.ByteSize)[len(responses) // 2]


@asynccontextmanager
async def echo_server(response: pb.DecideResponse) -> AsyncIterator[str]:
    """An echo server in a process of its own that answers with `response`; yields its `HOST:PORT`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest.echo", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(response.SerializeToString().hex().encode() + b"\n")
        port = (await process.stdout.readline()).decode().strip()
        if not port:
            raise BenchError("the echo server did not start")
        yield f"127.0.0.1:{port}"
    finally:
        process.stdin.close()
        await process.wait()


async def run(
    target: str,
    instruments: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    deadline_seconds: float,
    report: Callable[[str], None],
) -> list[Result]:
    """Measures every scenario.

    Args:
        target: `HOST:PORT` of the decision service.
        instruments: Those that it is configured with.
        rounds: Rounds of each scenario.
        seconds: Load of one round, for the server and for the echo server each.
        deadline_seconds: Of each call and of each order of the stream.
        report: Told what is being measured.

    Raises:
        BenchError: The server is not there, or decides nothing.
    """
    # Another prefix each time: the references of two runs against one server stay apart in its audit.
    flow = OrderFlow(instruments, ref_prefix=f"bench-{time.time_ns():x}-")
    orders = [flow.next({}) for _ in range(_ORDERS)]
    response = await _typical_response(target, orders[:_SAMPLES])
    results = []
    async with echo_server(response) as echo:
        for scenario in SCENARIOS:
            report(f"{scenario.name}, {scenario.callers} at once")
            results.append(
                await compare(
                    scenario,
                    target,
                    echo,
                    orders,
                    rounds=rounds,
                    seconds=seconds,
                    deadline_seconds=deadline_seconds,
                )
            )
    return results


def main(
    target: Annotated[str | None, typer.Option(help="HOST:PORT of the decision service; default: the stack's.")] = None,
    directory: Annotated[
        Path, typer.Option("--dir", envvar="PRETRADE_LOCAL_DIR", help="Directory of the running stack.")
    ] = Path(".pretrade"),
    instrument: Annotated[
        list[str] | None, typer.Option(help="SYMBOL.VENUE; can be repeated. Default: the stack's.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Load of one round, on each server.")] = 5.0,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds of each scenario; medians are shown.")] = 3,
    deadline_ms: Annotated[float, typer.Option(min=1, max=10_000, help="Deadline of every order.")] = 100.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Measures decisions a second and latency, next to a bare echo server."""
    console = Console()
    try:
        if target is None:
            target, configured = _running_stack(directory)
        else:
            configured = _INSTRUMENTS
        instruments = tuple(instrument or configured)
        with console.status("") as status:
            results = uvloop.run(
                run(
                    target,
                    instruments,
                    rounds=rounds,
                    seconds=seconds,
                    deadline_seconds=deadline_ms / 1e3,
                    report=status.update,
                )
            )
    except BenchError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        raise typer.Exit(1) from error
    console.print(_table(results, f"{target}, {rounds} rounds of {seconds:g} s, deadline {deadline_ms:g} ms"))
    for result in results:
        console.print(f"{result.scenario}, {result.callers} at once: {_shares(result)}", highlight=False)
    if json_path is not None:
        json_path.write_text(_as_json(results, target, instruments, rounds, seconds, deadline_ms))
    if any(WRONG_REPLY in result.errors for result in results):
        raise typer.Exit(1)


def _running_stack(directory: Path) -> tuple[str, tuple[str, ...]]:
    """Target and instruments of the stack that runs in a directory.

    Raises:
        BenchError: None does.
    """
    path = directory / "stack.json"
    try:
        endpoints = json.loads(path.read_bytes())["endpoints"]
    except FileNotFoundError:
        raise BenchError(f"no stack runs in {directory}: start one with `pretrade up`, or give --target") from None
    if endpoints["decision"] is None:
        raise BenchError(f"the stack in {directory} runs no decision server")
    return endpoints["decision"], tuple(endpoints["instruments"])


def _table(results: Sequence[Result], title: str) -> Table:
    table = Table(title=title, box=SIMPLE, padding=(0, 0, 0, 1))  # fits into 80 columns
    for heading in ("scenario", "callers", "decisions/s", "p50 ms", "p99 ms", "errors", "echo/s", "ratio"):
        table.add_column(heading, justify="left" if heading == "scenario" else "right")
    for result in results:
        errors = sum(result.errors.values())
        table.add_row(
            result.scenario,
            str(result.callers),
            f"{result.decisions_per_second:,.0f}",
            f"{result.p50_ms:.2f}",
            f"{result.p99_ms:.2f}",
            f"[red]{errors}[/]" if errors else "0",
            f"{result.echo_per_second:,.0f}",
            f"{result.ratio:.2f}",
        )
    return table


def _shares(result: Result) -> str:
    """What became of the orders, in percent of all that were sent."""
    counts = {**result.actions, **{f"from {name}": n for name, n in result.sources.items()}, **result.errors}
    return ", ".join(f"{name} {n / result.orders:.2%}" for name, n in counts.items())


def _as_json(
    results: Sequence[Result], target: str, instruments: Sequence[str], rounds: int, seconds: float, deadline_ms: float
) -> str:
    document = {
        "target": target,
        "instruments": instruments,
        "rounds": rounds,
        "seconds": seconds,
        "deadline_ms": deadline_ms,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "grpc": grpc.__version__},
        "scenarios": [asdict(result) for result in results],
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


if __name__ == "__main__":
    typer.run(main)
