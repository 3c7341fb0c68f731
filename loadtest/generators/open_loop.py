"""Open-loop load: orders leave when they are due, however long the answers take.

A latency counts from the instant at which its order was due, so that neither a slow server nor a slow generator hides
what a caller would have waited.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio

from loadtest.generators.callers import WRONG_REPLY
from loadtest.generators.orders import OrderFlow
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

_clock = time.perf_counter


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one order."""

    due: float
    """Seconds since the load began."""
    seconds: float
    """From when it was due until it ended."""
    decision: pb.Decision | None
    error: str
    """gRPC status or `WRONG_REPLY` where there is no decision; else empty."""


async def call_decide_at_rate(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    flow: OrderFlow,
    *,
    rate: float,
    seconds: float,
    deadline_seconds: float,
    observe: Callable[[Answer], None],
    seed: int | None = None,
) -> None:
    """Calls `Decide` at a rate; returns when the last call has ended.

    Cancelling it ends the calls under way.

    Args:
        stub: Of the server under load.
        flow: Makes the orders.
        rate: Orders a second.
        seconds: How long orders are sent.
        deadline_seconds: Of each order, from when it is sent.
        observe: Told of every order when it has ended, in the order of the answers.
        seed: With it orders come at random, as if from many callers (a Poisson process); without, evenly spaced.
    """
    rng = None if seed is None else random.Random(seed)
    due = 0.0
    began = _clock()
    async with asyncio.TaskGroup() as tasks:
        for number in range(round(rate * seconds)):
            due = number / rate if rng is None else due + rng.expovariate(rate)
            wait = began + due - _clock()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.create_task(_call(stub, flow.next({}), due, began, deadline_seconds, observe))


async def _call(
    stub: decision_pb2_grpc.DecisionServiceAsyncStub,
    order: pb.Order,
    due: float,
    began: float,
    deadline_seconds: float,
    observe: Callable[[Answer], None],
) -> None:
    decision, error = None, ""
    try:
        decision = (await stub.Decide(pb.DecideRequest(order=order), timeout=deadline_seconds)).decision
    except grpc.aio.AioRpcError as refused:
        error = refused.code().name
    if decision is not None and decision.order_ref != order.order_ref:
        decision, error = None, WRONG_REPLY
    observe(Answer(due, _clock() - began - due, decision, error))
