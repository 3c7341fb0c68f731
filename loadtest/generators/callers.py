"""Callers in Python: closed loops, in which each sends its next order after the last answer, and open ones."""

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

from loadtest.benchmark.load import ORDERS, Method
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
    """Seconds from request to answer, of the calls, of a stream's orders, that got decisions."""
    decisions: int = 0
    """Orders that got one."""
    errors: Counter[str] = field(default_factory=Counter)
    """Orders that got none, by gRPC status or `WRONG_REPLY`, `NO_REPLY`."""
    actions: Counter[str] = field(default_factory=Counter)
    """Decisions by action: `TRADE`, `NO_TRADE`, `ABSTAIN`."""
    sources: Counter[str] = field(default_factory=Counter)
    """Decisions by source: `PRIMARY`, `SECONDARY`, `CACHED_SCORE`, `RULES`, `NONE`."""

    @property
    def rate(self) -> float:
        """Decisions per second."""
        return self.decisions / self.seconds

    def count(self, decision: pb.Decision, sent: float) -> None:
        """Adds the decision on an order that was sent, or due, at the instant `sent`."""
        self.latencies.append(_clock() - sent)
        self._add(decision)

    def count_result(self, result: pb.OrderResult, order_ref: str) -> bool:
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


async def call_decide_batch(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    orders: Sequence[pb.Order],
    *,
    callers: int,
    seconds: float,
    deadline_seconds: float,
) -> Measurement:
    """`callers` callers of `DecideBatch` with 64 orders each; the arguments are those of `call_decide`."""
    measured = Measurement()
    size = ORDERS["batch"]
    batches = [orders[first : first + size] for first in range(0, len(orders) - size + 1, size)]
    requests = itertools.cycle([pb.DecideBatchRequest(orders=batch) for batch in batches])
    began = _clock()
    end = began + seconds

    async def call() -> None:
        while (sent := _clock()) < end:
            await send_batch(stub, next(requests), measured, sent, deadline_seconds)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(callers):
            tasks.create_task(call())
    measured.seconds = _clock() - began
    return measured


async def send_batch(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    request: pb.DecideBatchRequest,
    measured: Measurement,
    since: float,
    deadline_seconds: float,
) -> None:
    """Sends a batch and adds what became of it; its latency counts from the instant `since`."""
    try:
        response = await stub.DecideBatch(request, timeout=deadline_seconds)
    except grpc.aio.AioRpcError as error:
        measured.errors[error.code().name] += len(request.orders)
        return
    pairs = zip(request.orders, response.results, strict=False)
    decided = [measured.count_result(result, order.order_ref) for order, result in pairs]
    if missing := len(request.orders) - len(decided):
        measured.errors[NO_REPLY] += missing
    if any(decided):
        measured.latencies.append(_clock() - since)


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
            if measured.count_result(result, result.order_ref):
                measured.latencies.append(_clock() - at)
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


async def offer(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    method: Method,
    orders: Sequence[pb.Order],
    *,
    rate: float,
    seconds: float,
    deadline_seconds: float,
) -> Measurement:
    """An open loop: calls leave when they are due, and a latency counts from then.

    Args:
        stub: Of the server under load.
        method: One order a call, one on a stream, or a batch of 64.
        orders: Taken in turn, with distinct references, more than can be under way.
        rate: Orders a second.
        seconds: After which no further one is due.
        deadline_seconds: Of each call, or of each order of the stream.
    """
    measured = Measurement(seconds=seconds)
    size = 1 if method == "stream" else ORDERS[method]
    following = itertools.cycle(orders)
    sent: dict[str, float] = {}
    stream = stub.DecideStream(timeout=seconds + _STREAM_GRACE_SECONDS) if method == "stream" else None

    async def call(due: float) -> None:
        batch = [next(following) for _ in range(size)]
        if method == "batch":
            await send_batch(stub, pb.DecideBatchRequest(orders=batch), measured, due, deadline_seconds)
            return
        try:
            response = await stub.Decide(pb.DecideRequest(order=batch[0]), timeout=deadline_seconds)
        except grpc.aio.AioRpcError as error:
            measured.errors[error.code().name] += 1
            return
        if response.decision.order_ref == batch[0].order_ref:
            measured.count(response.decision, due)
        else:
            measured.errors[WRONG_REPLY] += 1

    async def read() -> None:
        assert stream is not None
        try:
            async for response in stream:
                due = sent.pop(response.result.order_ref, None)
                if due is None:
                    measured.errors[WRONG_REPLY] += 1
                elif measured.count_result(response.result, response.result.order_ref):
                    measured.latencies.append(_clock() - due)
        except grpc.aio.AioRpcError as error:
            measured.errors[error.code().name] += 1

    async with asyncio.TaskGroup() as tasks:
        reader = tasks.create_task(read()) if stream is not None else None
        began = _clock()
        for number in range(round(seconds * rate / size)):
            due = began + number * size / rate
            await asyncio.sleep(0)  # also when it is late: whoever answers is to get a turn
            # A timer of milliseconds may end a little too soon.
            while (early := due - _clock()) > 0:  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(early)
            if stream is None:
                tasks.create_task(call(due))
                continue
            request = pb.DecideStreamRequest(order=next(following))
            request.order.timeout.FromNanoseconds(int(deadline_seconds * 1e9))
            sent[request.order.order_ref] = due
            try:
                await stream.write(request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                break  # the stream has ended; its status, which `read` counts, says why
        if stream is not None and reader is not None and not reader.done():
            await stream.done_writing()
    if sent:
        measured.errors[NO_REPLY] += len(sent)
    return measured
