"""h2load, k6 and the bare echoes of the benchmark: all answers are as the contract says, and are counted."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from loadtest.benchmark.echo import echo_server
from loadtest.benchmark.envoy_echo import envoy_echo
from loadtest.generators import h2load, k6
from loadtest.generators.load import METHODS, ORDERS, Method, decision_calls
from loadtest.generators.orders import OrderFlow
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

pytestmark = pytest.mark.stack
ORDER = pb.Order(order_ref="one", instrument="BTCUSDT.SIM", side=pb.SIDE_BUY, quantity=1.0, strategy="test")
FLOW = OrderFlow(["BTCUSDT.SIM"])
RESPONSE = pb.DecideResponse(decision=pb.Decision(decision_id="d", action=pb.ACTION_TRADE))


@pytest.mark.parametrize("echo", [echo_server, envoy_echo])
async def test_every_echo_answers_and_is_counted(echo: object) -> None:
    async with echo(RESPONSE) as address:  # type: ignore[operator]  # one of the two
        async with grpc.aio.insecure_channel(address) as channel:
            stub = decision_pb2_grpc.DecisionServiceStub(channel)
            answer = await stub.Decide(pb.DecideRequest(order=ORDER), timeout=10.0)
            assert (answer.decision.order_ref, answer.decision.action) == ("one", pb.ACTION_TRADE)
        if not h2load.is_installed():
            pytest.skip("needs h2load (Debian: nghttp2-client)")
        run = await asyncio.to_thread(h2load.call_decide, address, ORDER, 32, 0.5)
    assert run.answers > 50
    assert 0 < run.p50_ms <= run.p99_ms <= run.p999_ms


@pytest.mark.parametrize("echo", [echo_server, envoy_echo])
async def test_every_echo_answers_streams_and_batches(echo: object) -> None:
    orders = [FLOW.next({}) for _ in range(64)]
    refs = [order.order_ref for order in orders]
    async with echo(RESPONSE) as address, grpc.aio.insecure_channel(address) as channel:  # type: ignore[operator]
        stub: decision_pb2_grpc.DecisionServiceAsyncStub = decision_pb2_grpc.DecisionServiceStub(channel)
        batch = await stub.DecideBatch(pb.DecideBatchRequest(orders=orders), timeout=10.0)
        assert [result.decision.order_ref for result in batch.results] == refs
        stream = stub.DecideStream(timeout=10.0)
        for order in orders[:3]:  # one by one: the first is answered before the last is sent
            await stream.write(pb.DecideStreamRequest(order=order))
            answer = await stream.read()
            assert isinstance(answer, pb.DecideStreamResponse)
            assert answer.result.order_ref == answer.result.decision.order_ref == order.order_ref
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        if h2load.is_installed():
            calls = decision_calls(orders)
            for method in ("stream", "batch"):
                run = await asyncio.to_thread(h2load.call, address, calls[method], 2, 0.3)
                answer_bytes = run.data_bytes / (run.answers * ORDERS[method])
                assert answer_bytes > RESPONSE.ByteSize()  # 64 decisions in each answer


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name == "unary" else pytest.mark.long) for name in METHODS]
)
async def test_k6_offers_orders_at_a_rate_from_when_they_are_due(method: Method) -> None:
    if k6.program() is None:
        pytest.skip("needs k6")
    async with echo_server(RESPONSE) as address:
        orders = [FLOW.next({}) for _ in range(64)]
        offered = await asyncio.to_thread(
            k6.offer, address, method, orders, rate=128.0, seconds=1.0, deadline_seconds=10.0
        )
    assert offered.decisions + sum(offered.errors.values()) == 128
    assert not offered.errors.keys() - {k6.NOT_SENT}, "what was sent was answered"
    assert offered.decisions > 0
    assert all(latency > 0 for latency in offered.latencies)


async def test_k6_counts_calls_without_a_decision_under_their_status() -> None:
    if k6.program() is None:
        pytest.skip("needs k6")
    async with echo_server(RESPONSE) as address:
        offered = await asyncio.to_thread(
            k6.offer, address, "unary", [ORDER], rate=50.0, seconds=0.5, deadline_seconds=1e-5
        )
    assert offered.errors["DEADLINE_EXCEEDED"] > 0
    assert offered.decisions + sum(offered.errors.values()) == 25


@pytest.mark.skipif(not h2load.is_installed(), reason="needs h2load (Debian: nghttp2-client)")
def test_nobody_there_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="h2load against"):
        h2load.call_decide("127.0.0.1:9", ORDER, 1, 0.2)
