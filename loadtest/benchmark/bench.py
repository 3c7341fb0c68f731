"""The benchmark: decisions a second and latency in closed and open loops, of several servers in turn.

Every loop is measured in rounds. Each round calls all servers in turn, in another order each time, and the
medians over the rounds are shown, so that other work on the machine affects all servers alike. Before that every server
is called until it is steady: until two half seconds in a row differ by less than a tenth.

`make bench` runs it on the embedded stack, next to bare echoes, TorchServe itself and FastAPI, see
`local/bench/bench.py`. `pretrade bench --target HOST:PORT`, or `python -m loadtest.benchmark.bench`, measures a
deployment of your own with callers in Python, which need nothing installed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Final

import grpc.aio
import typer
import uvloop
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loadtest.benchmark.figures import Figures, Round, figures, remarks, table
from loadtest.benchmark.rounds import closed_loop, open_loop
from loadtest.generators.channel import connected
from loadtest.generators.load import PRETRADE, Load, Plan, Server, decision_calls, plan
from loadtest.generators.measurement import WRONG_REPLY
from loadtest.generators.orders import OrderFlow
from pretrade.decision.v1 import decision_pb2 as pb

RESULTS: Final = Path(__file__).parents[1] / "results"
"""Where results are kept."""
INSTRUMENTS: Final = ("BTCUSDT.BINANCE", "ETHUSDT.BINANCE")
_ORDERS: Final = 4_096
"""Distinct orders that are sent again and again, so that making them costs the generator nothing."""
_STEADY: Final = Load("unary", callers=64)
_STEADY_SECONDS: Final = 0.5
_STEADY_SHARE: Final = 0.1
_MOST_WINDOWS: Final = 10
_SOUND_SHARE: Final = 0.05
"""A closed loop with more errors says nothing of the capacity."""
_WARM_UP_SECONDS: Final = 0.25
_ASK_SECONDS: Final = 10.0

_WIDTH: Final = 120

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WarmUp:
    """How a server became steady."""

    server: str
    per_second: Sequence[float]
    """Of each second that it was called before."""
    steady: bool
    """Whether the last two differ by less than a tenth."""


def order_flow(instruments: Sequence[str]) -> list[pb.Order]:
    """Orders on these instruments.

    Their references begin otherwise in each run: those of two runs against one server stay apart in its audit.
    """
    flow = OrderFlow(instruments, ref_prefix=f"bench-{time.time_ns():x}-")
    return [flow.next({}) for _ in range(_ORDERS)]


@dataclass(frozen=True, slots=True)
class Found:
    """What one run found."""

    results: Sequence[Figures]
    warm_ups: Sequence[WarmUp]
    failures: Sequence[str]
    """Loads that could not be measured on a server, and why."""


def measure(
    wanted: Plan,
    servers: Sequence[Server],
    orders: Sequence[pb.Order],
    report: Report,
    earlier: Sequence[Figures] = (),
) -> Found:
    """Measures every load on every server that takes it, in the order of the plan.

    A server that gives no answer to a load, or a generator that fails, costs that load on that server.

    Args:
        wanted: What, and for how long.
        servers: Called in turn.
        orders: What those that decide are asked.
        report: Told of all that is done.
        earlier: What was found before: open loops at a share of what a server can do follow from it, too.

    Raises:
        RuntimeError: A server gives no answer at all.
    """
    warm_ups, results, failures = [], list[Figures](), list[str]()
    for server in servers:
        seconds = min(_STEADY_SECONDS, wanted.seconds)
        warm_ups.append(until_steady(partial(_closed, server, _STEADY, orders, wanted), server.name, seconds))
        after = len(warm_ups[-1].per_second) * seconds
        report(f"{server.name}: {'steady' if warm_ups[-1].steady else 'NOT steady'} after {after:g} s of 64 callers")
    for load in (*wanted.closed, *wanted.opened):
        done = _in_turn(load, servers, orders, wanted, [*earlier, *results], failures)
        results += done
        if done:
            report(f"{load.name}: {', '.join(f'{each.server} {each.decisions_per_second:,.0f}/s' for each in done)}")
    return Found(results, warm_ups, failures)


def _in_turn(
    load: Load,
    servers: Sequence[Server],
    orders: Sequence[pb.Order],
    wanted: Plan,
    earlier: Sequence[Figures],
    failures: list[str],
) -> list[Figures]:
    """Some rounds of a load, in each another server first; one round at a share of the capacity."""
    called = _called(load, servers)
    rates = {server.name: load.rate for server in called}
    if load.share:
        capacities = _capacities(earlier, load)
        rates = {name: load.share * capacities.get(name, 0.0) for name in rates}
        failures += [
            f"{load.name}, {name}: no closed loop without errors says what it can do"
            for name, rate in rates.items()
            if not rate
        ]
        called = [server for server in called if rates[server.name]]
    rounds: dict[str, list[Round]] = {server.name: [] for server in called}
    for number in range(1 if load.share else wanted.rounds):
        turn = number % len(called) if called else 0
        for server in (*called[turn:], *called[:turn]):
            try:
                rounds[server.name].append(_once(load, server, orders, wanted, rates[server.name]))
            except RuntimeError as error:
                failures.append(f"{load.name}, {server.name}: {error}")
    return [
        figures(load, server, rounds[server.name], rates[server.name] or None)
        for server in called
        if rounds[server.name]
    ]


def _called(load: Load, servers: Sequence[Server]) -> list[Server]:
    """Who takes a load: those that are named, else all; in an open loop else those that decide."""
    able = [server for server in servers if load.call in server.calls]
    if load.servers:
        return [server for server in able if server.name in load.servers]
    return [server for server in able if load.callers or server.kind == PRETRADE]


def _once(load: Load, server: Server, orders: Sequence[pb.Order], wanted: Plan, rate: float) -> Round:
    if not load.callers:
        limits = {"seconds": wanted.open_seconds, "deadline_seconds": wanted.deadline_seconds}
        return open_loop(server, load, orders, rate=rate, **limits)
    with suppress(RuntimeError):  # no answer in so short a time: the round itself tells whether there are any
        _closed(server, load, orders, wanted, min(_WARM_UP_SECONDS, wanted.seconds))
    return _closed(server, load, orders, wanted, wanted.seconds)


def _capacities(results: Sequence[Figures], load: Load) -> dict[str, float]:
    """The most that each server decided a second in closed loops of the same call, but for those with errors."""
    method, size = load.call
    sound = [
        each
        for each in results
        if each.offered_per_second is None
        and each.error_share < _SOUND_SHARE
        and each.load.startswith(f"{method}, ")
        and (size == 1 or each.load.endswith(f" × {size}"))
    ]
    # Later ones win: the highest.
    return {each.server: each.decisions_per_second for each in sorted(sound, key=attrgetter("decisions_per_second"))}


def _closed(server: Server, load: Load, orders: Sequence[pb.Order], wanted: Plan, seconds: float) -> Round:
    return closed_loop(server, load, orders, seconds=seconds, deadline_seconds=wanted.deadline_seconds)


def until_steady(window: Callable[[float], Round], name: str, seconds: float = _STEADY_SECONDS) -> WarmUp:
    """Calls a server until two windows in a row differ by less than a tenth, or enough were tried.

    Args:
        window: Measures for so many seconds.
        name: The server's.
        seconds: Of a window.

    Raises:
        RuntimeError: It gave no answer in any window. One that has just started may give none in the first.
    """
    rates: list[float] = []
    problem = RuntimeError(name)
    while len(rates) < _MOST_WINDOWS:
        try:
            measured = window(seconds)
        except RuntimeError as error:
            problem = error
            rates.append(0.0)
            continue
        rates.append(measured.decisions / measured.seconds)
        if len(rates) > 1 and abs(rates[-1] - rates[-2]) < _STEADY_SHARE * max(rates[-2:]):
            return WarmUp(name, rates, steady=True)
    if not any(rates):
        raise problem
    return WarmUp(name, rates, steady=False)


async def ask(target: str, order: pb.Order) -> None:
    """Has one order decided, to say what is wrong before anything is measured.

    Raises:
        RuntimeError: The server is not there, or does not decide.
    """
    async with connected(target, ready=False) as stub:
        try:
            await stub.Decide(pb.DecideRequest(order=order), timeout=_ASK_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise RuntimeError(f"{target} does not decide: {error.code().name}: {error.details()}") from error


def document(wanted: Plan, found: Found, **facts: Any) -> dict[str, Any]:
    """All that a run found and what it was run on, as JSON has it."""
    return {
        "commit": commit(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "grpc": grpc.__version__},
        "load_average": os.getloadavg(),
        "rounds": wanted.rounds,
        "seconds": wanted.seconds,
        "open_seconds": wanted.open_seconds,
        "deadline_seconds": wanted.deadline_seconds,
        **facts,
        **asdict(found),
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a document of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def commit() -> str:
    """The commit that is measured, `-dirty` when files differ from it; empty outside of a repository."""
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603


def show(console: Console, found: Found, title: str) -> None:
    """Prints the table, and what is to be known before it is believed."""
    print_whole(console, table(found.results, title))
    for remark in (*remarks(found.results), *(f"not measured: {failure}" for failure in found.failures)):
        console.print(remark, highlight=False)


def print_whole(console: Console, shown: Table) -> None:
    """Prints a table with whole columns if the output has no known width, as in a log."""
    (console if console.is_terminal else Console(file=console.file, width=_WIDTH)).print(shown)


def run_target(
    target: str,
    instruments: Sequence[str],
    wanted: Plan,
    json_path: Path | None,
    console: Console,
) -> int:
    """Measures a deployment by callers in Python, prints, and returns the exit code.

    It is 1 when something could not be measured, or an answer belonged to another order.
    """
    orders = order_flow(instruments)
    server = Server(target, PRETRADE, target, decision_calls(orders))
    try:
        with console.status(f"asking {target}"):
            uvloop.run(ask(target, orders[0]))
        found = measure(wanted, [server], orders, lambda line: console.print(line, highlight=False))
    except RuntimeError as error:
        console.print(f"[red]{escape(str(error))}[/]", highlight=False)
        return 1
    title = f"{target}, callers in Python, {wanted.rounds} rounds of {wanted.seconds:g} s"
    show(console, found, title)
    if json_path is not None:
        write(json_path, document(wanted, found, target=target, instruments=list(instruments)))
    return int(bool(found.failures) or any(WRONG_REPLY in each.statuses for each in found.results))


def main(
    target: Annotated[str, typer.Option(help="HOST:PORT of the decision service.")],
    instrument: Annotated[
        list[str] | None,
        typer.Option(help="SYMBOL.VENUE that it knows; can be repeated. [BTCUSDT.BINANCE, ETHUSDT.BINANCE]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute: fewer callers, one round.")] = False,
    seconds: Annotated[float | None, typer.Option(min=0.1, max=600, help="Of each closed loop in a round.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, max=100, help="Of each closed loop.")] = None,
    deadline_ms: Annotated[float, typer.Option(min=1, max=10_000, help="Deadline of every order.")] = 200.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
) -> None:
    """Measures decisions a second and latency of a deployment."""
    wanted = plan(quick=quick, rounds=rounds, seconds=seconds, deadline_seconds=deadline_ms / 1e3)
    raise typer.Exit(run_target(target, instrument or INSTRUMENTS, wanted, json_path, Console()))


if __name__ == "__main__":
    typer.run(main)
