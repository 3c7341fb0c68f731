"""Defines a load: which calls, and how many at once or how many a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from google.protobuf.message import Message

from pretrade.decision.v1 import decision_pb2 as pb

Method = Literal["unary", "stream", "batch"]
METHODS: Final[Mapping[Method, str]] = {"unary": "Decide", "stream": "DecideStream", "batch": "DecideBatch"}
SERVICE: Final = "pretrade.decision.v1.DecisionService"
ORDERS: Final[Mapping[Method, int]] = {"unary": 1, "stream": 64, "batch": 64}
"""Orders of one call: a stream sends so many and ends, where h2load calls."""
LARGE_BATCH: Final = 256
"""The most orders that `DecideBatch` takes."""
Calls = Mapping[tuple[Method, int], "Call"]
"""The calls that a server takes, by method and number of orders."""
PRETRADE, ECHO, ALTERNATIVE = "pretrade", "echo", "alternative"


@dataclass(frozen=True, slots=True)
class Call:
    """One request that is sent again and again."""

    path: str
    body: bytes
    orders: int
    """Decisions or scores that it asks for."""
    is_grpc: bool = True
    answer_bytes: int | None = None
    """Of the answer, where that is always the same; then an answer that is none is told by what is missing."""
    may_be_cut: bool = True
    """False where the server may restart when its caller leaves: then each call is waited for."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a server has used and done so far."""

    cpu_seconds: float
    """Of the server and all its processes."""
    memory_bytes: int
    """Resident, of all of them."""
    decisions: float | None = None
    """By its own count; None where it keeps none, as the next two."""
    refused: float | None = None
    """Orders that got no decision."""
    scored: float | None = None
    """Decisions by the score of a replica."""


@dataclass(frozen=True, slots=True)
class Server:
    """Something that can be put under load."""

    name: str
    """Unique in a run; the same in every run."""
    kind: str
    """`PRETRADE`, a bare `ECHO`, or an `ALTERNATIVE` that only scores."""
    address: str
    """`HOST:PORT`."""
    calls: Calls
    transport: str = ""
    """Who speaks HTTP/2; an echo is the yardstick of those with the same."""
    usage: Callable[[], Usage] | None = None
    """None if it cannot be read: then only callers that see each status may call it."""
    pid: int | None = None
    """Of the process that decides, for a profile."""


@dataclass(frozen=True, slots=True)
class Load:
    """One way of calling."""

    method: Method
    callers: int = 0
    """Closed loop: calls under way at once, each followed by the next; 0 in an open loop."""
    rate: float = 0.0
    """Open loop: orders a second, whatever happens to earlier ones."""
    share: float = 0.0
    """Open loop: the same as a share of what the server reached in a closed loop of the method."""
    orders: int = 0
    """Of one call; 0 for as many as the method usually takes."""
    servers: tuple[str, ...] = ()
    """Who is called; empty for all that take the call."""

    @property
    def call(self) -> tuple[Method, int]:
        """Under which a server has the call."""
        return self.method, self.orders or ORDERS[self.method]

    @property
    def name(self) -> str:
        """For people, and to find the same load in another run."""
        if self.share:
            return f"{self.method}, at {self.share:.0%}"
        if self.rate:
            return f"{self.method}, {self.rate:,.0f}/s"
        if self.call[1] > 1:
            return f"{self.method}, {self.callers} × {self.call[1]}"
        return f"{self.method}, {self.callers} caller{'s' if self.callers > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run measures, and for how long."""

    closed: Sequence[Load]
    opened: Sequence[Load]
    rounds: int = 2
    """Of each loop; medians are shown. Open loops at a share of the capacity run once."""
    seconds: float = 2.0
    """Of a closed loop in one round, on one server."""
    open_seconds: float = 6.0
    """Of an open one in one round: three times as long."""
    deadline_seconds: float = 0.2
    """Of each order, where the generator sets one."""


def plan(*, quick: bool, rounds: int | None, seconds: float | None, deadline_seconds: float) -> Plan:
    """The loads for one deployment: all of them, or those that a minute or two has room for."""
    callers = (1, 64) if quick else (1, 16, 64, 256)
    closed = [Load("unary", callers=number) for number in callers]
    methods: tuple[Method, ...] = ("stream", "batch")
    closed += [Load(method, callers=number) for method in methods for number in ((1,) if quick else (1, 4))]
    opened = [Load(method, share=0.5) for method in METHODS]
    defaults = Plan(closed, opened)
    return Plan(
        closed,
        [Load("unary", rate=200.0), *opened],
        rounds=rounds or (1 if quick else defaults.rounds),
        seconds=seconds or (1.0 if quick else defaults.seconds),
        open_seconds=3.0 * seconds if seconds else 3.0 if quick else defaults.open_seconds,
        deadline_seconds=deadline_seconds,
    )


def decision_calls(orders: Sequence[pb.Order]) -> Calls:
    """The calls of the decision service, framed as gRPC sends them, that so many orders suffice for."""
    bodies: dict[tuple[Method, int], bytes] = {("unary", 1): framed(pb.DecideRequest(order=orders[0]))}
    if len(orders) >= (number := ORDERS["stream"]):
        bodies["stream", number] = b"".join(framed(pb.DecideStreamRequest(order=order)) for order in orders[:number])
    for number in (ORDERS["batch"], LARGE_BATCH):
        if len(orders) >= number:
            bodies["batch", number] = framed(pb.DecideBatchRequest(orders=orders[:number]))
    return {key: Call(f"/{SERVICE}/{METHODS[key[0]]}", body, key[1]) for key, body in bodies.items()}


def framed(message: Message) -> bytes:
    """A message as gRPC sends it, uncompressed."""
    wire = message.SerializeToString()
    return b"\0" + len(wire).to_bytes(4, "big") + wire
