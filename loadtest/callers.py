"""Closed-loop callers: each sends its next order when it has the answer to the last."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import grpc.aio

from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

WRONG_REPLY: Final = "WRONG_REPLY"
"""Error of an answer that belongs to another order, or to none."""
NO_REPLY: Final = "NO_REPLY"
"""Error of an order of a stream that was never answered."""

_ACTIONS: Final = {number: name.removeprefix("ACTION_") for name, number in pb.Action.items()}
_SOURCES: Final = {number: name.removeprefix("SOURCE_") for name, number in pb.Source.items()}
_STATUSES: Final = {status.value[0]: status.name for status in grpc.StatusCode}
_STREAM_GRACE_SECONDS: Final = 5.0
"""How long a stream may take to answer what is under way after the last order."""
_clock = time.perf_counter


@dataclass(slots=True)
class Measurement:
    """What callers saw."""

    seconds: float = 0.0
    """From the first request to the last answer."""
    latencies: list[float] = field(default_factory=list)
    """Seconds from request to answer, of the orders that got a decision."""
    errors: Counter[str] = field(default_factory=Counter)
    """Orders that got none, by gRPC status or `WRONG_REPLY`, `NO_REPLY`."""
    actions: Counter[str] = field(default_factory=Counter)
    """Decisions by action: `TRADE`, `NO_TRADE`, `ABSTAIN`."""
    sources: Counter[str] = field(default_factory=Counter)
    """Decisions by source: `PRIMARY`, `SECONDARY`, `CACHED_SCORE`, `RULES`, `NONE`."""

    @property
    def rate(self) -> float:
        """Decisions per second."""
        return len(self.latencies) / self.seconds

    def count(self, decision: pb.Decision, sent: float) -> None:
        """Adds the decision on an order that was sent at the instant `sent`."""
        self.latencies.append(_clock() - sent)
        self.actions[_ACTIONS.get(decision.action, str(decision.action))] += 1
        self.sources[_SOURCES.get(decision.source, str(decision.source))] += 1


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values, at least one, that at least `share` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


async def call_decide(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    orders: Sequence[pb.Order],
    *,
    callers: int,
    seconds: float,
    deadline_seconds: float,
) -> Measurement:
    """`callers` callers of `Decide`, who take turns with the orders.

    Args:
        stub: Of the server under load.
        orders: Sent in this order, again and again.
        callers: Calls under way at once.
        seconds: After which no caller starts another call.
        deadline_seconds: Of each call.
    """
    measured = Measurement()
    requests = itertools.cycle([pb.DecideRequest(order=order) for order in orders])
    began = _clock()
    end = began + seconds

    async def call() -> None:
        while (sent := _clock()) < end:
            request = next(requests)
            try:
                response = await stub.Decide(request, timeout=deadline_seconds)
            except grpc.aio.AioRpcError as error:
                measured.errors[error.code().name] += 1
                continue
            if response.decision.order_ref == request.order.order_ref:
                measured.count(response.decision, sent)
            else:
                measured.errors[WRONG_REPLY] += 1

    async with asyncio.TaskGroup() as tasks:
        for _ in range(callers):
            tasks.create_task(call())
    measured.seconds = _clock() - began
    return measured


async def call_decide_stream(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    orders: Sequence[pb.Order],
    *,
    callers: int,
    seconds: float,
    deadline_seconds: float,
) -> Measurement:
    """One `DecideStream` with a bounded number of orders under way, matched to their answers by `order_ref`.

    Args:
        stub: Of the server under load.
        orders: Sent in this order, again and again; more than `callers`, with distinct references.
        callers: Orders under way at once.
        seconds: After which no further order is sent.
        deadline_seconds: `timeout` of each order.
    """
    measured = Measurement()
    requests = [pb.DecideStreamRequest(order=order) for order in orders]
    for request in requests:
        request.order.timeout.FromNanoseconds(int(deadline_seconds * 1e9))
    sent: dict[str, float] = {}
    room = asyncio.Semaphore(callers)
    began = _clock()
    end = began + seconds
    call = stub.DecideStream(timeout=seconds + _STREAM_GRACE_SECONDS)

    async def send() -> None:
        for request in itertools.cycle(requests):
            await room.acquire()
            now = _clock()
            if now >= end:
                break
            sent[request.order.order_ref] = now
            await call.write(request)
        await call.done_writing()

    sender = asyncio.create_task(send())
    try:
        async for response in call:
            result = response.result
            at = sent.pop(result.order_ref, None)
            if at is None:
                measured.errors[WRONG_REPLY] += 1
                continue
            room.release()
            if result.HasField("decision"):
                measured.count(result.decision, at)
            else:
                measured.errors[_STATUSES.get(result.error.code, str(result.error.code))] += 1
    except grpc.aio.AioRpcError as error:
        measured.errors[error.code().name] += 1
    finally:
        # A stream that has ended makes a write fail; its status above says all there is to say.
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)
    measured.seconds = _clock() - began
    if sent:
        measured.errors[NO_REPLY] += len(sent)
    return measured
