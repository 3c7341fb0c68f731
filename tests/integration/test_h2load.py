"""h2load and the bare echoes of the benchmark: both answer as the contract says, and are counted."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from loadtest import h2load
from loadtest.bench import echo_server
from local.edge_bench import envoy_echo
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

pytestmark = pytest.mark.stack
ORDER = pb.Order(order_ref="one", instrument="BTCUSDT.SIM", side=pb.SIDE_BUY, quantity=1.0, strategy="test")
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


@pytest.mark.skipif(not h2load.is_installed(), reason="needs h2load (Debian: nghttp2-client)")
def test_nobody_there_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="h2load against"):
        h2load.call_decide("127.0.0.1:9", ORDER, 1, 0.2)
