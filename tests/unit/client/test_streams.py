"""Streams that many tasks share; the server is real, on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Final

import grpc
import pytest
from support.askers import ORDER

from pretrade.client import AsyncClient, ClosedError, DeadlineError, Order, UnauthenticatedError, UnavailableError
from pretrade.client.testing import FakeServer, decision
from pretrade.decision.v1 import decision_pb2 as pb

ROOMY_SECONDS: Final = 20.0


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient.connect(server.address, deadline_seconds=ROOMY_SECONDS) as client:
        yield client


def order(ref: str) -> Order:
    return Order("BTCUSDT.SIM", "buy", 0.05, "twap", order_ref=ref)


async def test_every_task_gets_the_answer_to_its_own_order(client: AsyncClient) -> None:
    refs = [f"{number}" for number in range(500)]
    async with client.stream() as stream:
        found = await asyncio.gather(*(stream.decide(order(ref)) for ref in refs))
    assert [one.order_ref for one in found] == refs


async def test_what_was_under_way_when_the_server_died_is_answered_when_it_is_back(
    server: FakeServer, client: AsyncClient
) -> None:
    refs = [f"{number}" for number in range(100)]
    async with client.stream() as stream:
        await stream.decide(order("first"))
        server.hang()
        under_way = [asyncio.create_task(stream.decide(order(ref))) for ref in refs]
        await asyncio.sleep(0)
        await asyncio.to_thread(server.stop)
        server.resume()
        server.start()
        assert [(await one).order_ref for one in under_way] == refs
    keys = {one.order_ref: one.idempotency_key for one in server.orders}
    assert all(keys[one.order_ref] == one.idempotency_key for one in server.orders), "asked again under the same key"


async def test_a_server_that_stops_is_left_with_what_is_under_way(server: FakeServer, client: AsyncClient) -> None:
    refusals = iter([UnavailableError("stopping", grpc.StatusCode.UNAVAILABLE, reason="DRAINING")])

    def decide(asked: pb.Order) -> pb.Decision:
        for refusal in refusals:
            raise refusal
        return decision()

    server.decide_by(decide)
    refs = [f"{number}" for number in range(10)]
    async with client.stream() as stream:
        found = await asyncio.gather(*(stream.decide(order(ref)) for ref in refs))
    assert [one.order_ref for one in found] == refs


async def test_two_orders_with_one_reference_cannot_be_under_way_at_once(
    server: FakeServer, client: AsyncClient
) -> None:
    server.hang()
    async with client.stream() as stream:
        first = asyncio.create_task(stream.decide(order("same")))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="references must be distinct"):
            await stream.decide(order("same"))
        server.resume()
        await first
        assert (await stream.decide(order("same"))).order_ref == "same", "the first one has ended"


async def test_each_order_has_its_own_deadline(server: FakeServer, client: AsyncClient) -> None:
    async with client.stream() as stream:
        await stream.decide(ORDER)
        server.hang()
        patient = asyncio.create_task(stream.decide(ORDER))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineError, match="gave no answer for order 'stream-3' in time"):
            await stream.decide(ORDER, deadline_seconds=0.05)
        server.resume()
        assert (await patient).trades
        assert (await stream.decide(ORDER)).trades
    assert [one.timeout.ToNanoseconds() for one in server.orders][2] == 50_000_000, "the server knows it as well"


async def test_a_stream_that_was_refused_is_opened_again_for_the_next_order(
    server: FakeServer, client: AsyncClient
) -> None:
    async with client.stream() as stream:
        server.fail(grpc.StatusCode.UNAUTHENTICATED)
        with pytest.raises(UnauthenticatedError):
            await stream.decide(ORDER)
        assert (await stream.decide(ORDER)).trades


async def test_closing_a_stream_ends_what_is_under_way(server: FakeServer, client: AsyncClient) -> None:
    server.hang()
    stream = client.stream()
    under_way = asyncio.create_task(stream.decide(ORDER))
    await asyncio.sleep(0)
    await stream.close()
    with pytest.raises(ClosedError):
        await under_way
    with pytest.raises(ClosedError):
        await stream.decide(ORDER)
    server.resume()


async def test_a_server_that_hangs_is_left_with_what_is_under_way(server: FakeServer) -> None:
    refs = [f"{number}" for number in range(4)]
    with FakeServer() as other:
        async with AsyncClient.connect(server.address, other.address) as client, client.stream() as stream:
            await stream.decide(ORDER, deadline_seconds=ROOMY_SECONDS)
            server.hang()
            found = await asyncio.gather(*(stream.decide(order(ref), deadline_seconds=2.0) for ref in refs))
            server.resume()
        assert [one.order_ref for one in found] == refs
        assert len(other.orders) == 4


async def test_a_late_answer_is_not_taken_for_that_of_a_later_order_with_the_same_reference(
    server: FakeServer, client: AsyncClient
) -> None:
    def decide(asked: pb.Order) -> pb.Decision:
        return decision("TRADE" if asked.quantity == 1.0 else "NO_TRADE")

    server.decide_by(decide)
    async with client.stream() as stream:
        await stream.decide(ORDER)
        server.hang()
        with pytest.raises(DeadlineError):
            await stream.decide(replace(order("same"), quantity=1.0), deadline_seconds=0.05)
        later = asyncio.create_task(stream.decide(replace(order("same"), quantity=2.0)))
        await asyncio.sleep(0)
        server.resume()
        assert (await later).action == "NO_TRADE"


async def test_a_stream_on_which_many_orders_had_no_answer_is_replaced(server: FakeServer, client: AsyncClient) -> None:
    async with client.stream() as stream:
        await stream.decide(ORDER)
        server.hang()
        late = [stream.decide(ORDER, deadline_seconds=0.01) for _ in range(1_024)]
        assert {type(one) for one in await asyncio.gather(*late, return_exceptions=True)} == {DeadlineError}
        server.resume()
        assert (await stream.decide(ORDER)).trades
        assert len(server.orders) < 1_024, "those that nobody waits for were left"


async def test_a_task_that_leaves_disturbs_no_other(server: FakeServer, client: AsyncClient) -> None:
    async with client.stream() as stream:
        await stream.decide(ORDER)
        server.hang()
        leaving, staying = (asyncio.create_task(stream.decide(ORDER)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        server.resume()
        assert (await staying).trades
