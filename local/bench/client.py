"""What the client library costs its callers, next to the raw stubs, and what shared calls and a stream gain.

    python -m local.bench.client --rounds 5

Every way to ask is measured in turn, round after round, against a bare echo server in a process of its own: with a real
server the callers would wait, and their own cost would hardly show. A caller with stubs builds the order's message and
reads the decision's, as programs do; a caller with the library builds an `Order` and reads a `Decision`, and has
idempotency keys, retries and health besides. Orders are counted that were answered; CPU is that of the callers'
process. `--target` measures a real server instead.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import grpc
import grpc.aio
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from loadtest.benchmark.echo import echo_server
from pretrade.client import AsyncClient, AsyncShared, AsyncStream, Client, Decision, Order
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

_MANY: Final = 64
_BATCH: Final = 64
_BATCH_CALLERS: Final = 4
_DEADLINE_SECONDS: Final = 5.0
_INSTRUMENT: Final = "BTCUSDT.SIM"
ECHOED: Final = pb.DecideResponse(
    decision=pb.Decision(
        decision_id="01a2051f-c1a7-7003-b3fc-320084d24e7f",
        action=pb.ACTION_NO_TRADE,
        score=0.5,
        threshold=0.8,
        source=pb.SOURCE_PRIMARY,
        reasons=[pb.REASON_CODE_SCORE_BELOW_THRESHOLD],
    )
)
_Named = TypeVar("_Named", bound="WayName")


class Cost(NamedTuple):
    """One measurement."""

    orders_per_second: float
    cpu_micros: float
    """Of the callers' process, for an order."""


@dataclass(frozen=True)
class WayName:
    """What one way to ask is called."""

    callers: str
    """How many there are, and of which kind."""
    by: str
    """`stubs` or `library`, and how."""


@dataclass(frozen=True)
class Way(WayName):
    """One way to ask."""

    measure: Callable[[str, float], Awaitable[Cost]]
    """Takes address and seconds."""


def message() -> pb.Order:
    """An order, as a caller with stubs makes it."""
    return pb.Order(instrument=_INSTRUMENT, side=pb.SIDE_BUY, quantity=0.05, strategy="twap")


def order() -> Order:
    """The same, as a caller with the library makes it."""
    return Order(_INSTRUMENT, "buy", 0.05, "twap")


def read(decision: pb.Decision) -> bool:
    """What a caller with stubs reads."""
    return decision.action == pb.ACTION_TRADE and decision.score >= decision.threshold


def read_typed(decision: Decision) -> bool:
    """The same, of a caller with the library."""
    return decision.trades and decision.score is not None


