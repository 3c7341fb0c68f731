"""What is the same for blocking and asyncio callers: requests, keys, metadata, and which orders are asked again."""

from __future__ import annotations

import itertools
import math
import os
import sys
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc

from pretrade.client.credentials import ClientCredentials
from pretrade.client.decisions import Decision
from pretrade.client.errors import CallError, ClosedError, error_of_order
from pretrade.client.orders import Order, message_of
from pretrade.client.policy import Call, Policy
from pretrade.client.retries import CHANNEL_OPTIONS, LONGEST_PAUSE_SECONDS
from pretrade.decision.v1 import decision_pb2 as pb

Asked = Order | pb.Order
Result = Decision | CallError
"""What became of one order of a batch: its decision, or why there is none."""
DEADLINE_SECONDS: Final = 1.0
"""Long enough to find a server again that was restarted; a server has a cap of its own for the decision itself."""
OPTIONS: Final = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own for every client
    ("grpc.enable_retries", 0),  # `policy` has them
    *CHANNEL_OPTIONS,
)
HEALTH: Final = "/grpc.health.v1.Health/Check"
HEALTH_SECONDS: Final = 1.0
_HEALTH_NAMES: Final = {b"": "UNKNOWN", b"\x08\x01": "SERVING", b"\x08\x02": "NOT_SERVING", b"\x08\x03": "UNKNOWN"}
"""The few bytes of a `HealthCheckResponse`, which is all that we need of that service's messages."""
_MAX_BATCH: Final = 1_024
_REDUCE_ONLY: Final = (("pretrade-reduce-only", "1"),)

Metadata = tuple[tuple[str, str], ...]


