"""More calls than the server can answer: what is shed, what it costs those that are not, and what comes after."""

from __future__ import annotations

import math
import os
import queue
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Final, cast

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from support import flood
from support.figures import Figure
from support.flood import Flood, Outcome
from support.harness import INSTRUMENTS, MID, PATIENCE_SECONDS, ROOMY, eventually
from support.leash import LeashedPopen
from support.open_loop import summary
from support.rig import CHAMPIONS, REPLICAS, OpenRig, Rig

from pretrade.client.retries import retry_delay
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
KEPT: Final = {"shared": {2: 0.8, 10: 0.4}, "own": {2: 0.9, 10: 0.9}}
"""Share of the capacity that is still answered in time at so many times of it: where the generator shares the cores
with server and replicas, which pay for its part of every refusal, and where it has a core of its own. Without a bound
on what waits 15 % were left at twice and 3 % at ten times."""
NORMAL_SHARE: Final = 0.25
"""Of the capacity: a load of which nothing is refused once all is normal again."""
NORMAL_SECONDS: Final = 5.0
BYSTANDERS: Final = 20.0
"""Orders a second beside the flood, each of which is looked up in the audit afterwards."""
Seen = Callable[[str], None]


def message() -> str:
    order = pb.Order(instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=0.01, limit_price=MID, strategy="test")
    return pb.DecideRequest(order=order).SerializeToString().hex()


