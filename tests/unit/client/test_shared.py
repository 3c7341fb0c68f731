"""Calls that many callers share; the server is real, on loopback."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final, NamedTuple, Self

import grpc
import pytest
from opentelemetry import trace
from support.askers import ORDER
from support.harness import eventually

from pretrade.client import (
    AsyncClient,
    CallError,
    Client,
    DeadlineError,
    Decision,
    InvalidOrderError,
    Order,
    Shared,
    UnavailableError,
)
from pretrade.client.asking import Asking, Metadata, Result
from pretrade.client.credentials import ClientCredentials
from pretrade.client.testing import FakeServer
from pretrade.decision.v1 import decision_pb2 as pb

ROOMY_SECONDS: Final = 20.0
ORDERS: Final = 300


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def order(ref: str, quantity: float = 0.05) -> Order:
    return Order("BTCUSDT.SIM", "buy", quantity, "twap", order_ref=ref)


def of_threads(address: str, orders: list[Order], deadline_seconds: float) -> list[Decision | CallError]:
    with Client.connect(address, deadline_seconds=deadline_seconds) as client, ThreadPoolExecutor(32) as pool:
        shared = client.shared()

        def ask(one: Order) -> Decision | CallError:
            try:
                return shared.decide(one)
            except CallError as error:
                return error

        found = list(pool.map(ask, orders))
        assert shared._calls == 0, "nobody leads where nobody asks"
        return found


def of_tasks(address: str, orders: list[Order], deadline_seconds: float) -> list[Decision | CallError]:
    async def ask_all() -> list[Decision | CallError]:
        async with AsyncClient.connect(address, deadline_seconds=deadline_seconds) as client:
            shared = client.shared()
            found = await asyncio.gather(*(shared.decide(one) for one in orders), return_exceptions=True)
        assert all(isinstance(one, Decision | CallError) for one in found), found
        return found  # type: ignore[return-value]  # as was just asserted

    return asyncio.run(ask_all())


BOTH = pytest.mark.parametrize("ask_all", [of_threads, of_tasks])


@BOTH
def test_every_caller_gets_the_answer_to_its_own_order_in_fewer_calls(server: FakeServer, ask_all: object) -> None:
    orders = [order(f"{number}", 0.0 if number % 10 == 7 else 0.05) for number in range(ORDERS)]
    found = ask_all(server.address, orders, ROOMY_SECONDS)  # type: ignore[operator]
    for asked, one in zip(orders, found, strict=True):
        if asked.quantity:
            assert isinstance(one, Decision)
            assert one.order_ref == asked.order_ref
        else:
            assert isinstance(one, InvalidOrderError), "its neighbours were decided"
    assert len(server.metadata) < ORDERS / 2


@BOTH
def test_a_call_that_fails_fails_for_all_that_shared_it_and_for_no_other(server: FakeServer, ask_all: object) -> None:
    server.fail(grpc.StatusCode.INTERNAL)
    found = ask_all(server.address, [order(f"{number}") for number in range(ORDERS)], ROOMY_SECONDS)  # type: ignore[operator]
    failed = sum(isinstance(one, CallError) for one in found)
    assert 1 <= failed <= 64


@BOTH
def test_callers_of_a_server_that_hangs_are_told_within_their_deadlines(server: FakeServer, ask_all: object) -> None:
    server.hang()
    found = ask_all(server.address, [order(f"{number}") for number in range(20)], 0.3)  # type: ignore[operator]
    assert {type(one) for one in found} == {DeadlineError}
    server.resume()


def test_a_lone_caller_has_calls_of_its_own(server: FakeServer) -> None:
    with Client.connect(server.address) as client:
        shared = client.shared()
        for _ in range(3):
            shared.decide(ORDER)
    assert len(server.metadata) == 3


async def test_a_task_that_leaves_disturbs_no_other(server: FakeServer) -> None:
    async with AsyncClient.connect(server.address, deadline_seconds=ROOMY_SECONDS) as client:
        shared = client.shared()
        server.hang()
        leaving, staying = (asyncio.create_task(shared.decide(ORDER)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        server.resume()
        assert (await staying).trades


async def test_a_call_has_the_trace_of_its_callers_where_they_have_the_same_and_none_otherwise(
    server: FakeServer,
) -> None:
    async with AsyncClient.connect(server.address, deadline_seconds=ROOMY_SECONDS) as client:
        shared = client.shared()
        await asyncio.gather(*(shared.decide(ORDER, traceparent="00-one", tracestate="v=1") for _ in range(2)))
        await asyncio.gather(*(shared.decide(ORDER, traceparent=f"00-{number}") for number in range(2)))
    shown = [(one.get("traceparent"), one.get("tracestate")) for one in server.metadata]
    assert shown == [("00-one", "v=1"), (None, None)]


async def test_the_span_of_one_caller_is_not_said_to_be_that_of_those_who_share_its_call(server: FakeServer) -> None:
    async with AsyncClient.connect(server.address, deadline_seconds=ROOMY_SECONDS) as client:
        shared = client.shared()

        async def traced() -> None:
            with trace.use_span(trace.NonRecordingSpan(trace.SpanContext(1, 1, False, trace.TraceFlags(1)))):
                await shared.decide(ORDER)

        await asyncio.gather(traced(), traced())
        await asyncio.gather(traced(), shared.decide(ORDER))
    assert ["traceparent" in one for one in server.metadata] == [True, False]


async def test_orders_of_tasks_that_can_only_reduce_go_in_calls_of_their_own_which_say_so(server: FakeServer) -> None:
    orders = [replace(order(f"{number}"), reduce_only=number % 2 == 0) for number in range(10)]
    async with AsyncClient.connect(server.address, deadline_seconds=ROOMY_SECONDS) as client:
        shared = client.shared()
        await asyncio.gather(*(shared.decide(one) for one in orders))
    assert sorted("pretrade-reduce-only" in one for one in server.metadata) == [False, True]


class Begun(NamedTuple):
    """A call that has begun."""

    orders: list[pb.Order]
    seconds: float
    trace: Metadata


class Threads:
    """Callers of a `Shared` whose calls this plays. The first four are under way; a call ends when it is released."""

    def __init__(self, *, keys: bool = True) -> None:
        self._pool = ThreadPoolExecutor(32)
        self._asking = Asking(["127.0.0.1:1"], ClientCredentials(), idempotency_keys=keys)
        self._shared = Shared(self._asking, self._decide, self._decide_batch)
        self._ends = threading.Semaphore(0)
        self._batches: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.calls: list[Begun] = []
        for _ in range(4):
            self._pool.submit(self._shared.decide, order("first"), deadline_seconds=ROOMY_SECONDS)
        eventually(lambda: len(self.calls), lambda begun: begun == 4)

    def ask(self, one: Order, **named: Any) -> Future[Decision]:
        """Another caller, who has begun to wait when this returns."""
        asked = self._pool.submit(self._shared.decide, one, **({"deadline_seconds": ROOMY_SECONDS} | named))
        eventually(
            lambda: [waiting.message.order_ref for waiting in list(self._shared._queue)],
            lambda waiting: one.order_ref in waiting,
        )
        return asked

    def begin_next(self) -> Begun:
        """Lets one of the calls end, upon which the thread that has waited longest begins the next one."""
        begun = len(self.calls)
        self._ends.release()
        eventually(lambda: len(self.calls), lambda now: now > begun)
        return self.calls[begun]

    def release(self, outcome: BaseException | None = None) -> None:
        """Lets all calls end, and the next batch with an error, if there is one."""
        if outcome is not None:
            self._batches.put(outcome)
        self._ends.release(100)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._pool.shutdown()

    def _decide(self, message: pb.Order, seconds: float, trace: Metadata) -> Decision:
        return self._decide_batch([message], seconds, trace)[0]  # type: ignore[return-value]  # nobody else makes errors

    def _decide_batch(self, messages: Sequence[pb.Order], seconds: float, trace: Metadata) -> list[Result]:
        self.calls.append(Begun(list(messages), seconds, trace))
        self._ends.acquire()
        outcome = None if len(messages) == 1 or self._batches.empty() else self._batches.get()
        if outcome is not None:
            raise outcome
        return [Decision(pb.Decision(order_ref=message.order_ref), "a:1") for message in messages]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[Threads]:
    with Threads(keys=getattr(request, "param", True)) as threads:
        yield threads


WITHOUT_KEYS = pytest.mark.parametrize("threads", [False], indirect=True)


def test_orders_of_threads_that_can_only_reduce_go_first_and_in_calls_of_their_own(threads: Threads) -> None:
    asked = [threads.ask(replace(order(f"{number}"), reduce_only=number % 2 == 1)) for number in range(6)]
    threads.begin_next()
    threads.release()
    assert [one.result().order_ref for one in asked] == [f"{number}" for number in range(6)]
    first, second = ([one.order_ref for one in orders] for orders, *_ in threads.calls[4:])
    assert (first, second) == (["1", "3", "5"], ["0", "2", "4"])


def test_a_call_of_threads_has_the_trace_of_its_callers_where_they_have_the_same(threads: Threads) -> None:
    asked = [threads.ask(order("a"), traceparent="00-one"), threads.ask(order("b"), traceparent="00-other")]
    asked += [threads.ask(replace(order(ref), reduce_only=True), traceparent="00-same") for ref in "cd"]
    threads.release()
    assert all(one.result() for one in asked)
    assert {call.trace for call in threads.calls[4:]} == {(("traceparent", "00-same"),), ()}


def test_orders_of_a_thread_that_was_interrupted_in_its_call_are_asked_for_by_another(threads: Threads) -> None:
    first, *others = [threads.ask(order(ref)) for ref in "abc"]
    threads.begin_next()
    threads.release(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        first.result()
    assert [one.result().order_ref for one in others] == ["b", "c"]
    keys = [{one.order_ref: one.idempotency_key for one in orders} for orders, *_ in threads.calls[4:]]
    assert keys[0].items() >= keys[1].items(), "under the keys that they had"


@WITHOUT_KEYS
def test_without_a_key_they_are_told_instead(threads: Threads) -> None:
    first, second = [threads.ask(order(ref)) for ref in "ab"]
    threads.begin_next()
    threads.release(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        first.result()
    with pytest.raises(UnavailableError, match="without a key"):
        second.result()


def test_an_error_of_no_kind_that_is_expected_reaches_all_that_shared_the_call(threads: Threads) -> None:
    asked = [threads.ask(order(ref)) for ref in "ab"]
    threads.begin_next()
    threads.release(ZeroDivisionError())
    for one in asked:
        with pytest.raises(ZeroDivisionError):
            one.result()


def test_those_who_have_time_left_are_asked_for_again_when_that_of_the_asking_thread_is_over(threads: Threads) -> None:
    hasty, patient = threads.ask(order("hasty"), deadline_seconds=5.0), threads.ask(order("patient"))
    assert threads.begin_next().seconds <= 5.0, "it waits no longer than its own deadline"
    threads.release(DeadlineError("late", grpc.StatusCode.DEADLINE_EXCEEDED))
    with pytest.raises(DeadlineError):
        hasty.result()
    assert patient.result().order_ref == "patient"
