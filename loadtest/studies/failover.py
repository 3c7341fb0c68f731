"""Traffic over two regions while one of them is lost: what callers see, second by second.

Every flow of orders (a strategy's on an instrument) has a home region, by its hash, and its orders go there: limits per
strategy and idempotency keys hold within a region. A flow of region a asks by a client that was connected to a and b, a
flow of b by one that was connected to b and a; the client library does all the rest.

    python -m loadtest.studies.failover --a HOST:PORT --b HOST:PORT --instruments BTCUSDT.SIM --rate 100 --seconds 30

You take a region away while it runs. It prints a line for every second; `docs/two-regions.md` says what to expect. It
is an open loop: orders come when they are due, however long the answers take.
"""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest.generators.measurement import clock, percentile
from loadtest.generators.open_loop import arrivals
from loadtest.generators.orders import OrderFlow
from pretrade.client import AsyncClient, CallError
from pretrade.client.figures import figure
from pretrade.decision.v1 import decision_pb2 as pb

_LEAST_SECONDS: Final = 0.001
"""For an order that was late before it could be sent."""


@dataclass(frozen=True, slots=True)
class Call:
    """What became of one order."""

    due: float
    """Seconds since the run began."""
    home: str
    answered_by: str
    """The region; empty if none answered in time."""
    seconds: float
    """From the instant it was due to the answer, or to the end of its deadline."""
    action: str
    """Of the decision; the last status when there is none."""
    order_ref: str


async def run(
    a: str,
    b: str,
    instruments: Sequence[str],
    *,
    rate: float,
    seconds: float,
    deadline_seconds: float,
    observe: Callable[[Call], None] = lambda call: None,
) -> list[Call]:
    """Sends orders to two regions.

    Args:
        a: `HOST:PORT` of the one.
        b: `HOST:PORT` of the other.
        instruments: Instruments that both regions decide.
        rate: Orders a second over both.
        seconds: How long orders come.
        deadline_seconds: Of an order, over both regions.
        observe: Told of every call when it has ended.
    """
    regions = {a: "a", b: "b"}
    flow = OrderFlow(instruments, ref_prefix=f"region-{time.time_ns():x}-")
    calls: list[Call] = []
    began = clock()

    async def send(order: pb.Order, due: float) -> None:
        home = zlib.crc32(f"{order.strategy}/{order.instrument}".encode()) % 2
        answered_by = ""
        try:
            left = max(_LEAST_SECONDS, due + deadline_seconds - clock())
            decision = await clients[home].decide(order, deadline_seconds=left)
            answered_by, ended_as = regions[decision.server], decision.action
        except CallError as error:
            ended_as = error.code.name
        call = Call(due - began, "ab"[home], answered_by, clock() - due, ended_as, order.order_ref)
        calls.append(call)
        observe(call)

    async with (
        AsyncClient.connect(a, b) as of_a,
        AsyncClient.connect(b, a) as of_b,
        asyncio.TaskGroup() as tasks,
    ):
        clients = (of_a, of_b)
        async for due in arrivals(rate, seconds):
            tasks.create_task(send(flow.next({}), due))
    return calls


def table(calls: Sequence[Call]) -> Table:
    """A line for every second."""
    shown = Table(box=SIMPLE)
    for heading in ("second", "orders", "answered", "by a", "by b", "p50 ms", "p99 ms", "without"):
        shown.add_column(heading, justify="right")
    for second in range(int(max(call.due for call in calls)) + 1):
        found = [call for call in calls if int(call.due) == second]
        if not found:
            continue
        latencies = [1e3 * call.seconds for call in found if call.answered_by] or [math.nan]
        without = sorted({call.action for call in found if not call.answered_by})
        shown.add_row(
            str(second),
            str(len(found)),
            f"{sum(bool(call.answered_by) for call in found) / len(found):.1%}",
            *(str(sum(call.answered_by == name for call in found)) for name in ("a", "b")),
            *(figure(percentile(latencies, share), ".1f") for share in (0.5, 0.99)),
            ", ".join(without),
        )
    return shown


def main(
    a: Annotated[str, typer.Option(help="HOST:PORT of region a.")],
    b: Annotated[str, typer.Option(help="HOST:PORT of region b.")],
    instruments: Annotated[str, typer.Option(help="SYMBOL.VENUE that both regions decide, comma-separated.")],
    rate: Annotated[float, typer.Option(min=1, help="Orders a second, over both regions.")] = 100.0,
    seconds: Annotated[float, typer.Option(min=1, help="How long orders are sent.")] = 30.0,
    deadline_ms: Annotated[float, typer.Option(min=1, help="Deadline of every order.")] = 100.0,
) -> None:
    """Send orders to two regions, and show what callers see of the loss of one."""
    asked = instruments.split(",")
    calls = asyncio.run(run(a, b, asked, rate=rate, seconds=seconds, deadline_seconds=deadline_ms / 1e3))
    Console().print(table(calls))


if __name__ == "__main__":
    typer.run(main)
