"""`pretrade bench-costs`: what each optional part of a decision costs, and where the CPU of a decision goes.

Several servers decide side by side on one stack, each with a journal of its own. The first one has everything on; every
other one differs from it in one thing. They are loaded in turn in short rounds, so that other work on the machine
affects all alike. Each round of a server is compared with the neighbouring round of the first one, and the median of
these comparisons is shown. The CPU of the first server is shown by process and by thread; `py-spy` tells threads apart.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest.benchmark.bench import commit, order_flow
from loadtest.benchmark.figures import Round
from loadtest.benchmark.rounds import closed_loop
from loadtest.generators.load import PRETRADE, Load, Server, decision_calls
from local.bench.cpu import CpuWatch, Share, share_table
from local.bench.observing import scraping, trace_collector, uncounted, watching
from local.bench.servers import Target, decision_server, warm_up
from local.stack.command import OK, run_with_stack
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.decision.v1 import decision_pb2 as pb


@dataclass(frozen=True, slots=True)
class Variant:
    """A server that differs from the one with everything on."""

    settings: Mapping[str, str] = field(default_factory=dict)
    observed: bool = True
    """Whether it counts, is scraped, traces one in a hundred decisions, and logs as in production."""
    watched: bool = False
    """Whether as many as may watch features over HTTP, and decisions of which there are none."""


EVERYTHING: Final = "everything"
VARIANTS: Final[Mapping[str, Variant]] = {
    EVERYTHING: Variant(),
    "no-shadow-rows": Variant({"PRETRADE_CONTROL__SHADOW": "false", "PRETRADE_CONTROL__STORE": "file"}),
    "tenth-of-shadow-rows": Variant({"PRETRADE_SHADOW__SAMPLE_SHARE": "0.1"}),
    "no-score-pairs": Variant({"PRETRADE_SHADOW__KEEP_PAIRS": "false"}),
    "audit-os": Variant({"PRETRADE_JOURNAL__DURABILITY": "os"}),
    "audit-off": Variant({"PRETRADE_JOURNAL__DURABILITY": "off"}),
    "no-http": Variant({"PRETRADE_HTTP__PORT": ""}),
    "watched": Variant(watched=True),
    "unobserved": Variant({"PRETRADE_LOG_LEVEL": "error"}, observed=False),
}
_WARM_UP_SECONDS: Final = 1.0
_DEADLINE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """A server's, medians over the rounds."""

    name: str
    callers: int
    decisions_per_second: float
    p50_ms: float
    p99_ms: float
    errors: int
    """Orders without a decision, in all rounds."""
    cpu_us: float | None
    """CPU of the server and all its processes per decision, in microseconds; None if it cannot be measured."""
    throughput: float
    """Decisions a second over those of the first server, minus 1."""
    cpu: float | None
    """The same of the CPU of a decision."""


def run_cost_bench(
    given: Mapping[str, Any],
    edge: str,
    variants: Sequence[str],
    callers: Sequence[int],
    seconds: float,
    rounds: int,
    report: Path | None,
) -> int:
    """Measures, prints and returns the exit code.

    Args:
        given: Settings of the stack.
        edge: Who speaks HTTP/2 with the callers.
        variants: Names of `VARIANTS` to hold against everything.
        callers: Calls under way at once, one number after the other.
        seconds: Load of one round on each server.
        rounds: Rounds of each number of callers.
        report: JSON file for all figures.
    """
    parts = {"valkey", "broker", "worker", "market", "primary", "secondary", "challenger"}

    def use(stack: Stack, settings: LocalSettings, console: Console) -> int:
        costs, shares = _measure(stack, settings.dir, edge, variants, callers, seconds, rounds, console)
        console.print(_cost_table(costs, f"{edge} edge, {rounds} rounds of {seconds:g} s"))
        console.print(share_table(shares, EVERYTHING))
        if report is not None:
            document = {
                "commit": commit(),
                "edge": edge,
                "rounds": rounds,
                "seconds": seconds,
                "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
                "load_average": os.getloadavg(),
                "costs": [asdict(cost) for cost in costs],
                "shares": [asdict(share) for share in shares],
            }
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(json.dumps(document, indent=2) + "\n")
        return OK

    return run_with_stack(given, use, parts=parts)


