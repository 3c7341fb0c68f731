"""The closed loop: each caller sends its next order after the last answer.

It finds the highest throughput, but hides queueing: a slow server is asked less often. A caller that is refused sends
its next order after the delay that the server asks for.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import grpc.aio

from loadtest.generators.load import ORDERS
from loadtest.generators.measurement import (
    NO_REPLY,
    WRONG_REPLY,
    Measurement,
    clock,
    decide,
    decide_batch,
    order_delay,
)
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

STREAM_GRACE_SECONDS: Final = 5.0
"""How long a stream may take to answer what is under way after the last order."""


async def call_decide(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    orders: Sequence[pb.Order],
    *,
    callers: int,
    seconds: float = math.inf,
    deadline_seconds: float,
    stopped: asyncio.Event | None = None,
) -> Measurement:
    """`callers` callers of `Decide`, who take turns with the orders.

    Args:
        stub: Of the server under load.
        orders: Sent in this order, again and again.
        callers: Calls under way at once.
        seconds: After which no caller starts another call; each makes one, however late it has its turn.
        deadline_seconds: Of each call.
        stopped: Set, no caller starts another call either.
    """
    measured = Measurement()
    requests = itertools.cycle([pb.DecideRequest(order=order) for order in orders])

    async def call(sent: float) -> float:
        answer = await decide(stub, next(requests), sent, deadline_seconds)
        measured.add(answer)
        return answer.retry_delay

    measured.seconds = await _repeat(call, callers, seconds, stopped)
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

    async def call(sent: float) -> float:
        return await decide_batch(stub, next(requests), measured, sent, deadline_seconds)

    measured.seconds = await _repeat(call, callers, seconds)
    return measured


async def _repeat(
    call: Callable[[float], Awaitable[float]], callers: int, seconds: float, stopped: asyncio.Event | None = None
) -> float:
    """Makes every caller call again and again, at least once, until the time is over.

    Args:
        call: Makes a call that is sent at an instant; returns for how many seconds its caller is not to call again.
        callers: Calls under way at once.
        seconds: After which no caller starts another call.
        stopped: Set, no caller starts another call either.

    Returns:
        The seconds until the last call has ended.
    """
    began = clock()
    end = began + seconds

    async def caller() -> None:
        while True:
            delay = await call(clock())
            if clock() >= end or (stopped is not None and stopped.is_set()):
                return
            if delay:
                await asyncio.sleep(max(0.0, min(delay, end - clock())))
                if clock() >= end:
                    return

    async with asyncio.TaskGroup() as tasks:
        for _ in range(callers):
            tasks.create_task(caller())
    return clock() - began


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
        seconds: After which no further order is sent; one is sent in any case.
        deadline_seconds: `timeout` of each order.
    """
    measured = Measurement()
    requests = [pb.DecideStreamRequest(order=order) for order in orders]
    for request in requests:
        request.order.timeout.FromNanoseconds(int(deadline_seconds * 1e9))
    sent: dict[str, float] = {}
    room = asyncio.Semaphore(callers)
    began = clock()
    end = began + seconds
    call = stub.DecideStream(timeout=seconds + STREAM_GRACE_SECONDS)

    async def send() -> None:
        for number, request in enumerate(itertools.cycle(requests)):
            await room.acquire()
            now = clock()
            if number and now >= end:
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
            if measured.add_result(result, result.order_ref):
                measured.latencies.append(clock() - at)
            if delay := order_delay(result):  # until then the caller of this order has no other one under way
                asyncio.get_running_loop().call_later(delay, room.release)
            else:
                room.release()
    except grpc.aio.AioRpcError as error:
        measured.errors[error.code().name] += 1
    finally:
        # A stream that has ended makes a write fail; its status above says all there is to say.
        sender.cancel()
        await asyncio.gather(sender, return_exceptions=True)
    measured.seconds = clock() - began
    if sent:
        measured.errors[NO_REPLY] += len(sent)
    return measured
