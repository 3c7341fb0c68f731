"""The open loop: calls leave when they are due, however long the answers take.

Every open loop of this project takes its pace from `offsets`. A latency counts from the instant at which its call was
due, so that neither a slow server nor a slow generator hides what a caller would have waited.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import grpc.aio

from loadtest.generators.closed_loop import STREAM_GRACE_SECONDS
from loadtest.generators.load import ORDERS, Method
from loadtest.generators.measurement import NO_REPLY, WRONG_REPLY, Answer, Measurement, clock, decide, decide_batch
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc


def offsets(rate: float, seconds: float, together: int, seed: int | None) -> Iterator[float]:
    """Seconds from the beginning of an open loop at which its calls are due; the arguments are those of `arrivals`."""
    rng = None if seed is None else random.Random(seed)
    due = 0.0
    for number in itertools.count():
        due = number * together / rate if rng is None else due + rng.expovariate(rate / together)
        if due >= seconds:
            return
        yield due


async def arrivals(
    rate: float,
    seconds: float = math.inf,
    *,
    together: int = 1,
    seed: int | None = None,
    stopped: asyncio.Event | None = None,
) -> AsyncIterator[float]:
    """The instants of `clock` at which calls are due, each as soon as it has come.

    Whoever takes them too slowly gets those that are overdue at once, with the instants at which they were due.

    Args:
        rate: Orders a second.
        seconds: After which none is due any more.
        together: Orders that one call asks for.
        seed: With it calls come at random, as if from many callers (a Poisson process); without, evenly spaced.
        stopped: Ends them, too, at the next one that would be due.
    """
    began = clock()
    for due in offsets(rate, seconds, together, seed):
        await asyncio.sleep(0)  # also when it is late: whoever answers is to get a turn
        # A timer of milliseconds may end a little too soon.
        while (early := began + due - clock()) > 0:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(early)
        if stopped is not None and stopped.is_set():
            return
        yield began + due


async def decide_at_rate(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    next_order: Callable[[], pb.Order],
    *,
    rate: float,
    seconds: float = math.inf,
    deadline_seconds: float,
    observe: Callable[[Answer], None],
    seed: int | None = None,
    stopped: asyncio.Event | None = None,
) -> None:
    """Calls `Decide` at a rate; returns when the last call has ended.

    Cancelling it ends the calls under way; `stopped` waits for them.

    Args:
        stub: Of the server under load.
        next_order: Makes an order when one is due.
        rate: Orders a second.
        seconds: How long orders are sent.
        deadline_seconds: Of each order, from when it is sent.
        observe: Told of every order when it has ended, in the order of the answers.
        seed: As for `arrivals`.
        stopped: As for `arrivals`.
    """

    async def call(due: float) -> None:
        observe(await decide(stub, pb.DecideRequest(order=next_order()), due, deadline_seconds))

    async with asyncio.TaskGroup() as tasks:
        async for due in arrivals(rate, seconds, seed=seed, stopped=stopped):
            tasks.create_task(call(due))


async def offer(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    method: Method,
    orders: Sequence[pb.Order],
    *,
    rate: float,
    seconds: float,
    deadline_seconds: float,
) -> Measurement:
    """Calls a method of the decision service at a rate of orders.

    Args:
        stub: Of the server under load.
        method: One order a call, one on a stream, or a batch of 64.
        orders: Taken in turn, with distinct references, more than can be under way.
        rate: Orders a second.
        seconds: After which no further one is due.
        deadline_seconds: Of each call, or of each order of the stream.
    """
    following = itertools.cycle(orders)
    if method == "stream":
        return await _offer_stream(stub, following, rate, seconds, deadline_seconds)
    measured, size = Measurement(seconds=seconds), ORDERS[method]

    async def call_batch(due: float) -> None:
        request = pb.DecideBatchRequest(orders=[next(following) for _ in range(size)])
        await decide_batch(stub, request, measured, due, deadline_seconds)

    if method == "unary":
        await decide_at_rate(
            stub,
            lambda: next(following),
            rate=rate,
            seconds=seconds,
            deadline_seconds=deadline_seconds,
            observe=measured.add,
        )
    else:
        async with asyncio.TaskGroup() as tasks:
            async for due in arrivals(rate, seconds, together=size):
                tasks.create_task(call_batch(due))
    return measured


async def _offer_stream(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    orders: Iterator[pb.Order],
    rate: float,
    seconds: float,
    deadline_seconds: float,
) -> Measurement:
    """The same on one stream, whose answers are matched to their orders by reference."""
    measured = Measurement(seconds=seconds)
    unanswered: dict[str, float] = {}
    stream = stub.DecideStream(timeout=seconds + STREAM_GRACE_SECONDS)

    async def read() -> None:
        try:
            async for response in stream:
                due = unanswered.pop(response.result.order_ref, None)
                if due is None:
                    measured.errors[WRONG_REPLY] += 1
                elif measured.add_result(response.result, response.result.order_ref):
                    measured.latencies.append(clock() - due)
        except grpc.aio.AioRpcError as error:
            measured.errors[error.code().name] += 1

    async with asyncio.TaskGroup() as tasks:
        reader = tasks.create_task(read())
        async for due in arrivals(rate, seconds):
            request = pb.DecideStreamRequest(order=next(orders))
            request.order.timeout.FromNanoseconds(int(deadline_seconds * 1e9))
            unanswered[request.order.order_ref] = due
            try:
                await stream.write(request)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                break  # the stream has ended; its status, which `read` counts, says why
        if not reader.done():
            await stream.done_writing()
    if unanswered:
        measured.errors[NO_REPLY] += len(unanswered)
    return measured
