"""What the durability of the audit costs: servers that differ in nothing else, measured in turn.

`pretrade bench --audit` starts the servers and this module. Each round measures every server, one after the other, in
an order that changes from round to round; the medians over the rounds are shown, so that whatever else the machine
does hits all alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final

import typer
import uvloop
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest.generators.channel import connected
from loadtest.generators.closed_loop import call_decide
from loadtest.generators.measurement import Measurement, percentile
from loadtest.generators.orders import OrderFlow

_ORDERS: Final = 4_096
_CALLERS: Final = (1, 16, 64)
_WARM_UP_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Cost:
    """Medians over the rounds of one server and one number of callers; latencies are milliseconds."""

    server: str
    callers: int
    decisions_per_second: float
    p50_ms: float
    p99_ms: float
    decisions: int
    errors: Mapping[str, int]
    """Orders without a decision in all rounds, by gRPC status."""


async def compare(
    servers: Mapping[str, str],
    instruments: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    deadline_seconds: float,
    report: Callable[[str], None],
) -> list[Cost]:
    """Measures every server with every number of callers.

    Args:
        servers: `HOST:PORT` of each, by name.
        instruments: Those that they are configured with.
        rounds: Rounds of each number of callers.
        seconds: Load of one round on each server.
        deadline_seconds: Of each call.
        report: Told what is being measured.
    """
    flow = OrderFlow(instruments, ref_prefix=f"bench-{time.time_ns():x}-")
    orders = [flow.next({}) for _ in range(_ORDERS)]
    costs = []
    for callers in _CALLERS:
        measured: dict[str, list[Measurement]] = {name: [] for name in servers}
        for i in range(rounds):
            names = list(servers)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                report(f"{callers} callers, round {i + 1} of {rounds}, {name}")
                async with connected(servers[name]) as stub:
                    for load in (_WARM_UP_SECONDS, seconds):
                        measurement = await call_decide(
                            stub, orders, callers=callers, seconds=load, deadline_seconds=deadline_seconds
                        )
                measured[name].append(measurement)
        costs += [_cost(name, callers, measurements) for name, measurements in measured.items()]
    return costs


def _cost(server: str, callers: int, measurements: Sequence[Measurement]) -> Cost:
    return Cost(
        server=server,
        callers=callers,
        decisions_per_second=statistics.median(each.rate for each in measurements),
        p50_ms=1e3 * statistics.median(percentile(each.latencies, 0.5) for each in measurements),
        p99_ms=1e3 * statistics.median(percentile(each.latencies, 0.99) for each in measurements),
        decisions=sum(len(each.latencies) for each in measurements),
        errors=dict(sum((each.errors for each in measurements), Counter())),
    )


def main(
    server: Annotated[list[str], typer.Option(help="NAME=HOST:PORT; repeated. The last is what others are held to.")],
    instrument: Annotated[list[str], typer.Option(help="SYMBOL.VENUE; can be repeated.")],
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="Load of one round, on each server.")] = 3.0,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds; medians are shown.")] = 3,
    deadline_ms: Annotated[float, typer.Option(min=1, max=10_000, help="Deadline of every order.")] = 200.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
) -> None:
    """Measures servers in turn and says what each costs against the last."""
    console = Console()
    servers = dict(one.split("=", 1) for one in server)
    with console.status("") as status:
        costs = uvloop.run(
            compare(
                servers,
                instrument,
                rounds=rounds,
                seconds=seconds,
                deadline_seconds=deadline_ms / 1e3,
                report=status.update,
            )
        )
    table = Table(
        title=f"{rounds} rounds of {seconds:g} s, deadline {deadline_ms:g} ms", box=SIMPLE, padding=(0, 0, 0, 1)
    )
    for heading in ("audit", "callers", "decisions/s", "p50 ms", "p99 ms", "errors", "throughput", "p99"):
        table.add_column(heading, justify="left" if heading == "audit" else "right")
    base = {cost.callers: cost for cost in costs if cost.server == list(servers)[-1]}
    for cost in costs:
        against = base[cost.callers]
        table.add_row(
            cost.server,
            str(cost.callers),
            f"{cost.decisions_per_second:,.0f}",
            f"{cost.p50_ms:.2f}",
            f"{cost.p99_ms:.2f}",
            str(sum(cost.errors.values())),
            f"{cost.decisions_per_second / against.decisions_per_second - 1:+.1%}",
            f"{cost.p99_ms - against.p99_ms:+.2f} ms",
        )
    console.print(table)
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(cost) for cost in costs], indent=2))


if __name__ == "__main__":
    typer.run(main)
