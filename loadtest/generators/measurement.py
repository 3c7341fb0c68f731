"""One call, and what callers saw of many: latencies, decisions and errors."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import grpc.aio

from pretrade.client.enum_names import enum_name
from pretrade.client.retries import retry_delay
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

WRONG_REPLY: Final = "WRONG_REPLY"
"""Error of an answer that belongs to another order, or to none."""
NO_REPLY: Final = "NO_REPLY"
"""Error of an order of a stream that was never answered."""

ACTIONS: Final = {number: enum_name(pb.Action, number) for number in pb.Action.values()}
"""Names of actions without their prefix."""
SOURCES: Final = {number: enum_name(pb.Source, number) for number in pb.Source.values()}
"""The same of sources."""
_STATUSES: Final = {status.value[0]: status.name for status in grpc.StatusCode}
clock: Final = time.monotonic
"""What all latencies are measured by."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one order."""

    order: pb.Order
    since: float
    """Instant of `clock` from which its latency counts: when it was sent, in an open loop when it was due."""
    seconds: float
    """From then until it ended."""
    decision: pb.Decision | None
    error: str
    """gRPC status or `WRONG_REPLY` where there is no decision; else empty."""
    retry_delay: float = 0.0
    """Seconds for which the server asks its caller not to ask again."""


@dataclass(slots=True)
class Measurement:
    """What callers saw."""

    seconds: float = 0.0
    """From the first request to the last answer."""
    latencies: list[float] = field(default_factory=list)
    """Seconds from request to answer, of the calls, of a stream's orders, that got decisions."""
    decisions: int = 0
    """Orders that got one."""
    errors: Counter[str] = field(default_factory=Counter)
    """Orders that got none, by gRPC status or `WRONG_REPLY`, `NO_REPLY`."""
    actions: Counter[str] = field(default_factory=Counter)
    """Decisions by action: `TRADE`, `NO_TRADE`, `ABSTAIN`."""
    sources: Counter[str] = field(default_factory=Counter)
    """Decisions by source: `PRIMARY`, `SECONDARY`, `EMBEDDED`, `CACHED_SCORE`, `RULES`, `NONE`."""

    @property
    def rate(self) -> float:
        """Decisions per second."""
        return self.decisions / self.seconds

    def add(self, answer: Answer) -> None:
        """Adds the answer to a call of one order."""
        if answer.decision is None:
            self.errors[answer.error] += 1
        else:
            self.latencies.append(answer.seconds)
            self._add(answer.decision)

    def add_result(self, result: pb.OrderResult, order_ref: str) -> bool:
        """Adds what became of an order of a batch or stream, its latency apart; whether that is a decision."""
        if result.order_ref != order_ref:
            self.errors[WRONG_REPLY] += 1
        elif result.HasField("decision"):
            self._add(result.decision)
            return True
        else:
            self.errors[_STATUSES.get(result.error.code, str(result.error.code))] += 1
        return False

    def _add(self, decision: pb.Decision) -> None:
        self.decisions += 1
        self.actions[ACTIONS.get(decision.action, str(decision.action))] += 1
        self.sources[SOURCES.get(decision.source, str(decision.source))] += 1


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values, at least one, that at least `share` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


async def decide(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub, request: pb.DecideRequest, since: float, deadline_seconds: float
) -> Answer:
    """Asks for the decision on one order; its latency counts from the instant `since`."""
    decision, error, delay = None, "", 0.0
    try:
        decision = (await stub.Decide(request, timeout=deadline_seconds)).decision
    except grpc.aio.AioRpcError as refused:
        error, delay = refused.code().name, asked_delay(refused)
    if decision is not None and decision.order_ref != request.order.order_ref:
        decision, error = None, WRONG_REPLY
    return Answer(request.order, since, clock() - since, decision, error, delay)


async def decide_batch(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    request: pb.DecideBatchRequest,
    measured: Measurement,
    since: float,
    deadline_seconds: float,
) -> float:
    """Sends a batch and adds what became of it; its latency counts from the instant `since`.

    Returns:
        Seconds for which the server asks its caller not to ask again, because none of the orders got a decision.
    """
    try:
        response = await stub.DecideBatch(request, timeout=deadline_seconds)
    except grpc.aio.AioRpcError as error:
        measured.errors[error.code().name] += len(request.orders)
        return asked_delay(error)
    pairs = zip(request.orders, response.results, strict=False)
    decided = [measured.add_result(result, order.order_ref) for order, result in pairs]
    if missing := len(request.orders) - len(decided):
        measured.errors[NO_REPLY] += missing
    if any(decided):
        measured.latencies.append(clock() - since)
        return 0.0
    return max((order_delay(result) for result in response.results), default=0.0)


def asked_delay(error: grpc.aio.AioRpcError) -> float:
    """Seconds for which a server that refused a call asks its caller not to ask again."""
    delay = retry_delay(error)
    return delay if delay is not None and math.isfinite(delay) else 0.0


def order_delay(result: pb.OrderResult) -> float:
    """The same for an order of a batch or stream."""
    return result.error.retry_delay.ToNanoseconds() / 1e9