class Asking:
    """What a client asks with.

    Args:
        addresses: `HOST:PORT` of each server, best first.
        credentials: What it shows to them.
        deadline_seconds: Of a call that names no deadline.
        idempotency_keys: Whether an order without a key gets one.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        credentials: ClientCredentials,
        *,
        deadline_seconds: float = DEADLINE_SECONDS,
        idempotency_keys: bool = True,
    ) -> None:
        self.policy: Final = Policy(addresses)
        self.credentials: Final = credentials
        self.deadline_seconds: Final = _checked(deadline_seconds)
        self.makes_keys: Final = idempotency_keys
        # Numbered by what is compiled: in a batch, a key costs a tenth of its order.
        keys = map(f"{os.urandom(12).hex()}-".__add__, map(str, itertools.count(1)))
        self._new_key: Final = keys.__next__ if idempotency_keys else None
        self.why_not = ""
        """Why it cannot be used any more; empty while it can."""
        _OPEN.add(self)

    def check_open(self) -> None:
        """Refuses what cannot be asked any more.

        Raises:
            ClosedError: The client was closed, or belongs to the parent of this process.
        """
        if self.why_not:
            raise ClosedError(self.why_not)

    def message(self, order: Asked) -> pb.Order:
        """The order as it is sent, with a key.

        Raises:
            ClosedError: The client cannot be used any more.
        """
        self.check_open()
        return message_of(order, new_key=self._new_key)

    def request(self, orders: Iterable[Asked]) -> pb.DecideBatchRequest:
        """All of these orders, each as `message` has it.

        Raises:
            ClosedError: The client cannot be used any more.
        """
        self.check_open()
        request = pb.DecideBatchRequest()
        add, new_key = request.orders.add, self._new_key
        for order in orders:
            message_of(order, add, new_key)
        return request

    def begin(self, message: pb.Order, seconds: float) -> Call:
        """A call for one order."""
        return self.policy.begin(seconds, repeatable=bool(message.idempotency_key))

    def seconds(self, deadline_seconds: float | None) -> float:
        """How long a call may take."""
        return self.deadline_seconds if deadline_seconds is None else _checked(deadline_seconds)

    def metadata(self, trace: Metadata, *, reduce_only: bool) -> Metadata:
        """What goes with a call: the token, the trace, and whether the orders only reduce an exposure."""
        found = self.credentials.metadata() + trace
        return found + _REDUCE_ONLY if reduce_only else found

    @property
    def several(self) -> bool:
        """Whether there is another server to go to."""
        return len(self.policy.servers) > 1


class Batch:
    """Orders that are asked for together, and what became of each.

    Args:
        asking: What asks.
        orders: In any number.
    """

    def __init__(self, asking: Asking, orders: Iterable[Asked]) -> None:
        self._all: Final = asking.request(orders)
        messages = self._all.orders
        self._results: Final[list[Result | None]] = [None] * len(messages)
        self._left: Sequence[int] = range(len(messages))
        self._asked: Sequence[int] = ()
        self.repeatable: Final = asking.makes_keys or all(message.idempotency_key for message in messages)
        """Whether every order has a key."""
        self.reduce_only: Final = all(message.reduce_only for message in messages)
        """Whether no order adds to an exposure."""

    @property
    def ended(self) -> bool:
        """Whether every order has its result."""
        return not self._left

    @property
    def results(self) -> list[Result]:
        """One result for each order, in their order."""
        return [result for result in self._results if result is not None]

    def request(self) -> pb.DecideBatchRequest:
        """The next orders to ask for: as many as the contract allows in a call."""
        self._asked, self._left = self._left[:_MAX_BATCH], self._left[_MAX_BATCH:]
        messages = self._all.orders
        if len(self._asked) == len(messages):
            return self._all
        return pb.DecideBatchRequest(orders=[messages[place] for place in self._asked])

    def take(self, response: pb.DecideBatchResponse, call: Call) -> None:
        """Keeps what was answered; orders that were refused for the moment are asked for again."""
        call.pause = 0.0
        delays: dict[int, float] = {}
        results, server = self._results, call.server.address
        for place, result in zip(self._asked, response.results, strict=True):
            if result.HasField("decision"):
                results[place] = Decision(result.decision, server)
                continue
            error = error_of_order(result.error)
            results[place] = error
            if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_delay_seconds is not None:
                delays[place] = error.retry_delay_seconds
            elif error.code is grpc.StatusCode.DEADLINE_EXCEEDED and call.was_lost:  # the server's cap; see `policy`
                delays[place] = LONGEST_PAUSE_SECONDS
        if delays and call.waits(max(delays.values())):
            self._left = [*delays, *self._left]

    def failed(self, error: CallError) -> None:
        """The call failed for good: orders that had no answer before share its error.

        Raises:
            CallError: No order had.
        """
        if all(result is None for result in self._results):
            raise error
        for place in (*self._asked, *self._left):
            self._results[place] = self._results[place] or error
        self._left = ()


def within(message: pb.Order, seconds: float) -> float:
    """How long the order may take: so long, or for its own timeout if that is shorter."""
    return min(seconds, message.timeout.ToNanoseconds() / 1e9) if message.HasField("timeout") else seconds


def allow(message: pb.Order, seconds: float) -> float:
    """As `within`, and tells the server: it hears of the deadline of a call, and not of those of its orders."""
    seconds = within(message, seconds)
    timeout = message.timeout
    timeout.seconds = whole = int(seconds)  # its own `FromNanoseconds` takes five times as long
    timeout.nanos = int((seconds - whole) * 1e9)
    return seconds


def credentials_of(**given: str | os.PathLike[str] | None) -> ClientCredentials:
    """The credentials that were given; for what was not, those that the environment names (`PRETRADE_CLIENT_…`)."""
    changes: dict[str, object] = {
        name: value if name in {"tls_name", "token"} else Path(value)
        for name, value in given.items()
        if value is not None
    }
    if {"token", "token_file"} & changes.keys():  # one of them replaces both
        changes = {"token": None, "token_file": None} | changes
    return ClientCredentials.from_environment().with_changes(changes)


def health_name(response: bytes) -> str:
    """What a health service answered."""
    return _HEALTH_NAMES.get(response, "UNKNOWN")


def health_without(error: grpc.RpcError) -> str:
    """What a failed question for the health says: a server that knows no such service is there all the same."""
    return "SERVING" if error.code() is grpc.StatusCode.UNIMPLEMENTED else "UNREACHABLE"


def _checked(seconds: float) -> float:
    if not 0 < seconds < math.inf:
        raise ValueError(f"deadline_seconds is {seconds}: it must be a positive number of seconds")
    return seconds


def trace_of(traceparent: str | None, tracestate: str | None) -> Metadata:
    """The W3C trace context: the one given, or that of OpenTelemetry's current span where the caller uses that.

    Raises:
        ValueError: There is a `tracestate` and no `traceparent` that it belongs to.
    """
    if traceparent is not None:
        given = (("traceparent", traceparent),)
        return given if tracestate is None else (*given, ("tracestate", tracestate))
    if tracestate is not None:
        raise ValueError("tracestate says more about a traceparent: give that, too")
    trace: Any = sys.modules.get("opentelemetry.trace")  # who has not loaded it has no span
    if trace is None or not trace.get_current_span().get_span_context().is_valid:
        return ()
    from opentelemetry import propagate  # noqa: PLC0415 - only where it is installed

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())


_OPEN: Final[weakref.WeakSet[Asking]] = weakref.WeakSet()


def _after_fork() -> None:
    """A child has its parent's clients, but none of gRPC's threads, and the same keys."""
    for asking in list(_OPEN):
        asking.why_not = "this process was forked after the client was connected: connect another one here"


os.register_at_fork(after_in_child=_after_fork)
