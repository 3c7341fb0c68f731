"""The CPU that a decision takes on the event loop and in the journal's thread, without network and model servers.

The request path is the server's own, from the serialised request to the serialised reply, with a journal on disk; see
`path_server.py`.

What comes by Envoy's lane passes its filter and the lane itself. Calls come in bursts, and a burst comes again when all
of it was answered. Run it as `python -m local.bench.path_cpu`; `PRETRADE_COMPILED=0` measures the pure twins, among
which there is no lane.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import uvloop

from feature_cache.compiled import compiled
from local.bench.fake_envoy import LANE, fake_envoy
from local.bench.lane_callers import LaneCallers
from local.bench.path_server import BROUGHT, INSTRUMENTS, SECOND_STRATEGY, Server, open_server
from pretrade.decision.v1 import decision_pb2 as pb
from server.journal.journal import Durability
from server.process.garbage import spare_the_hot_path
from server.rpc.call import Call
from server.rpc.decision import DecisionServicer
from server.rpc.framing import PREFIX_BYTES, framed

_ALLOWED_SECONDS: Final = 9.0
_LANE: Final = "lane"
_LANE_CALLERS: Final = 64
_KINDS: Final = 100
"""Different orders."""
_LOOK_EVERY: Final = 1_000
"""Answers of which one is looked at."""
_WARM_SHARE: Final = 0.2
"""Of the time of a measurement: before it, so long, nothing is counted."""
_JOURNAL_THREAD: Final = "audit-journal"
_METADATA: Final = (
    (b":method", b"POST"),
    (b":path", b"/pretrade.decision.v1.DecisionService/Decide"),
    (b":authority", b"127.0.0.1:7001"),
    (b":scheme", b"http"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
    (b"user-agent", b"grpc-python/1.76.0 grpc-c/51.0.0 (linux; chttp2)"),
    (b"grpc-accept-encoding", b"identity, deflate, gzip"),
    (b"grpc-timeout", b"200m"),
)
"""As a call in Envoy brings it."""

Usage = dict[str, float]
"""Microseconds of CPU a decision, by thread; decisions a second, rows a batch of the primary, the share of the
decisions that are its own, of those that were looked at, the share of all orders that was decided in columns, and the
orders of a block.
On a machine with other work some may be later stages'."""


def _orders(count: int, bringing: bool) -> list[pb.Order]:
    """Orders of three strategies; those of the second model's bring its set's last feature, if they are to."""
    orders = [
        pb.Order(
            order_ref=f"order-{number}",
            instrument=INSTRUMENTS[number % len(INSTRUMENTS)],
            side=pb.SIDE_BUY if number % 2 else pb.SIDE_SELL,
            quantity=0.05 + number / 1_000,
            limit_price=100.0 if number % 3 else None,
            strategy=("twap", "vwap", "arrival")[number % 3],
        )
        for number in range(count)
    ]
    for order in orders if bringing else ():
        if order.strategy == SECOND_STRATEGY:
            order.features.CopyFrom(BROUGHT)
    return orders


class _Methods:
    """What an edge knows of a servicer: its methods, and how their messages are read and written."""

    def __init__(self, servicer: DecisionServicer) -> None:
        self.handlers: dict[str, Any] = {}
        edge: Any = self
        servicer.add_to_application(edge)

    def add_generic_rpc_handlers(self, _: object) -> None:
        """Nothing: the same methods come as registered ones."""

    def add_registered_method_handlers(self, _: str, handlers: dict[str, Any]) -> None:
        """Takes the methods."""
        self.handlers |= handlers


