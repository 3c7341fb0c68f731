"""More calls than the server can answer: what is shed, what it costs those that are not, and what comes after."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Final, cast

import flood
import grpc
import pytest
from figures import Figure
from flood import Flood, Outcome
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from harness import INSTRUMENTS, MID, PATIENCE_SECONDS, eventually
from open_loop import summary
from rig import CHAMPIONS, ROOMY, OpenRig

from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack

DEADLINE_MS: Final = 100
OK: Final = grpc.StatusCode.OK.value[0]
CANCELLED: Final = grpc.StatusCode.CANCELLED.value[0]
EXPIRED: Final = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
EXHAUSTED: Final = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
UNANSWERED: Final = -2
SIZED: Final = {
    "BUDGET__CAP_SECONDS": str(DEADLINE_MS / 1e3),
    "GRPC__MAX_PENDING_CALLS": "16",
    "ADMISSION__MIN_IN_FLIGHT": "32",
}
"""What a machine that answers a thousand orders a second takes up and answers in a small part of the deadline."""
KEPT_AT_TWICE: Final = 0.8
KEPT_AT_TEN_TIMES: Final = 0.4
"""Share of the capacity that is still answered in time, with generator, server and replicas on the same two cores."""
NORMAL_SECONDS: Final = 5.0
BYSTANDERS: Final = 20.0
"""Orders a second beside the flood, each of which is looked up in the audit afterwards."""
Seen = Callable[[str], None]


def message() -> str:
    order = pb.Order(instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=0.01, limit_price=MID, strategy="test")
    return pb.DecideRequest(order=order).SerializeToString().hex()


@pytest.mark.fault("E1", "a call beyond the limit", "RESOURCE_EXHAUSTED at once, with ErrorInfo and RetryInfo")
def test_a_call_that_is_shed_learns_when_to_try_again(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig(ROOMY | {"ADMISSION__MAX_IN_FLIGHT": "1", "ADMISSION__MIN_IN_FLIGHT": "1"}, warm_up_calls=5)
    for name in CHAMPIONS:
        rig.stack[name].pause()
    order = pb.Order(instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=0.01, strategy="test")
    request = pb.DecideRequest(order=order)
    first = rig.server.decisions.Decide.future(request, timeout=5.0)
    eventually(lambda: rig.server.metric("pretrade_in_flight"), lambda in_flight: in_flight == 1)
    with pytest.raises(grpc.RpcError) as caught:
        rig.server.decisions.Decide(request, timeout=5.0)
    assert not first.done(), "refused without waiting"
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(cast("grpc.Call", caught.value))
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert info.reason == "TOO_MANY_IN_FLIGHT"
    eventually(lambda: rig.server.metric("pretrade_shed_total"), lambda shed: shed == 1)
    assert first.result().decision.action
    seen(f"{info.reason}, try again after {retry.retry_delay.nanos // 1_000_000} ms")


@pytest.mark.long
@pytest.mark.fault(
    "E1", "ten times the capacity, open loop", "shed and counted; I1-I7 of callers meanwhile; normal again by itself"
)
def test_ten_times_the_capacity_is_shed_and_the_rest_answered(open_rig: OpenRig, seen: Seen, figure: Figure) -> None:
    rig = open_rig(SIZED, deadline_seconds=DEADLINE_MS / 1e3)

    def load(seconds: float, rate: float | None) -> Flood:
        return Flood(rig.server.address, message(), seconds, DEADLINE_MS, rate=rate, callers=32)

    warm_up = flood.run(load(2, None))
    measured = flood.run(load(4, None))
    capacity = goodput(measured)
    seen(f"capacity {capacity:.0f}/s (closed loop of 32)")
    refused, unanswered = 0, 0
    for found in (warm_up, measured):
        refused += refusals(found)
        unanswered += found.statuses.get(UNANSWERED, 0)
    for times, kept in ((2, KEPT_AT_TWICE), (10, KEPT_AT_TEN_TIMES)):
        cpu = rig.server.process.cpu_times()
        with rig.load(BYSTANDERS, on_the_wire=True) as bystanders:
            overload = flood.start(load(5, times * capacity))
            asked: list[float] = []
            while not has_ended(overload):
                started = time.monotonic()
                rig.server.assert_alive()
                assert rig.server.status().instance_id
                asked.append(time.monotonic() - started)
        found = flood.outcome(overload)
        spent = rig.server.process.cpu_times()
        ended = time.monotonic()
        while True:
            after = flood.run(load(0.5, 0.5 * capacity))
            refused += refusals(after)
            unanswered += after.statuses.get(UNANSWERED, 0)
            if goodput(after) >= 0.45 * capacity:
                break
            assert time.monotonic() - ended < PATIENCE_SECONDS, "back to normal"
        back = time.monotonic() - ended
        refused += refusals(found) + sum(call.status == "RESOURCE_EXHAUSTED" for call in bystanders.calls())
        unanswered += found.statuses.get(UNANSWERED, 0)
        seen(
            f"{times}x: {found.sent / found.seconds:.0f} sent/s, goodput {goodput(found):.0f}/s = "
            f"{goodput(found) / capacity:.0%}, {refusals(found)} RESOURCE_EXHAUSTED, "
            f"{found.statuses.get(CANCELLED, 0)} CANCELLED by the transport, "
            f"{found.statuses.get(EXPIRED, 0)} DEADLINE_EXCEEDED; answered {found.percentiles_ms} ms, refused "
            f"{found.refused_ms} ms; admin {len(asked)} times, slowest {1e3 * max(asked):.0f} ms; normal after "
            f"{back:.1f} s; CPU: generator {found.cpu_seconds:.1f} s, server "
            f"{spent.user + spent.system - cpu.user - cpu.system:.1f} s of {found.seconds:.0f} s on 2 cores; "
            f"beside it {summary(bystanders.calls())}"
        )
        assert found.statuses.keys() <= {OK, CANCELLED, EXPIRED, EXHAUSTED, UNANSWERED}
        assert found.explained == refusals(found), "every refusal of ours says when to try again"
        # What a refused call costs transport and generator is taken from the answers, since they share two cores: the
        # target of 90 % at 10x is out of reach here. Without a bound 15 % were left at twice and 3 % at ten times.
        figure(goodput(found) >= kept * capacity, f"{kept:.0%} of the capacity answered at {times} times of it")
        figure(found.percentiles_ms["p99"] <= 1.25 * DEADLINE_MS, f"p99 of what is answered, at {times} times")
        figure(back <= NORMAL_SECONDS, f"normal {NORMAL_SECONDS:.0f} s after {times} times the capacity")
    # What was refused is counted, also where Envoy does it, and nothing else is but what nobody waited for any more.
    shed = eventually(lambda: rig.server.metric("pretrade_shed_total"), lambda shed: shed >= refused)
    assert shed <= refused + unanswered
    seen(rig.check())


def refusals(found: Outcome) -> int:
    """Calls that heard RESOURCE_EXHAUSTED."""
    return found.statuses.get(EXHAUSTED, 0)


def has_ended(process: subprocess.Popen[str]) -> bool:
    """Waits a moment for its end."""
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        return False
    return True


def goodput(found: Outcome) -> float:
    """Answers in time, a second."""
    return found.in_time / found.seconds
