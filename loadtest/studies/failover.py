"""Traffic over two regions while one of them is lost: what callers see, second by second.

Every flow of orders (a strategy's on an instrument) has a home region, by its hash, and its orders go there: limits per
strategy and idempotency keys hold within a region. An order whose region does not answer in its share of the deadline
goes to the other one, once. A region that fails several orders in a row is *away*: its flows go to the other one at
once, and now and then one order checks whether it is back. The other region is farther: its calls take a round trip
more, which is simulated.

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

import grpc
import grpc.aio
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest.generators.measurement import ACTIONS, clock, percentile
from loadtest.generators.open_loop import arrivals
from loadtest.generators.orders import OrderFlow
from pretrade.client.figures import figure
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

_GO_ELSEWHERE: Final = frozenset(
    (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
)
_CHANNEL_OPTIONS: Final = (
    # A region that is back is found in a fraction of a second, not after gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


@dataclass(frozen=True, slots=True)
class Routing:
    """When an order goes elsewhere."""

    deadline_seconds: float = 0.1
    """Of an order, over both regions."""
    home_share: float = 0.5
    """Part of it that its home region gets while the other one could still answer."""
    failures_to_leave: int = 5
    """Orders in a row that a region must fail to be away."""
    seconds_away: float = 1.0
    """Until an order tries it again."""
    distance_seconds: float = 0.01
    """Round trip to the other region, simulated."""


class Region:
    """One region, as its callers see it.

    Args:
        name: For people.
        address: `HOST:PORT` of its decision service.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self.stub: decision_pb2_grpc.DecisionServiceAsyncStub = decision_pb2_grpc.DecisionServiceStub(self._channel)
        self._failures = 0
        self._away_until = -math.inf

    def takes(self, now: float, routing: Routing) -> bool:
        """Whether to send it its own orders. While it is away, one order now and then checks whether it is back."""
        if self._failures < routing.failures_to_leave:
            return True
        if now < self._away_until:
            return False
        self._away_until = now + routing.seconds_away
        return True

    def ended(self, well: bool, now: float, routing: Routing) -> None:
        """Counts an order's outcome."""
        self._failures = 0 if well else self._failures + 1
        if self._failures == routing.failures_to_leave:
            self._away_until = now + routing.seconds_away

    async def close(self) -> None:
        """Ends its connection."""
        await self._channel.close()


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
    attempts: int
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
    routing: Routing,
    observe: Callable[[Call], None] = lambda call: None,
) -> list[Call]:
    """Sends orders to two regions.

    Args:
        a: `HOST:PORT` of the one.
        b: `HOST:PORT` of the other.
        instruments: Instruments that both regions decide.
        rate: Orders a second over both.
        seconds: How long orders come.
        routing: When an order goes elsewhere.
        observe: Told of every call when it has ended.
    """
    regions = (Region("a", a), Region("b", b))
    flow = OrderFlow(instruments, ref_prefix=f"region-{time.time_ns():x}-")
    calls: list[Call] = []
    began = clock()
    try:
        async with asyncio.TaskGroup() as tasks:
            async for due in arrivals(rate, seconds):
                tasks.create_task(_send(flow.next({}), due, began, regions, routing, calls, observe))
    finally:
        for region in regions:
            await region.close()
    return calls


async def _send(
    order: pb.Order,
    due: float,
    began: float,
    regions: tuple[Region, Region],
    routing: Routing,
    calls: list[Call],
    observe: Callable[[Call], None],
) -> None:
    """One order: to its home, or to the other region."""
    flow = zlib.crc32(f"{order.strategy}/{order.instrument}".encode())
    home, other = regions if flow % 2 == 0 else regions[::-1]
    deadline = due + routing.deadline_seconds
    left = deadline - clock()
    attempts = [(home, left * routing.home_share), (other, left)] if home.takes(clock(), routing) else [(other, left)]
    made, answered_by, ended_as = 0, "", ""
    for region, share in attempts:
        distance = 0.0 if region is home else routing.distance_seconds
        allowed = min(share, deadline - clock()) - distance
        if allowed <= 0:
            break
        made += 1
        await asyncio.sleep(distance)
        try:
            response = await region.stub.Decide(pb.DecideRequest(order=order), timeout=allowed)
        except grpc.aio.AioRpcError as error:
            ended_as = error.code().name
            region.ended(error.code() not in _GO_ELSEWHERE, clock(), routing)
            if error.code() not in _GO_ELSEWHERE:
                break
        else:
            region.ended(True, clock(), routing)
            answered_by, ended_as = region.name, ACTIONS[response.decision.action]
            break
    call = Call(due - began, home.name, answered_by, clock() - due, made, ended_as, order.order_ref)
    calls.append(call)
    observe(call)


def table(calls: Sequence[Call]) -> Table:
    """A line for every second."""
    shown = Table(box=SIMPLE)
    for heading in ("second", "orders", "answered", "by a", "by b", "second attempts", "p50 ms", "p99 ms", "without"):
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
            str(sum(call.attempts > 1 for call in found)),
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
    distance_ms: Annotated[float, typer.Option(min=0, help="Round trip between the regions, simulated.")] = 10.0,
) -> None:
    """Send orders to two regions, and show what callers see of the loss of one."""
    routing = Routing(deadline_seconds=deadline_ms / 1e3, distance_seconds=distance_ms / 1e3)
    calls = asyncio.run(run(a, b, instruments.split(","), rate=rate, seconds=seconds, routing=routing))
    Console().print(table(calls))


if __name__ == "__main__":
    typer.run(main)