class _Load:
    """Callers that ask again as soon as they are answered."""

    def __init__(self, server: Server, bringing: bool) -> None:
        self._servicer = server.servicer
        self._bringing = bringing
        self._metrics = server.metrics
        self._methods = _Methods(server.servicer).handlers
        self._edge: LaneCallers | None = None
        self.answered = 0
        self.looked_at = 0
        self.by_primary = 0
        """Of those that were looked at."""

    async def unary(self, number: int) -> None:
        """A caller of `Decide`."""
        wires = [pb.DecideRequest(order=order).SerializeToString() for order in _orders(_KINDS, self._bringing)]
        for wire in itertools.cycle(wires[number:] + wires[:number]):
            answer = await self._ask("Decide", wire)
            self.answered += 1
            if not self.answered % _LOOK_EVERY:
                self._look(pb.DecideResponse.FromString(answer).decision)

    async def lane(self, size: int, number: int) -> None:
        """So many callers of `Decide` in Envoy's lane, who ask together."""
        if self._edge is None:
            self._edge = LaneCallers(fake_envoy(), self._servicer, self._metrics, round(_ALLOWED_SECONDS))
        wires = [
            framed(pb.DecideRequest(order=order).SerializeToString())
            for order in _orders(_LANE_CALLERS, self._bringing)
        ]
        burst = self._edge.burst(wires[number * size : (number + 1) * size])
        while True:
            await self._edge.ask(burst, size)
            self.answered += size
            answer = dict(burst.call(0).sent)["D"]
            self._look(pb.DecideResponse.FromString(answer[PREFIX_BYTES:]).decision)
            burst.forget()

    @property
    def edge_seconds(self) -> float:
        """CPU of Envoy's worker so far, which the thread of the event loop has spent."""
        return 0.0 if self._edge is None else self._edge.worker_seconds

    def close(self) -> None:
        """Frees what it has."""
        if self._edge is not None:
            self._edge.close()

    async def batch(self, rows: int) -> None:
        """A caller of `DecideBatch` with so many orders."""
        wire = pb.DecideBatchRequest(orders=_orders(rows, self._bringing)).SerializeToString()
        while True:
            answer = await self._ask("DecideBatch", wire)
            self.answered += rows
            self._look(pb.DecideBatchResponse.FromString(answer).results[-1].decision)

    async def stream(self, rows: int) -> None:
        """A caller of `DecideStream` with so many orders under way."""
        handler, room = self._methods["DecideStream"], asyncio.Semaphore(rows)
        wires = [pb.DecideStreamRequest(order=order).SerializeToString() for order in _orders(_KINDS, self._bringing)]

        async def requests() -> AsyncIterator[Any]:
            for wire in itertools.cycle(wires):
                await room.acquire()
                yield handler.request_deserializer(wire)

        async for answer in handler.stream_stream(requests(), Call(None, _METADATA)):
            for wire in handler.response_serializer(answer):
                room.release()
                self.answered += 1
                if not self.answered % _LOOK_EVERY:
                    self._look(pb.DecideStreamResponse.FromString(wire).result.decision)

    async def _ask(self, method: str, wire: bytes) -> bytes:
        handler = self._methods[method]
        answer = await handler.unary_unary(handler.request_deserializer(wire), Call(_deadline(), _METADATA))
        written: bytes = handler.response_serializer(answer)
        self._servicer.sent(answer)
        return written

    def _look(self, decision: pb.Decision) -> None:
        self.looked_at += 1
        self.by_primary += decision.source == pb.SOURCE_PRIMARY


def _deadline() -> float:
    return time.monotonic() + _ALLOWED_SECONDS


def _in_bursts(size: int) -> tuple[int, Callable[[_Load, int], Awaitable[None]]]:
    """The callers of the lane, as groups of so many that ask together."""
    return _LANE_CALLERS // size, lambda load, number: load.lane(size, number)


WAYS: Final[dict[str, tuple[int, Callable[[_Load, int], Awaitable[None]]]]] = {
    "unary": (64, lambda load, number: load.unary(number)),
    "lone": (1, lambda load, number: load.unary(number)),
    "batch64": (4, lambda load, number: load.batch(64)),
    "batch256": (4, lambda load, number: load.batch(256)),
    "stream": (4, lambda load, number: load.stream(64)),
    **{f"{_LANE}{size}": _in_bursts(size) for size in (64, 16, 8)},
}
"""Callers, and what each of them does. Bursts of the lane may have other sizes, too."""


def _way(name: str) -> tuple[int, Callable[[_Load, int], Awaitable[None]]]:
    if name in WAYS:
        return WAYS[name]
    size = name.removeprefix(_LANE)
    if name.startswith(_LANE) and size.isdecimal() and 0 < int(size) <= _LANE_CALLERS:
        return _in_bursts(int(size))
    rule = f"one of {', '.join(WAYS)}, or {_LANE} and a size up to {_LANE_CALLERS}"
    raise typer.BadParameter(f"--way: must be {rule}, not {name!r}")


