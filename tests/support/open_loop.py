"""An open-loop load generator: orders leave at a fixed rate, whatever happens to earlier ones.

In tests `OpenLoop` starts it as a process of its own, so that its CPU time and its stalls are not the server's. Every
order is logged before it is sent and after its end, so that the test can tell acknowledged, failed and unknown orders
apart even when a process dies. Instants are seconds of the system's monotonic clock, which all processes share. Latency
counts from the instant at which an order was *due*, not from when the generator sent it.

Orders are asked for one by one, in batches, or on streams. A caller with a client library gives up by itself when its
deadline has passed, and every second stream is left with orders under way. A caller *on the wire* never gives up: it
receives whatever the server says of each call, at any time, so what it did not receive was not sent.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import enum
import gc
import itertools
import math
import selectors
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, Self, get_args

import grpc.aio
import uvloop
from google.protobuf.duration_pb2 import Duration

from loadtest.generators.measurement import percentile
from loadtest.generators.open_loop import arrivals
from loadtest.generators.orders import OrderFlow
from pretrade.client.enum_names import enum_name
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc
from support.flood import Connection, Pace
from support.leash import LeashedPopen
from support.wire import DECIDE, DECIDE_BATCH, framed

MIDS: Final = 60_000.0
"""Mid price that every instrument's limit orders are placed around."""
LEFT: Final = "LEFT"
"""Status of an order whose caller left its stream before its result came."""
NO_RESULT: Final = "NO_RESULT"
"""Status of an order that the answer to its batch left out, or the whole of its stream."""
_STOP_SECONDS: Final = 30.0
_READY_SECONDS: Final = 30.0
_PREFIX_BYTES: Final = 5
_STATUSES: Final = {status.value[0]: status.name for status in grpc.StatusCode}
_UNKNOWN: Final = frozenset(("DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED", "UNKNOWN", LEFT))

Shape = Literal["unary", "batch", "stream"]


class Fate(enum.Enum):
    """What the caller knows of an order."""

    ACKNOWLEDGED = "acknowledged"
    """It heard a decision."""
    REFUSED = "refused"
    """It heard that there is no decision."""
    UNKNOWN = "unknown"
    """It heard nothing that tells."""


@dataclass(slots=True)
class Call:
    """One order as its caller saw it: a call of its own, or a part of a batch or stream."""

    order_ref: str
    due: float
    """When it should have left."""
    sent: float
    """When it left."""
    ended: float = math.nan
    status: str = ""
    """gRPC status, of the call or of the order's own result; empty when the log ends before the order does."""
    decision: pb.Decision | None = None
    deadline_seconds: float = math.inf
    """What the caller allowed for it."""
    own_timer: bool = False
    """True when the caller gives up by itself after that: then DEADLINE_EXCEEDED may be its own word."""
    leaves: float = math.inf
    """When the caller means to give up. On a busy machine it is late for that, and hears of it (`ended`) later."""

    @property
    def fate(self) -> Fate:
        """What is known of it."""
        if self.decision is not None:
            return Fate.ACKNOWLEDGED
        return Fate.UNKNOWN if not self.status or self.status in _UNKNOWN else Fate.REFUSED

    @property
    def given_up(self) -> bool:
        """Whether the caller may have ended it by itself, so that an answer may have been on its way."""
        return self.status == LEFT or (self.own_timer and self.status == "DEADLINE_EXCEEDED")

    @property
    def latency(self) -> float:
        """Seconds from when it was due to its end."""
        return self.ended - self.due

    @property
    def service_seconds(self) -> float:
        """Seconds from when it left to its end: what the server and the wire took."""
        return self.ended - self.sent


