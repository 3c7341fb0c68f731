"""Calls that many callers share; the server is real, on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import grpc
import pytest
from support.askers import ORDER

from pretrade.client import AsyncClient, CallError, Client, DeadlineError, Decision, InvalidOrderError, Order
from pretrade.client.testing import FakeServer

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