async def measure(
    way: str,
    seconds: float,
    folder: Path,
    durability: Durability,
    limited: int = 9,
    endpoints: int = 1,
    models: int = 1,
    bringing: bool = False,
) -> Usage:
    """Measures one way in for so long.

    Args:
        way: Of `WAYS`, or a size of the lane's bursts.
        seconds: For how long.
        folder: Where the journal is made.
        durability: Of the journal.
        limited: Features that the guards of the model's limits look at.
        endpoints: Of the primary.
        models: That decide side by side: one, or two with different feature sets.
        bringing: Whether the second model's orders bring a feature.
    """
    callers, ask = _way(way)
    async with AsyncExitStack() as stack:
        server = await open_server(stack, folder, durability, limited, endpoints, models)
        primaries, blocks = server.primaries, server.metrics.blocks
        load = _Load(server, bringing)
        stack.callback(load.close)
        asking = [asyncio.ensure_future(ask(load, number)) for number in range(callers)]
        await asyncio.sleep(_WARM_SHARE * seconds)
        before, answered, began = _cpu(load), load.answered, time.monotonic()
        batches = sum(one.batcher.batches for one in primaries)
        ended: set[asyncio.Future[None]] = set()
        while not ended:
            ended, _ = await asyncio.wait(asking, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if load.answered > answered:  # else a machine with other work has done nothing in so short a time
                break
        after, count, took = _cpu(load), load.answered - answered, time.monotonic() - began
        # From the start on: an order that goes alone is counted when it begins, and a block when it is decided, so
        # that a short span would have counts of different batches.
        (*_, (_, decided_blocks)), in_columns = blocks.buckets()
        alone = server.metrics.alone.total()
        batches = sum(one.batcher.batches for one in primaries) - batches
        for one in asking:
            one.cancel()
        for outcome in await asyncio.gather(*asking, return_exceptions=True):
            if not isinstance(outcome, asyncio.CancelledError):
                raise AssertionError(f"a caller ended by itself: {outcome!r}")
        if server.metrics.errors.total():
            raise AssertionError(f"orders without a decision: {+server.metrics.errors}")
        used = {name: 1e6 * (after[name] - before[name]) / count for name in after}
        own = load.by_primary / load.looked_at if load.looked_at else math.nan
        return used | {
            "per_second": count / took,
            "rows a batch": count / max(batches, 1),
            "by primary": own,
            "in columns": in_columns / max(in_columns + alone, 1),
            "orders a block": in_columns / max(decided_blocks, 1),
        }


def _cpu(load: _Load) -> dict[str, float]:
    """Seconds of CPU of the threads that decide, so far."""
    (journal,) = (thread for thread in threading.enumerate() if thread.name == _JOURNAL_THREAD)
    nanoseconds = Path(f"/proc/self/task/{journal.native_id}/schedstat").read_text().split()[0]
    return {"event loop": time.thread_time() - load.edge_seconds, "journal": int(nanoseconds) / 1e9}


def main(
    way: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(WAYS)}; bursts may have other sizes; can be repeated. [all]"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of one measurement.")] = 2.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 1,
    durability: Durability = Durability.FSYNC,
    limited: Annotated[
        int, typer.Option(min=0, max=25, help="Features that the guards UNCERTAIN and OUT_OF_DOMAIN look at; 0: none.")
    ] = 9,
    endpoints: Annotated[int, typer.Option(min=1, max=16, help="Of the primary.")] = 1,
    models: Annotated[
        int, typer.Option(min=1, max=2, help="That decide side by side; the second takes a set of its own.")
    ] = 1,
    bringing: Annotated[
        bool, typer.Option("--bringing", help="The second model's orders bring a feature, of which it takes six.")
    ] = False,
    folder: Annotated[Path | None, typer.Option(help="Where the journal is. [a temporary folder]")] = None,
) -> None:
    """Measure the CPU of a decision, in microseconds, decisions a second, rows a batch, and the primary's share."""
    if bringing and models == 1:
        raise typer.BadParameter(
            "needs --models 2, whose second one takes a feature of the caller", param_hint="--bringing"
        )
    for name in way or list(WAYS):
        found: list[Usage] = []
        if name.startswith(_LANE) and not way and compiled(LANE) is None:
            continue
        for _ in range(rounds):
            spare_the_hot_path()
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                found.append(
                    uvloop.run(measure(name, seconds, Path(fresh), durability, limited, endpoints, models, bringing))
                )
        medians = {key: round(statistics.median(one[key] for one in found), 2) for key in found[0]}
        print(json.dumps({"way": name, **medians}), flush=True)


if __name__ == "__main__":
    typer.run(main)
