"""An open-loop load generator: calls leave at a fixed rate, whatever becomes of the ones before.

In tests `OpenLoop` starts it as a process of its own, so that its CPU time and its stalls are not the server's. Every
call is logged before it is sent and after its end, so that what was acknowledged, what failed and what is unknown can
be told apart even when a process dies. Instants are seconds of the system's monotonic clock, which all processes
share; latency counts from the instant at which a call was *due*, not from when the generator got round to it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import enum
import gc
import math
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

import grpc.aio
import uvloop
from flood import Connection
from wire import framed

from loadtest.callers import percentile
from loadtest.orders import OrderFlow
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

MIDS: Final = 60_000.0
"""Mid price that every instrument's limit orders are placed around."""
_STOP_SECONDS: Final = 30.0
_READY_SECONDS: Final = 30.0
_PREFIX_BYTES: Final = 5
_STATUSES: Final = {status.value[0]: status.name for status in grpc.StatusCode}
_UNKNOWN: Final = frozenset(("DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED", "UNKNOWN"))


class Fate(enum.Enum):
    """What the caller knows of a call."""

    ACKNOWLEDGED = "acknowledged"
    """It heard a decision."""
    REFUSED = "refused"
    """It heard that there is no decision."""
    UNKNOWN = "unknown"
    """It heard nothing that tells."""


@dataclass(slots=True)
class Call:
    """One call as its caller saw it."""

    order_ref: str
    due: float
    """When it should have left."""
    sent: float
    """When it left."""
    ended: float = math.nan
    status: str = ""
    """gRPC status; empty when the log ends before the call does."""
    decision: pb.Decision | None = None

    @property
    def fate(self) -> Fate:
        """What is known of it."""
        if self.decision is not None:
            return Fate.ACKNOWLEDGED
        return Fate.UNKNOWN if not self.status or self.status in _UNKNOWN else Fate.REFUSED

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
        log: File for the calls; made anew.
        rate: Calls per second.
        instruments: Those that the server is configured with.
        deadline_seconds: Of each call.
        seconds: After which it stops by itself; None: when told to.
        prefix: Put before the number in `order_ref`; distinct among the generators of one server.
        connections: Calls take turns with them.
        on_the_wire: Speak HTTP/2 first hand. A call costs a tenth of what it does with `grpc.aio`, so that the server
            has the machine to itself; and an answer that comes after its deadline is logged as the answer it is.
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
        on_the_wire: bool = False,
    ) -> None:
        self._log = log
        self._argv = [
            *(sys.executable, str(Path(__file__)), target, str(log), "--rate", str(rate), "--prefix", prefix),
            *("--deadline", str(deadline_seconds), "--connections", str(connections)),
            *(("--on-the-wire",) if on_the_wire else ()),
            *("--seconds", str(math.inf if seconds is None else seconds), "--instruments", *instruments),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._log.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._argv, stdout=subprocess.PIPE)
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
    def _wait(process: subprocess.Popen[bytes]) -> None:
        with process:
            assert process.wait(_STOP_SECONDS) == 0, "the load generator failed"

    def run_for(self, seconds: float) -> None:
        """Lets that much load pass."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(seconds)
            raise AssertionError(f"the load generator ended with {code}")

    def calls(self) -> list[Call]:
        """The calls so far, in the order in which they left."""
        return read_log(self._log)


def read_log(log: Path) -> list[Call]:
    """The calls in a generator's log, in the order in which they left; a line that is not whole yet is left out."""
    calls: dict[str, Call] = {}
    for line in log.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        kind, ref, *rest = line.split()
        if kind == "sent":
            calls[ref] = Call(ref, float(rest[0]), float(rest[1]))
            continue
        call = calls[ref]
        call.ended, call.status = float(rest[0]), rest[1]
        if call.status == "OK":
            call.decision = pb.Decision.FromString(base64.b64decode(rest[2]))
    return list(calls.values())


def between(calls: Sequence[Call], start: float, end: float) -> list[Call]:
    """The calls that were due in [start, end)."""
    return [call for call in calls if start <= call.due < end]


def summary(calls: Sequence[Call]) -> str:
    """Statuses, sources and latency percentiles in one line."""
    statuses = Counter(call.status or "NO_END" for call in calls)
    answered = [call for call in calls if call.decision is not None]
    sources = Counter(
        pb.Source.Name(call.decision.source).removeprefix("SOURCE_") for call in answered if call.decision
    )
    if not answered:
        return f"{len(calls)} calls: {dict(statuses)}"
    latencies = [1e3 * call.latency for call in answered]
    p50, p99 = percentile(latencies, 0.5), percentile(latencies, 0.99)
    shares = ", ".join(f"{name} {count}" for name, count in (statuses + sources).most_common())
    return f"{len(calls)} calls: {shares}; p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {max(latencies):.1f} ms"


