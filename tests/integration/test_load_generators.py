"""h2load, the open loop by hand and the bare echoes of the benchmark: answers are as the contract says, and counted."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest

from loadtest.benchmark.echo import EchoServicer, echo_server
from loadtest.benchmark.envoy_echo import envoy_echo
from loadtest.generators import h2load, http2
from loadtest.generators.load import LARGE_BATCH, ORDERS, SERVICE, Method, decision_calls
from loadtest.generators.open_loop import offsets
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
                run = await asyncio.to_thread(h2load.call, address, calls[method, ORDERS[method]], 2, 0.3)
                answer_bytes = run.data_bytes / (run.answers * ORDERS[method])
                assert answer_bytes > RESPONSE.ByteSize()  # 64 decisions in each answer


@pytest.mark.parametrize("echo", [echo_server, envoy_echo])
@pytest.mark.parametrize(("method", "size"), [("unary", 1), ("batch", 64), ("batch", 256)])
async def test_an_open_loop_by_hand_sends_all_that_is_due_and_counts_it_after_its_warm_up(
    echo: object, method: Method, size: int
) -> None:
    call = decision_calls([FLOW.next({}) for _ in range(LARGE_BATCH)])[method, size]
    seconds = 0.5
    due = [at for at in offsets(200 * size, http2.WARM_UP_SECONDS + seconds, size, 1) if at >= http2.WARM_UP_SECONDS]
    async with echo(RESPONSE) as address:  # type: ignore[operator]  # one of the two
        began = time.monotonic()
        offered = await asyncio.to_thread(
            http2.offer, address, call, rate=200.0 * size, seconds=seconds, deadline_seconds=10.0
        )
        took = time.monotonic() - began
    assert (offered.errors, offered.decisions, len(offered.latencies)) == ({}, len(due) * size, len(due))
    assert 0 < min(offered.latencies) <= max(offered.latencies) < took
    assert took >= due[-1], "no call leaves before it is due"


async def test_an_open_loop_by_hand_counts_answers_without_a_message_as_errors() -> None:
    async with echo_server(RESPONSE) as address:
        call = replace(decision_calls([ORDER])["unary", 1], path=f"/{SERVICE}/Nothing")
        offered = await asyncio.to_thread(http2.offer, address, call, rate=100.0, seconds=0.3, deadline_seconds=10.0)
    assert offered.errors.keys() == {http2.NO_DECISION}
    assert not offered.decisions


def test_nobody_there_is_an_error_of_an_open_loop_by_hand() -> None:
    with pytest.raises(RuntimeError, match=r"open loop against 127\.0\.0\.1:9"):
        http2.offer("127.0.0.1:9", decision_calls([ORDER])["unary", 1], rate=1.0, seconds=0.1, deadline_seconds=1.0)


@pytest.mark.skipif(not h2load.is_installed(), reason="needs h2load (Debian: nghttp2-client)")
async def test_calls_that_may_not_be_cut_off_are_all_answered() -> None:
    answered = 0

    class Counting(EchoServicer):
        async def Decide(
            self, request: pb.DecideRequest, context: grpc.aio.ServicerContext[Any, Any]
        ) -> pb.DecideResponse:
            nonlocal answered
            response = await super().Decide(request, context)
            answered += 1
            return response

    server = grpc.aio.server()
    decision_pb2_grpc.add_DecisionServiceServicer_to_server(Counting(RESPONSE), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    call = replace(decision_calls([ORDER])["unary", 1], may_be_cut=False)
    run = await asyncio.to_thread(h2load.call, f"127.0.0.1:{port}", call, 8, 0.3)
    await server.stop(None)
    tried = 8 * 4
    assert run.answers + tried == answered, "each was waited for"
    assert 0 < run.seconds < 10


@pytest.mark.skipif(not h2load.is_installed(), reason="needs h2load (Debian: nghttp2-client)")
def test_nobody_there_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="h2load against"):
        h2load.call_decide("127.0.0.1:9", ORDER, 1, 0.2)