@pytest.mark.fault(
    "E1",
    "A call arrives beyond the admission limit",
    "RESOURCE_EXHAUSTED at once, with ErrorInfo, RetryInfo and gRPC's pushback.",
)
def test_a_call_that_is_shed_learns_when_to_try_again(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig(ROOMY | {"ADMISSION__MAX_IN_FLIGHT": "1", "ADMISSION__MIN_IN_FLIGHT": "1"}, warm_up_calls=5)
    for name in CHAMPIONS:
        rig.stack[name].pause()
    order = pb.Order(instrument=INSTRUMENTS[0], side=pb.SIDE_BUY, quantity=0.01, strategy="test")
    request = pb.DecideRequest(order=order)
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for call in [rig.server.decisions.Decide.future(request, timeout=5.0) for _ in range(2)]:
        call.add_done_callback(ended.put)
    refused, answered = ended.get(timeout=10.0), ended.get(timeout=10.0)  # refused without waiting, and therefore first
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    status = rpc_status.from_call(cast("grpc.Call", refused))
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert info.reason == "TOO_MANY_IN_FLIGHT"
    assert retry_delay(refused) == retry.retry_delay.nanos / 1e9
    eventually(lambda: rig.server.metric("pretrade_shed_total"), lambda shed: shed == 1)
    assert answered.result().decision.action
    seen(f"{info.reason}, try again after {retry.retry_delay.nanos // 1_000_000} ms")


class Floods:
    """Floods of one server, and what became of all their calls.

    Args:
        rig: The server.
        cores: Those that the generator may use.
    """

    def __init__(self, rig: Rig, cores: set[int]) -> None:
        self._rig = rig
        self._cores = cores
        self.refused = 0
        """Calls that heard RESOURCE_EXHAUSTED."""
        self.unanswered = 0

    def start(self, seconds: float, rate: float | None) -> LeashedPopen:
        """A flood of so many calls a second; None: a closed loop."""
        asked = Flood(self._rig.server.address, message(), seconds, DEADLINE_MS, rate=rate, callers=32)
        process = flood.start(asked)
        pin(psutil.Process(process.pid), self._cores)
        return process

    def outcome(self, process: LeashedPopen) -> Outcome:
        """Waits for its end."""
        found = flood.outcome(process)
        assert found.statuses.keys() <= {OK, CANCELLED, EXPIRED, EXHAUSTED, UNANSWERED}
        assert found.explained == refusals(found), "every refusal of ours says when to try again"
        self.refused += refusals(found)
        self.unanswered += found.statuses.get(UNANSWERED, 0)
        return found

    def run(self, seconds: float, rate: float | None = None) -> Outcome:
        """The same at once."""
        return self.outcome(self.start(seconds, rate))

    def until_normal(self, rate: float) -> float:
        """Seconds until nothing of such a load is refused."""
        began = time.monotonic()
        while refusals(after := self.run(0.5, rate)) or not after.in_time:
            assert time.monotonic() - began < PATIENCE_SECONDS, f"refused are {after.statuses}"
        return time.monotonic() - began


@pytest.mark.long
@pytest.mark.fault(
    "E1",
    "Ten times as many calls arrive as the server can answer",
    "The excess is shed and counted. All invariants hold, and the server returns to normal without help.",
)
@pytest.mark.parametrize("core", KEPT)
def test_ten_times_the_capacity_is_shed_and_the_rest_answered(
    core: str, open_rig: OpenRig, seen: Seen, figure: Figure
) -> None:
    rig = open_rig(SIZED, deadline_seconds=DEADLINE_MS / 1e3)
    every = os.sched_getaffinity(0)
    generators, servers = (every, every) if core == "shared" else ({max(every)}, every - {max(every)} or every)
    floods = Floods(rig, generators)
    with ExitStack() as undone:
        for process in (rig.server.process, *(psutil.Process(rig.stack[name].pid) for name in REPLICAS)):
            undone.callback(pin, process, every)
            pin(process, servers)
        floods.run(2)
        capacity = goodput(floods.run(4))
        seen(f"generator with {core} core: capacity {capacity:.0f}/s (closed loop of 32)")
        for times, kept in KEPT[core].items():
            cpu = rig.server.process.cpu_times()
            with rig.load(BYSTANDERS, on_the_wire=True) as bystanders:
                overload = floods.start(5, times * capacity)
                asked: list[float] = []
                while not has_ended(overload):
                    started = time.monotonic()
                    rig.server.assert_alive()
                    assert rig.server.status().instance_id
                    asked.append(time.monotonic() - started)
            found = floods.outcome(overload)
            floods.refused += sum(call.status == "RESOURCE_EXHAUSTED" for call in bystanders.calls())
            spent = rig.server.process.cpu_times()
            back = floods.until_normal(NORMAL_SHARE * capacity)
            seen(
                f"{times}x: {found.sent / found.seconds:.0f} sent/s, goodput {goodput(found):.0f}/s = "
                f"{goodput(found) / capacity:.0%}, {refusals(found)} RESOURCE_EXHAUSTED, "
                f"{found.statuses.get(CANCELLED, 0)} CANCELLED by the transport, "
                f"{found.statuses.get(EXPIRED, 0)} DEADLINE_EXCEEDED; answered {found.percentiles_ms} ms, refused "
                f"{found.refused_ms} ms; admin {len(asked)} times, slowest {1e3 * max(asked):.0f} ms; normal after "
                f"{back:.1f} s; CPU: generator {found.cpu_seconds:.1f} s, server "
                f"{spent.user + spent.system - cpu.user - cpu.system:.1f} s of {found.seconds:.0f} s; "
                f"beside it {summary(bystanders.calls())}"
            )
            figure(goodput(found) >= kept * capacity, f"{core}: {kept:.0%} of the capacity answered at {times} times")
            figure(
                found.percentiles_ms.get("p99", math.inf) <= 1.25 * DEADLINE_MS,
                f"{core}: p99 of the answers at {times} times",
            )
            figure(back <= NORMAL_SECONDS, f"{core}: normal {NORMAL_SECONDS:.0f} s after {times} times the capacity")
    # What was refused is counted, also where Envoy does it, and nothing else is but what nobody waited for any more.
    shed = eventually(lambda: rig.server.metric("pretrade_shed_total"), lambda shed: shed >= floods.refused)
    assert shed <= floods.refused + floods.unanswered
    seen(rig.check())


def refusals(found: Outcome) -> int:
    """Calls that heard RESOURCE_EXHAUSTED."""
    return found.statuses.get(EXHAUSTED, 0)


def pin(process: psutil.Process, cores: set[int]) -> None:
    """Keeps a process and its children on these cores."""
    for member in (process, *process.children(recursive=True)):
        for thread in member.threads():
            with suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(thread.id, cores)


def has_ended(process: LeashedPopen) -> bool:
    """Waits a moment for its end."""
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        return False
    return True


def goodput(found: Outcome) -> float:
    """Answers in time, a second."""
    return found.in_time / found.seconds
