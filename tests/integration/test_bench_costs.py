"""The comparison of servers that differ in one thing, on real servers that answer at once."""

from __future__ import annotations

import asyncio

import pytest

from loadtest.benchmark.bench import order_flow
from loadtest.benchmark.echo import echo_server
from loadtest.generators.load import PRETRADE, Server, decision_calls
from local.bench.costs import compare
from local.bench.servers import usage_of_port
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack


async def test_every_server_is_measured_in_every_round_and_held_against_the_first() -> None:
    response = pb.DecideResponse(decision=pb.Decision(action=pb.ACTION_TRADE, source=pb.SOURCE_RULES))
    orders = order_flow(("BTCUSDT.SIM",))
    calls = decision_calls(orders)
    async with echo_server(response) as first, echo_server(response) as second:
        servers = [
            Server("everything", PRETRADE, first, calls, usage=usage_of_port(int(first.rpartition(":")[2]))),
            Server("less", PRETRADE, second, calls),
        ]
        costs = await asyncio.to_thread(compare, servers, orders, callers=2, seconds=0.2, rounds=2)
    everything, less = costs
    assert [(one.name, one.callers) for one in costs] == [("everything", 2), ("less", 2)]
    assert all(one.decisions_per_second > 0 and one.p99_ms >= one.p50_ms > 0 and not one.errors for one in costs)
    assert (everything.throughput, everything.cpu) == (0, 0), "the first against itself"
    assert everything.cpu_us is not None
    assert everything.cpu_us > 0
    assert (less.cpu_us, less.cpu) == (None, None), "nobody can look into it"
