"""Callers that leave, and callers that ask twice."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from support.harness import INSTRUMENTS, MID, ROOMY, eventually
from support.open_loop import LEFT, Call, summary
from support.rig import CHAMPIONS, ROOMY_SECONDS, OpenRig, Rig

from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.decision.v1 import decision_pb2_grpc

pytestmark = pytest.mark.stack

LEAVERS: Final = 300
STAYS_SECONDS: Final = (0.0003, 1.0)
"""Shortest and longest time that a caller stays. As many stay 1 to 2 ms as 100 to 200 ms: on a machine of any speed
some leave before they are read, some while they are decided, and some after their answer."""
PATIENT: Final = ROOMY | {
    "BATCHER__MIN_PATIENCE_SECONDS": "2",
    "BATCHER__MAX_PATIENCE_SECONDS": "2",
    "REPLICA__PROBE_TIMEOUT_SECONDS": "2",
}
"""No batch is given up because the machine is slow: what fails here has failed by a caller that left."""
Seen = Callable[[str], None]


def order(**changes: Any) -> pb.Order:
    fields: dict[str, Any] = {
        "instrument": INSTRUMENTS[0],
        "side": pb.SIDE_BUY,
        "quantity": 0.01,
        "limit_price": MID,
        "strategy": "test",
    }
    return pb.Order(**(fields | changes))


async def leave_at_random(address: str, seed: int) -> list[Call]:
    """What callers heard of which each leaves at a random moment."""
    chance = random.Random(seed)
    calls = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub: decision_pb2_grpc.DecisionServiceAsyncStub = decision_pb2_grpc.DecisionServiceStub(channel)

        async def come_and_go(number: int) -> Call:
            request = pb.DecideRequest(order=order(order_ref=f"leaver-{number}"))
            now = time.monotonic()
            heard = Call(request.order.order_ref, now, now, deadline_seconds=ROOMY_SECONDS)
            call = stub.Decide(request, timeout=ROOMY_SECONDS)
            stays = _stay_seconds(chance)
            heard.leaves = now + stays
            asyncio.get_running_loop().call_later(stays, call.cancel)
            try:
                heard.decision = (await call).decision
                heard.status = "OK"
            except asyncio.CancelledError:
                heard.status = LEFT
            heard.ended = time.monotonic()
            return heard

        for first in range(0, LEAVERS, 10):
            calls += await asyncio.gather(*(come_and_go(number) for number in range(first, first + 10)))
    return calls


@pytest.mark.long
@pytest.mark.fault(
    "E5",
    "Callers cancel at every stage of a call",
    "Nobody else is affected, no breaker counts a failure, and the audit says cancelled.",
)
def test_callers_that_leave_at_any_moment_harm_nobody(open_rig: OpenRig, seed: int, seen: Seen) -> None:
    rig = open_rig(PATIENT)
    failures = failed_batches(rig)
    with rig.load(100) as load:
        eventually(lambda: len(load.calls()), lambda count: count > 40)
        leavers = asyncio.run(leave_at_random(rig.server.address, seed))
        ended = len(load.calls())
        eventually(lambda: len(load.calls()), lambda count: count > ended + 20)
    assert {call.status for call in load.calls()} == {"OK"}
    left = sum(call.status == LEFT for call in leavers)
    assert LEAVERS / 10 < left < LEAVERS, "some are answered before they leave"
    assert failed_batches(rig) == failures, "a caller that leaves is no fault of the replica"
    counted = rig.server.metric("pretrade_cancelled_total")
    assert 0 < counted <= left
    seen(f"seed {seed}: {left} of {LEAVERS} left, {counted:.0f} of them while being decided")
    seen(f"bystanders: {summary(load.calls())}")
    rig.others += leavers
    seen(rig.check())
    gone = {call.order_ref for call in leavers if call.status == LEFT}
    rows = Counter(status for packet, status in rig.server.audited() if packet.order.order_ref in gone)
    seen(f"rows of those that left: {dict(rows)}")


def _stay_seconds(chance: random.Random) -> float:
    """Distributed evenly by its logarithm."""
    shortest, longest = STAYS_SECONDS
    return math.exp(chance.uniform(math.log(shortest), math.log(longest)))


def failed_batches(rig: Rig) -> Counter[str]:
    """Batches and probes of the champions that did not succeed, by outcome."""
    found: Counter[str] = Counter()
    for name in CHAMPIONS:
        found.update(rig.server.replica(name).outcomes)
    del found["success"]
    return found


@pytest.mark.fault(
    "D5", "64 calls use one idempotency key at the same time", "One decision and one row, returned 64 times."
)
def test_a_key_asked_for_many_times_at_once_is_decided_once(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig(warm_up_calls=10)

    def ask(number: int) -> bytes:
        options = (("grpc.use_local_subchannel_pool", 1),)
        with grpc.insecure_channel(rig.server.address, options=options) as channel:
            stub = decision_pb2_grpc.DecisionServiceStub(channel)
            requests = [pb.DecideRequest(order=order(order_ref="same", idempotency_key="k")) for _ in range(4)]
            calls = [stub.Decide.future(request, timeout=5.0) for request in requests]
            decisions = {call.result().decision.SerializeToString(deterministic=True) for call in calls}
            (decision,) = decisions
            return decision

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(ask, range(16)))) == 1
    rig.server.drain_audit()
    assert sum(packet.order.order_ref == "same" for packet, _ in rig.server.audited()) == 1
    assert rig.server.metric("pretrade_idempotent_repeats_total") == 63
    seen("1 decision, 1 audit row, 63 repeats")


@pytest.mark.fault(
    "D5", "An idempotency key is used for another order", "ALREADY_EXISTS. The first order is not affected."
)
def test_a_key_for_another_order_is_refused_even_while_the_first_is_decided(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig(PATIENT, warm_up_calls=10)
    stub = rig.server.decisions
    for name in CHAMPIONS:
        rig.stack[name].pause()
    request = pb.DecideRequest(order=order(order_ref="first", idempotency_key="k"))
    other = pb.DecideRequest(order=order(order_ref="first", idempotency_key="k", quantity=0.02))
    first = stub.Decide.future(request, timeout=10.0)
    # The replicas hang, so the first is still being decided when the others come.
    eventually(lambda: rig.server.metric("pretrade_in_flight"), lambda in_flight: in_flight == 1)
    refused, repeat = stub.Decide.future(other, timeout=10.0), stub.Decide.future(request, timeout=10.0)
    assert refused.code() is grpc.StatusCode.ALREADY_EXISTS
    assert not first.done(), "refused without waiting"
    assert repeat.result() == first.result()
    for name in CHAMPIONS:
        rig.stack[name].resume()
    later = stub.Decide.future(other, timeout=10.0)
    assert later.code() is grpc.StatusCode.ALREADY_EXISTS
    seen("refused at once while the first was decided, and after; repeat and first got the same decision")