def _measure(
    stack: Stack,
    directory: Path,
    edge: str,
    variants: Sequence[str],
    callers: Sequence[int],
    seconds: float,
    rounds: int,
    console: Console,
) -> tuple[list[Cost], list[Share]]:
    orders = order_flow(stack.endpoints.instruments)
    wanted = {name: VARIANTS[name] for name in dict.fromkeys((EVERYTHING, *variants))}
    with ExitStack() as opened:
        collector = opened.enter_context(trace_collector())
        targets = {
            name: opened.enter_context(_server(stack, directory / f"costs-{name}", edge, variant, collector))
            for name, variant in wanted.items()
        }
        for target in targets.values():
            warm_up(target.address, orders[0])
        opened.enter_context(scraping([targets[name].metrics_url for name in wanted if wanted[name].observed]))
        calls = decision_calls(orders)
        servers = [
            Server(
                *(name, PRETRADE, target.address, calls),
                usage=target.usage if wanted[name].observed else target.resources,
            )
            for name, target in targets.items()
        ]
        spent = CpuWatch(stack, targets[EVERYTHING])

        def watch(server: Server) -> AbstractContextManager[None]:
            if wanted[server.name].watched:  # only while it is measured: the others share the machine
                return watching(targets[server.name].http_address, targets[server.name].token_file)
            return spent() if server.name == EVERYTHING else nullcontext()

        costs = []
        for number in callers:
            with console.status(f"{number} callers"):
                costs += compare(servers, orders, callers=number, seconds=seconds, rounds=rounds, watch=watch)
        return costs, spent.shares()


def _server(
    stack: Stack, directory: Path, edge: str, variant: Variant, collector: str
) -> AbstractContextManager[Target]:
    if variant.observed:
        # Only what is sampled: on a machine that is short of cores most decisions would be slow ones.
        observing = {"PRETRADE_TRACING__OTLP_ENDPOINT": collector, "PRETRADE_TRACING__ONE_IN": "100"}
        observing |= {"PRETRADE_TRACING__SLOW_SECONDS": "10", "PRETRADE_DECISION_LOG__SLOW_SECONDS": "10"}
    else:
        observing = uncounted(directory / "uncounted")
    return decision_server(stack, directory, edge, {**observing, **variant.settings})


def compare(
    servers: Sequence[Server],
    orders: Sequence[pb.Order],
    *,
    callers: int,
    seconds: float,
    rounds: int,
    watch: Callable[[Server], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> list[Cost]:
    """Measures servers in turn, and compares each with the first.

    Args:
        servers: In the order in which they are shown.
        orders: For callers in Python.
        callers: Calls under way at once.
        seconds: Load of one round on each server.
        rounds: How many.
        watch: Entered around each round of a server.

    Raises:
        RuntimeError: A server gave no answer.
    """
    load = Load("unary", callers=callers)
    found: dict[str, list[Round]] = {server.name: [] for server in servers}
    for number in range(rounds):
        # Who comes when makes a difference: in another order each time.
        turn = number % len(servers)
        for server in (*servers[turn:], *servers[:turn]):
            closed_loop(
                server, load, orders, seconds=min(_WARM_UP_SECONDS, seconds), deadline_seconds=_DEADLINE_SECONDS
            )
            with watch(server):
                one = closed_loop(server, load, orders, seconds=seconds, deadline_seconds=_DEADLINE_SECONDS)
            found[server.name].append(one)
    first = found[servers[0].name]
    return [_cost(name, callers, mine, first) for name, mine in found.items()]


def _cost(name: str, callers: int, rounds: Sequence[Round], first: Sequence[Round]) -> Cost:
    pairs = list(zip(rounds, first, strict=True))
    cpu = [one.cpu_us for one in rounds if one.cpu_us is not None]
    ratios = [mine.cpu_us / other.cpu_us for mine, other in pairs if mine.cpu_us is not None and other.cpu_us]
    return Cost(
        name=name,
        callers=callers,
        decisions_per_second=statistics.median(one.decisions / one.seconds for one in rounds),
        p50_ms=statistics.median(one.latencies_ms["p50"] for one in rounds),
        p99_ms=statistics.median(one.latencies_ms.get("p99", one.latencies_ms["p50"]) for one in rounds),
        errors=sum(one.errors for one in rounds),
        cpu_us=statistics.median(cpu) if cpu else None,
        throughput=statistics.median(
            mine.decisions / mine.seconds / (other.decisions / other.seconds) - 1 for mine, other in pairs
        ),
        cpu=statistics.median(ratios) - 1 if ratios else None,
    )


def _cost_table(costs: Sequence[Cost], title: str) -> Table:
    table = Table(
        title=title,
        caption=f"ms; CPU of the server and its processes in µs a decision; to the right, against `{EVERYTHING}`",
        box=SIMPLE,
    )
    for heading in ("server", "callers", "dec./s", "p50", "p99", "errors", "CPU", "dec./s", "CPU"):
        table.add_column(heading, justify="left" if heading == "server" else "right")
    for cost in costs:
        table.add_row(
            *(cost.name, str(cost.callers), f"{cost.decisions_per_second:,.0f}"),
            *(f"{cost.p50_ms:.1f}", f"{cost.p99_ms:.1f}", str(cost.errors)),
            "" if cost.cpu_us is None else f"{cost.cpu_us:,.0f}",
            *(f"{cost.throughput:+.1%}", "" if cost.cpu is None else f"{cost.cpu:+.1%}"),
        )
    return table