class _Log:
    """The generator's side of the log: one unbuffered write a line, so that a killed generator loses none."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def sent(self, ref: str, due: float, now: float) -> None:
        self._file.write(b"sent %s %.6f %.6f\n" % (ref.encode(), due, now))

    def ended(self, ref: str, now: float, status: str, decision: pb.Decision | None) -> None:
        packed = b"" if decision is None else base64.b64encode(decision.SerializeToString())
        self._file.write(b"end %s %.6f %s %s\n" % (ref.encode(), now, status.encode(), packed))


async def _generate(arguments: argparse.Namespace, log: _Log) -> None:
    """Sends calls until told to stop."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    clock = time.monotonic
    flow = OrderFlow(arguments.instruments, ref_prefix=arguments.prefix)
    mids = dict.fromkeys(arguments.instruments, MIDS)
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    channels = [grpc.aio.insecure_channel(arguments.target, options=options) for _ in range(arguments.connections)]
    stubs: list[decision_pb2_grpc.DecisionServiceAsyncStub] = [
        decision_pb2_grpc.DecisionServiceStub(channel) for channel in channels
    ]
    async with asyncio.timeout(_READY_SECONDS):
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
    gc.collect()
    gc.freeze()
    under_way: set[asyncio.Task[None]] = set()

    async def call(number: int, due: float) -> None:
        request = pb.DecideRequest(order=flow.next(mids))
        ref = request.order.order_ref
        log.sent(ref, due, clock())
        try:
            response = await stubs[number % len(stubs)].Decide(request, timeout=arguments.deadline)
        except grpc.aio.AioRpcError as error:
            log.ended(ref, clock(), error.code().name, None)
        else:
            log.ended(ref, clock(), "OK", response.decision)

    print("ready", flush=True)
    began, number = clock(), 0
    while not stopped.is_set():
        now = clock()
        if now - began >= arguments.seconds:
            break
        while (due := began + number / arguments.rate) <= now:
            task = asyncio.create_task(call(number, due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
            number += 1
        await asyncio.sleep(max(0.0, due - clock()))
    await asyncio.gather(*under_way)
    for channel in channels:
        await channel.close()


def _generate_on_the_wire(arguments: argparse.Namespace, log: _Log) -> None:
    """The same, with the frames made here. Who closes a connection ends it with an error."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    clock = time.monotonic
    flow = OrderFlow(arguments.instruments, ref_prefix=arguments.prefix)
    mids = dict.fromkeys(arguments.instruments, MIDS)
    selector = selectors.DefaultSelector()
    connections = []
    refs: dict[tuple[Connection, int], str] = {}
    for _ in range(arguments.connections):
        connections.append(Connection(arguments.target, round(1e3 * arguments.deadline), keeps_answers=True))
        selector.register(connections[-1].socket, selectors.EVENT_READ, connections[-1])
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    began, number = clock(), 0
    until = began + arguments.seconds
    while refs or not stopped.is_set():
        now = clock()
        if now >= until:
            stopped.set()
        due = began + number / arguments.rate
        if stopped.is_set():
            if now >= until + _STOP_SECONDS / 2:
                break  # what is unanswered stays so
            until = min(until, now)
        elif due <= now:
            order, connection = flow.next(mids), connections[number % len(connections)]
            log.sent(order.order_ref, due, clock())
            stream = connection.call(due, framed(pb.DecideRequest(order=order).SerializeToString()))
            refs[connection, stream] = order.order_ref
            connection.flush()
            number += 1
            continue
        for connection in connections:
            connection.flush()
        for key, _ in selector.select(min(0.001, max(0.0, due - now))):
            connection = key.data
            for stream, status, _ in connection.read():
                ref = refs.pop((connection, stream), None)
                if ref is None:
                    continue  # a stream that was reset after its status
                body = connection.answers.pop(stream, b"")
                decision = pb.DecideResponse.FromString(body[_PREFIX_BYTES:]).decision if status == 0 else None
                log.ended(ref, clock(), _STATUSES.get(status, "CANCELLED"), decision)
                connection.due.pop(stream, None)


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
    parser.add_argument("--on-the-wire", action="store_true")
    arguments = parser.parse_args()
    with arguments.log.open("wb", buffering=0) as file:
        if arguments.on_the_wire:
            _generate_on_the_wire(arguments, _Log(file))
        else:
            uvloop.run(_generate(arguments, _Log(file)))


if __name__ == "__main__":
    _main()