class OpenLoop:
    """The generator's process; a context manager that starts it and, at the end, waits for the calls under way.

    Args:
        target: `host:port` of the decision service.
        log: File for the orders; made anew.
        rate: Orders per second.
        instruments: Those that the server is configured with.
        deadline_seconds: Of each call, and of each order on a stream.
        seconds: After which it stops by itself; None: when told to.
        prefix: Put before the number in `order_ref`; distinct among the generators of one server.
        connections: Calls take turns with them.
        shape: How orders are asked for.
        together: Orders in a batch, or on a stream before the next one is opened.
        at_once: Single calls, or orders of a stream, that are due at the same instant, so that a server can decide them
            together.
        on_the_wire: Speak HTTP/2 first hand, which streams cannot. A call costs a tenth of what it does with
            `grpc.aio`, so that the server has the machine to itself; and an answer that comes after its deadline is
            logged as the answer it is.
    """

    def __init__(
        self,
        target: str,
        log: Path,
        rate: float,
        instruments: Sequence[str],
        *,
        deadline_seconds: float = 0.025,
        seconds: float | None = None,
        prefix: str = "load-",
        connections: int = 2,
        shape: Shape = "unary",
        together: int = 16,
        at_once: int = 1,
        on_the_wire: bool = False,
    ) -> None:
        assert not (on_the_wire and shape == "stream")
        assert at_once == 1 or shape != "batch"
        self._log = log
        self._arguments = [
            *(target, str(log), "--rate", str(rate), "--prefix", prefix),
            *("--deadline", str(deadline_seconds), "--connections", str(connections)),
            *("--shape", shape, "--together", str(1 if shape == "unary" else together)),
            *("--at-once", str(at_once)),
            *(("--on-the-wire",) if on_the_wire else ()),
            *("--seconds", str(math.inf if seconds is None else seconds), "--instruments", *instruments),
        ]
        self._process: LeashedPopen | None = None
        self._reader = LogReader(log)

    def __enter__(self) -> Self:
        self._log.unlink(missing_ok=True)
        self._reader = LogReader(self._log)
        self._process = LeashedPopen.module("support.open_loop", self._arguments, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        assert ready == b"ready\n", "the load generator did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Sends no further call, waits for those under way and ends. Safe to call twice."""
        process = self._process
        if process is None:
            return
        self._process = None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        self._wait(process)

    def wait(self) -> None:
        """Waits for the end of a generator that was given its `seconds`."""
        assert self._process is not None
        process, self._process = self._process, None
        self._wait(process)

    @staticmethod
    def _wait(process: LeashedPopen) -> None:
        with process:
            assert process.wait(_STOP_SECONDS) == 0, "the load generator failed"

    def run_for(self, seconds: float) -> None:
        """Lets that much load pass."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(seconds)
            raise AssertionError(f"the load generator ended with {code}")

    def calls(self) -> list[Call]:
        """The orders so far, in the order in which they left."""
        return self._reader.calls()


class LogReader:
    """Reads a generator's log as it grows, each line once: a test asks many times, on the machine that it loads.

    Args:
        log: The file, which need not be there yet.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._read_bytes = 0
        self._calls: dict[str, Call] = {}
        self._deadline_seconds, self._own_timer = math.inf, False

    def calls(self) -> list[Call]:
        """The orders so far, in the order in which they left; a line that is not whole yet is left out.

        Orders that were given before learn of their ends.
        """
        with self._log.open("rb") as file:
            file.seek(self._read_bytes)
            lines, _, _ = file.read().rpartition(b"\n")
        if lines:
            self._read_bytes += len(lines) + 1
            for line in lines.decode().split("\n"):
                self._take(line)
        return list(self._calls.values())

    def _take(self, line: str) -> None:
        kind, ref, *rest = line.split()
        if kind == "load":
            self._deadline_seconds, self._own_timer = float(ref), rest == ["1"]
        elif kind == "sent":
            due, sent = map(float, rest)
            self._calls[ref] = Call(ref, due, sent, deadline_seconds=self._deadline_seconds, own_timer=self._own_timer)
        else:
            call = self._calls[ref]
            call.ended, call.status = float(rest[0]), rest[1]
            if call.status == "OK":
                call.decision = pb.Decision.FromString(base64.b64decode(rest[2]))


def between(calls: Sequence[Call], start: float, end: float) -> list[Call]:
    """The calls that were due in [start, end)."""
    return [call for call in calls if start <= call.due < end]


def summary(calls: Sequence[Call]) -> str:
    """Statuses, sources and latency percentiles in one line."""
    statuses = Counter(call.status or "NO_END" for call in calls)
    answered = [call for call in calls if call.decision is not None]
    sources = Counter(enum_name(pb.Source, call.decision.source) for call in answered if call.decision)
    if not answered:
        return f"{len(calls)} calls: {dict(statuses)}"
    latencies = [1e3 * call.latency for call in answered]
    p50, p99 = percentile(latencies, 0.5), percentile(latencies, 0.99)
    shares = ", ".join(f"{name} {count}" for name, count in (statuses + sources).most_common())
    return f"{len(calls)} calls: {shares}; p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {max(latencies):.1f} ms"


class _Log:
    """The generator's side of the log: one unbuffered write for what happens at once, so that a killed generator loses
    nothing."""

    def __init__(self, file: BinaryIO, deadline_seconds: float, own_timer: bool) -> None:
        self._file = file
        file.write(b"load %.6f %d\n" % (deadline_seconds, own_timer))

    def sent(self, orders: Iterable[pb.Order], due: float, now: float) -> None:
        self._file.write(b"".join(b"sent %s %.6f %.6f\n" % (order.order_ref.encode(), due, now) for order in orders))

    def ended(self, ref: str, now: float, status: str, decision: pb.Decision | None = None) -> None:
        packed = b"" if decision is None else base64.b64encode(decision.SerializeToString())
        self._file.write(b"end %s %.6f %s %s\n" % (ref.encode(), now, status.encode(), packed))

    def batch(self, refs: Sequence[str], results: Sequence[pb.OrderResult]) -> None:
        """The results of a batch."""
        now = time.monotonic()
        for result in results:
            self.result(result, now)
        for ref in set(refs) - {result.order_ref for result in results}:
            self.ended(ref, now, NO_RESULT)

    def result(self, result: pb.OrderResult, now: float) -> None:
        """The result of one order of a batch or stream."""
        if result.HasField("decision"):
            self.ended(result.order_ref, now, "OK", result.decision)
        else:
            self.ended(result.order_ref, now, _STATUSES[result.error.code])


class _Orders:
    """The orders that a generator sends, one after another."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._flow = OrderFlow(arguments.instruments, ref_prefix=arguments.prefix)
        self._mids = dict.fromkeys(arguments.instruments, MIDS)

    def take(self, count: int) -> list[pb.Order]:
        return [self._flow.next(self._mids) for _ in range(count)]


class _Caller:
    """Asks with the client library."""

    def __init__(self, arguments: argparse.Namespace, log: _Log, channels: Sequence[grpc.aio.Channel]) -> None:
        self._deadline_seconds: float = arguments.deadline
        self._log = log
        self._stubs: list[decision_pb2_grpc.DecisionServiceAsyncStub] = [
            decision_pb2_grpc.DecisionServiceStub(channel) for channel in channels
        ]
        self._turn = itertools.cycle(self._stubs)

    async def unary(self, orders: Sequence[pb.Order], due: float) -> None:
        """One order."""
        (order,) = orders
        self._log.sent(orders, due, time.monotonic())
        try:
            response = await next(self._turn).Decide(pb.DecideRequest(order=order), timeout=self._deadline_seconds)
        except grpc.aio.AioRpcError as error:
            self._log.ended(order.order_ref, time.monotonic(), error.code().name)
        else:
            self._log.ended(order.order_ref, time.monotonic(), "OK", response.decision)

    async def batch(self, orders: Sequence[pb.Order], due: float) -> None:
        """Several orders at once."""
        self._log.sent(orders, due, time.monotonic())
        request = pb.DecideBatchRequest(orders=orders)
        try:
            response = await next(self._turn).DecideBatch(request, timeout=self._deadline_seconds)
        except grpc.aio.AioRpcError as error:
            now = time.monotonic()
            for order in orders:
                self._log.ended(order.order_ref, now, error.code().name)
        else:
            self._log.batch([order.order_ref for order in orders], response.results)

    async def stream(self, orders: asyncio.Queue[tuple[pb.Order, float] | None], leaves: bool) -> None:
        """A stream of the orders in the queue, until None; `leaves` does not wait for the results still due then."""
        allowed = Duration()
        allowed.FromNanoseconds(round(1e9 * self._deadline_seconds))
        unheard: dict[str, None] = {}
        asked = False

        async def ask() -> None:
            nonlocal asked
            while (entry := await orders.get()) is not None:
                order, due = entry
                order.timeout.CopyFrom(allowed)
                unheard[order.order_ref] = None
                self._log.sent((order,), due, time.monotonic())
                await call.write(pb.DecideStreamRequest(order=order))
            asked = True
            if leaves:
                call.cancel()
            else:
                await call.done_writing()

        call = next(self._turn).DecideStream()
        asking = asyncio.create_task(ask())
        try:
            async for response in call:
                unheard.pop(response.result.order_ref)
                self._log.result(response.result, time.monotonic())
        except asyncio.CancelledError:
            status = LEFT
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        else:
            status = NO_RESULT
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await asking
        now = time.monotonic()
        for ref in unheard:
            self._log.ended(ref, now, status)
        while not asked and (entry := await orders.get()) is not None:
            now = time.monotonic()  # it never left
            self._log.sent(entry[:1], entry[1], now)
            self._log.ended(entry[0].order_ref, now, status)


async def _generate(arguments: argparse.Namespace, log: _Log) -> None:
    """Sends orders until told to stop."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    orders = _Orders(arguments)
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    channels = [grpc.aio.insecure_channel(arguments.target, options=options) for _ in range(arguments.connections)]
    async with asyncio.timeout(_READY_SECONDS):
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
    gc.collect()
    gc.freeze()
    caller = _Caller(arguments, log, channels)
    together: int = arguments.together
    streaming = arguments.shape == "stream"
    stream: asyncio.Queue[tuple[pb.Order, float] | None] | None = None
    streams = itertools.count()
    under_way: set[asyncio.Task[None]] = set()

    def start(coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        under_way.add(task)
        task.add_done_callback(under_way.discard)

    print("ready", flush=True)
    number = 0
    in_an_instant = arguments.at_once * (1 if streaming else together)
    async for due in arrivals(arguments.rate, arguments.seconds, together=in_an_instant, stopped=stopped):
        for _ in range(arguments.at_once):
            if not streaming:
                start(getattr(caller, arguments.shape)(orders.take(together), due))
                continue
            if number % together == 0:
                if stream is not None:
                    stream.put_nowait(None)
                stream = asyncio.Queue()
                start(caller.stream(stream, leaves=next(streams) % 2 == 1))
            assert stream is not None
            stream.put_nowait((orders.take(1)[0], due))
            number += 1
    if stream is not None:
        stream.put_nowait(None)
    await asyncio.gather(*under_way)
    for channel in channels:
        await channel.close()


def _generate_on_the_wire(arguments: argparse.Namespace, log: _Log) -> None:
    """The same, with the frames made here. Who closes a connection ends it with an error."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    clock = time.monotonic
    orders, together, batches = _Orders(arguments), arguments.together, arguments.shape == "batch"
    selector = selectors.DefaultSelector()
    connections = []
    under_way: dict[tuple[Connection, int], list[str]] = {}
    for _ in range(arguments.connections):
        connection = Connection(
            arguments.target,
            round(1e3 * arguments.deadline),
            keeps_answers=True,
            path=DECIDE_BATCH if batches else DECIDE,
        )
        connections.append(connection)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
    turn = itertools.cycle(connections)
    gc.collect()
    gc.freeze()

    def send(due: float) -> None:
        taken, connection = orders.take(together), next(turn)
        request = pb.DecideBatchRequest(orders=taken) if batches else pb.DecideRequest(order=taken[0])
        log.sent(taken, due, clock())
        stream = connection.call(due, framed(request.SerializeToString()))
        under_way[connection, stream] = [order.order_ref for order in taken]

    def heard(connection: Connection, stream: int, status: int) -> None:
        refs = under_way.pop((connection, stream), None)
        if refs is None:
            return  # a stream that was reset after its status
        now, body = clock(), connection.answers.pop(stream, b"")
        connection.due.pop(stream, None)
        if status:
            for ref in refs:
                log.ended(ref, now, _STATUSES.get(status, "CANCELLED"))
        elif batches:
            log.batch(refs, pb.DecideBatchResponse.FromString(body[_PREFIX_BYTES:]).results)
        else:
            log.ended(refs[0], now, "OK", pb.DecideResponse.FromString(body[_PREFIX_BYTES:]).decision)

    print("ready", flush=True)
    began = clock()
    pace, until = Pace(began, arguments.rate / (together * arguments.at_once)), began + arguments.seconds
    while under_way or not stopped.is_set():
        now = clock()
        if now >= until:
            stopped.set()
        if stopped.is_set():
            if now >= until + _STOP_SECONDS / 2:
                break  # what is unanswered stays so
            until = min(until, now)
        else:
            for due in pace.overdue(now):
                for _ in range(arguments.at_once):
                    send(due)
        for connection in connections:
            connection.flush()
        for key, _ in selector.select(min(0.001, max(0.0, pace.next_due - clock()))):
            for stream, status, _ in key.data.read():
                heard(key.data, stream, status)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("log", type=Path)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--instruments", nargs="+", required=True)
    parser.add_argument("--shape", choices=get_args(Shape), required=True)
    parser.add_argument("--together", type=int, required=True)
    parser.add_argument("--at-once", type=int, required=True)
    parser.add_argument("--on-the-wire", action="store_true")
    arguments = parser.parse_args()
    own_timer = not arguments.on_the_wire and arguments.shape != "stream"
    with arguments.log.open("wb", buffering=0) as file:
        log = _Log(file, arguments.deadline, own_timer)
        if arguments.on_the_wire:
            _generate_on_the_wire(arguments, log)
        else:
            uvloop.run(_generate(arguments, log))


if __name__ == "__main__":
    _main()