def of_threads(ask: Callable[[], Any], callers: int, seconds: float) -> Cost:
    """Threads that ask one order after another."""
    counts = [0] * callers
    ask()  # connects
    end = time.monotonic() + seconds

    def call(number: int) -> None:
        ask()
        counts[number] += 1
        while time.monotonic() < end:
            ask()
            counts[number] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    began, cpu = time.monotonic(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _cost(sum(counts), began, cpu)


async def of_tasks(ask: Callable[[], Awaitable[int]], callers: int, seconds: float) -> Cost:
    """Tasks that ask one after another; `ask` returns how many orders were answered."""
    await ask()  # connects
    orders = 0
    began, cpu = time.monotonic(), time.process_time()
    end = began + seconds

    async def call() -> None:
        nonlocal orders
        answered = await ask()
        orders += answered
        while time.monotonic() < end:
            answered = await ask()
            orders += answered

    await asyncio.gather(*(call() for _ in range(callers)))
    return _cost(orders, began, cpu)


def _cost(orders: int, began: float, cpu: float) -> Cost:
    used = time.process_time() - cpu
    return Cost(orders / (time.monotonic() - began), 1e6 * used / orders)


def stubs_in_threads(callers: int) -> Callable[[str, float], Awaitable[Cost]]:
    """Threads with a stub."""

    def measure(address: str, seconds: float) -> Cost:
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            decide = decision_pb2_grpc.DecisionServiceStub(channel).Decide
            return of_threads(
                lambda: read(decide(pb.DecideRequest(order=message()), timeout=_DEADLINE_SECONDS).decision),
                callers,
                seconds,
            )

    return lambda address, seconds: asyncio.to_thread(measure, address, seconds)


def library_in_threads(callers: int, *, shared: bool = False) -> Callable[[str, float], Awaitable[Cost]]:
    """Threads with a `Client`, or with its shared calls."""

    def measure(address: str, seconds: float) -> Cost:
        with Client.connect(address, deadline_seconds=_DEADLINE_SECONDS) as client:
            asked = client.shared() if shared else client
            return of_threads(lambda: read_typed(asked.decide(order())), callers, seconds)

    return lambda address, seconds: asyncio.to_thread(measure, address, seconds)


def stubs_in_tasks(callers: int, *, batch: bool = False) -> Callable[[str, float], Awaitable[Cost]]:
    """Tasks with a stub."""

    async def measure(address: str, seconds: float) -> Cost:
        async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: decision_pb2_grpc.DecisionServiceAsyncStub = decision_pb2_grpc.DecisionServiceStub(channel)

            async def ask() -> int:
                read((await stub.Decide(pb.DecideRequest(order=message()), timeout=_DEADLINE_SECONDS)).decision)
                return 1

            async def ask_batch() -> int:
                request = pb.DecideBatchRequest(orders=[message() for _ in range(_BATCH)])
                results = (await stub.DecideBatch(request, timeout=_DEADLINE_SECONDS)).results
                return sum(result.HasField("decision") and read(result.decision) is not None for result in results)

            return await of_tasks(ask_batch if batch else ask, callers, seconds)

    return measure


def stream_in_tasks(callers: int) -> Callable[[str, float], Awaitable[Cost]]:
    """Tasks with a stream of the stub, matched by reference: the least that can be done."""

    async def measure(address: str, seconds: float) -> Cost:
        waiting: dict[str, asyncio.Future[pb.Decision]] = {}
        refs = itertools.count()
        async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: decision_pb2_grpc.DecisionServiceAsyncStub = decision_pb2_grpc.DecisionServiceStub(channel)
            stream, writing = stub.DecideStream(), asyncio.Lock()

            async def receive() -> None:
                async for response in stream:
                    waiting.pop(response.result.order_ref).set_result(response.result.decision)

            async def ask() -> int:
                asked = message()
                asked.order_ref = f"{next(refs)}"
                answer = waiting[asked.order_ref] = asyncio.get_running_loop().create_future()
                async with writing:  # gRPC writes one message at a time
                    await stream.write(pb.DecideStreamRequest(order=asked))
                read(await answer)
                return 1

            receiving = asyncio.create_task(receive())
            cost = await of_tasks(ask, callers, seconds)
            await stream.done_writing()
            await receiving
            return cost

    return measure


def library_in_tasks(
    callers: int, *, batch: bool = False, how: str = "", keys: bool = True
) -> Callable[[str, float], Awaitable[Cost]]:
    """Tasks with an `AsyncClient`, or with its `stream` or its `shared` calls."""

    async def measure(address: str, seconds: float) -> Cost:
        async with AsyncExitStack() as opened:
            client = await opened.enter_async_context(
                AsyncClient.connect(address, deadline_seconds=_DEADLINE_SECONDS, idempotency_keys=keys)
            )
            asked: AsyncClient | AsyncStream | AsyncShared = client
            if how == "stream":
                asked = await opened.enter_async_context(client.stream())
            elif how == "shared":
                asked = client.shared()

            async def ask() -> int:
                read_typed(await asked.decide(order()))
                return 1

            async def ask_batch() -> int:
                results = await client.decide_batch([order() for _ in range(_BATCH)])
                return sum(isinstance(result, Decision) and read_typed(result) is not None for result in results)

            return await of_tasks(ask_batch if batch else ask, callers, seconds)

    return measure


WAYS: Final = (
    Way("1 thread", "stubs", stubs_in_threads(1)),
    Way("1 thread", "library", library_in_threads(1)),
    Way(f"{_MANY} threads", "stubs", stubs_in_threads(_MANY)),
    Way(f"{_MANY} threads", "library", library_in_threads(_MANY)),
    Way(f"{_MANY} threads", "library, shared calls", library_in_threads(_MANY, shared=True)),
    Way("1 task", "stubs", stubs_in_tasks(1)),
    Way("1 task", "library", library_in_tasks(1)),
    Way(f"{_MANY} tasks", "stubs", stubs_in_tasks(_MANY)),
    Way(f"{_MANY} tasks", "library", library_in_tasks(_MANY)),
    Way(f"{_MANY} tasks", "stubs, a stream", stream_in_tasks(_MANY)),
    Way(f"{_MANY} tasks", "library, a stream", library_in_tasks(_MANY, how="stream")),
    Way(f"{_MANY} tasks", "library, shared calls", library_in_tasks(_MANY, how="shared")),
    Way(f"{_BATCH_CALLERS} tasks, batches of {_BATCH}", "stubs", stubs_in_tasks(_BATCH_CALLERS, batch=True)),
    Way(f"{_BATCH_CALLERS} tasks, batches of {_BATCH}", "library", library_in_tasks(_BATCH_CALLERS, batch=True)),
    Way(
        f"{_BATCH_CALLERS} tasks, batches of {_BATCH}",
        "library, no keys",
        library_in_tasks(_BATCH_CALLERS, batch=True, keys=False),
    ),
)
"""The first of each kind of callers is what the others are compared with."""


def table(found: Mapping[_Named, list[Cost]]) -> Table:
    """Medians of the rounds, and the median of each round's ratio to the stubs of the same round."""
    shown = Table(box=SIMPLE)
    for heading in ("callers", "by", "orders/s", "of the stubs'", "CPU µs an order", "of the stubs'"):
        shown.add_column(heading, justify="left" if heading in ("callers", "by") else "right")
    stubs = {way.callers: costs for way, costs in found.items() if way.by == "stubs"}
    for way, costs in found.items():
        pairs = list(zip(costs, stubs[way.callers], strict=True))
        shown.add_row(
            way.callers,
            way.by,
            f"{statistics.median(one.orders_per_second for one in costs):,.0f}",
            f"{statistics.median(one.orders_per_second / other.orders_per_second for one, other in pairs):.2f}",
            f"{statistics.median(one.cpu_micros for one in costs):.0f}",
            f"{statistics.median(one.cpu_micros / other.cpu_micros for one, other in pairs):.2f}",
        )
    return shown


async def measure(target: str | None, seconds: float, rounds: int) -> dict[Way, list[Cost]]:
    """Every way in turn, in every round.

    Args:
        target: `HOST:PORT` of a server; None for an echo of our own.
        seconds: Of each measurement.
        rounds: How many.
    """
    found: dict[Way, list[Cost]] = {way: [] for way in WAYS}
    async with AsyncExitStack() as opened:
        address = await opened.enter_async_context(echo_server(ECHOED)) if target is None else target
        for _ in range(rounds):
            for way in WAYS:
                found[way].append(await way.measure(address, seconds))
    return found


def main(
    target: Annotated[str | None, typer.Option(help="HOST:PORT of a server. [a bare echo]")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each measurement.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Of all of them; medians are shown.")] = 5,
) -> None:
    """Measure the client library next to the raw stubs."""
    Console().print(table(asyncio.run(measure(target, seconds, rounds))))


if __name__ == "__main__":
    typer.run(main)
