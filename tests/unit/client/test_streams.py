"""Streams that many callers share; the server is real, on loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final

import grpc
import pytest
from support.askers import ORDER

from pretrade.client import AsyncClient, Client, ClosedError, DeadlineError, Order, UnavailableError
from pretrade.client.testing import FakeServer, decision
from pretrade.decision.v1 import decision_pb2 as pb

ROOMY_SECONDS: Final = 20.0


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client.connect(server.address, deadline_seconds=ROOMY_SECONDS) as client:
        yield client


def order(ref: str) -> Order:
    return Order("BTCUSDT.SIM", "buy", 0.05, "twap", order_ref=ref)


def test_every_thread_gets_the_answer_to_its_own_order(client: Client) -> None:
    refs = [f"{number}" for number in range(500)]
    with client.stream() as stream, ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda ref: stream.decide(order(ref)).order_ref, refs)) == refs


async def test_every_task_gets_the_answer_to_its_own_order(server: FakeServer) -> None:
    refs = [f"{number}" for number in range(500)]
    async with AsyncClient.connect(server.address, deadline_seconds=ROOMY_SECONDS) as client, client.stream() as stream:
        found = await asyncio.gather(*(stream.decide(order(ref)) for ref in refs))
    assert [one.order_ref for one in found] == refs


def test_what_was_under_way_when_the_server_died_is_answered_when_it_is_back(
    server: FakeServer, client: Client
) -> None:
    with client.stream() as stream:
        stream.decide(order("first"))
        server.hang()
        under_way = [stream.submit(order(f"{number}")) for number in range(100)]
        server.stop()
        server.resume()
        server.start()
        assert [one.result().order_ref for one in under_way] == [f"{number}" for number in range(100)]
    keys = {one.order_ref: one.idempotency_key for one in server.orders}
    assert all(keys[one.order_ref] == one.idempotency_key for one in server.orders), "asked again under the same key"


def test_a_server_that_stops_is_left_with_what_is_under_way(server: FakeServer, client: Client) -> None:
    draining = UnavailableError("stopping", grpc.StatusCode.UNAVAILABLE, reason="DRAINING")
    refusals = iter([draining])

    def decide(asked: pb.Order) -> pb.Decision:
        for refusal in refusals:
            raise refusal
        return decision()

    server.decide_by(decide)
    with client.stream() as stream:
        found = [stream.submit(order(f"{number}")) for number in range(10)]
        assert {one.result().order_ref for one in found} == {f"{number}" for number in range(10)}


def test_two_orders_with_one_reference_cannot_be_under_way_at_once(server: FakeServer, client: Client) -> None:
    server.hang()
    with client.stream() as stream:
        first = stream.submit(order("same"))
        with pytest.raises(ValueError, match="references must be distinct"):
            stream.decide(order("same"))
        server.resume()
        first.result()
        assert stream.decide(order("same")).order_ref == "same", "the first one has ended"


def test_each_order_has_its_own_deadline(server: FakeServer, client: Client) -> None:
    with client.stream() as stream:
        stream.decide(ORDER)
        server.hang()
        patient = stream.submit(ORDER)
        with pytest.raises(DeadlineError, match=r"within 0\.05 s"):
            stream.decide(ORDER, deadline_seconds=0.05)
        server.resume()
        assert patient.result().trades
        assert stream.decide(ORDER).trades
    assert [one.timeout.ToNanoseconds() for one in server.orders][2] == 50_000_000, "the server knows it as well"


def test_a_stream_that_was_refused_is_opened_again_for_the_next_order(server: FakeServer, client: Client) -> None:
    with client.stream() as stream:
        server.fail(grpc.StatusCode.UNAUTHENTICATED)
        with pytest.raises(Exception, match="UNAUTHENTICATED"):
            stream.decide(ORDER)
        assert stream.decide(ORDER).trades


def test_closing_a_stream_ends_what_is_under_way(server: FakeServer, client: Client) -> None:
    server.hang()
    stream = client.stream()
    under_way = stream.submit(ORDER)
    stream.close()
    stream.close()
    with pytest.raises(ClosedError):
        under_way.result()
    with pytest.raises(ClosedError):
        stream.submit(ORDER)
    server.resume()


def test_threads_that_ask_while_a_stream_is_closed_are_all_answered(client: Client) -> None:
    stream = client.stream()
    started = threading.Barrier(9)

    def ask() -> str:
        started.wait()
        try:
            while True:
                stream.decide(ORDER)
        except ClosedError:
            return "closed"

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(8)]
        started.wait()
        stream.close()
        wait(asked)
        assert {one.result() for one in asked} == {"closed"}


def test_a_server_that_hangs_is_left_with_what_is_under_way(server: FakeServer) -> None:
    with FakeServer() as other, Client.connect(server.address, other.address) as client, client.stream() as stream:
        stream.decide(ORDER, deadline_seconds=ROOMY_SECONDS)
        server.hang()
        under_way = [stream.submit(order(f"{number}"), deadline_seconds=2.0) for number in range(4)]
        assert [one.result().order_ref for one in under_way] == [f"{number}" for number in range(4)]
        assert len(other.orders) == 4
        server.resume()


async def test_a_task_that_leaves_disturbs_no_other(server: FakeServer) -> None:
    async with AsyncClient.connect(server.address, deadline_seconds=ROOMY_SECONDS) as client, client.stream() as stream:
        await stream.decide(ORDER)
        server.hang()
        leaving, staying = (asyncio.create_task(stream.decide(ORDER)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        server.resume()
        assert (await staying).trades
