"""Replicas whose processes die, hang or grow slow: who answers instead, and what it is counted as."""

from __future__ import annotations

import random
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import grpc
import psutil
import pytest
from support.figures import Figure
from support.harness import eventually
from support.invariants import assert_answered
from support.open_loop import Call, summary
from support.rig import OpenRig, Rig, heal, wait_for_more

from feature_cache.features import MF1
from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb
from pretrade.wire.torchserve.inference_pb2_grpc import InferenceAPIsServiceStub
from server.inference import wire

pytestmark = pytest.mark.stack

RATE = 50.0

Seen = Callable[[str], None]


@pytest.mark.long
@pytest.mark.fault(
    "A1",
    "The primary is killed with SIGKILL under load",
    "No call fails. SECONDARY answers, and PRIMARY again after its restart.",
)
def test_a_killed_primary_fails_no_call_and_the_secondary_answers_until_it_is_back(
    open_rig: OpenRig, seen: Seen
) -> None:
    rig = open_rig()
    with rig.load(RATE) as load:
        wait_for_more(load, 100)
        rig.stack["primary"].kill()
        rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_OPEN)
        opened = len(load.calls())
        wait_for_more(load, 100)
        until = len(load.calls()) - 10
        rig.stack.restart("primary")
        rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_CLOSED)
        closed = len(load.calls())
        wait_for_more(load, 100)
    calls = load.calls()
    seen(assert_answered(calls))
    during = [call.decision for call in calls[opened + 20 : until] if call.decision]
    assert {decision.source for decision in during} == {pb.SOURCE_SECONDARY}
    assert all(pb.DEGRADATION_PRIMARY_BREAKER_OPEN in decision.degradations for decision in during)
    # A replica that has just started may be slow for once: then the answer says why it is the secondary's.
    after = [call.decision for call in calls[closed + 20 :] if call.decision]
    assert {decision.source for decision in after if not decision.degradations} == {pb.SOURCE_PRIMARY}
    assert sum(decision.source == pb.SOURCE_PRIMARY for decision in after) >= 0.9 * len(after)
    assert rig.server.replica("primary").outcomes["transport"] > 0
    seen(summary(calls))
    seen(rig.check())


@pytest.mark.fault(
    "A2",
    "The primary hangs (SIGSTOP) under load",
    "No call fails: the retry answers, then the breaker opens. The number of tasks is bounded.",
)
def test_a_hung_primary_costs_no_call_its_answer_and_leaves_nothing_behind(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig()
    with rig.load(RATE) as load:
        wait_for_more(load, 100)
        rig.stack["primary"].pause()
        rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_OPEN)
        hung = rig.server.replica("primary")
        wait_for_more(load, 100)
        rig.stack["primary"].resume()
        rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_CLOSED)
        wait_for_more(load, 50)
    assert {call.status for call in load.calls()} == {"OK"}
    assert hung.outcomes["timeout"] > 0
    assert hung.in_flight <= 8, "calls that nobody waits for any more count against the replica's bound"
    eventually(lambda: rig.server.replica("primary").in_flight, lambda in_flight: in_flight == 0)
    seen(summary(load.calls()))
    seen(rig.check())


@contextmanager
def leavers(address: str, seed: int) -> Iterator[None]:
    """Calls a replica in somebody else's name, and leaves each call about when its answer is due."""
    request = wire.request("champion", [bytes(MF1.row_bytes)])
    over = threading.Event()
    with grpc.insecure_channel(address) as channel:
        stub = InferenceAPIsServiceStub(channel)

        def come_and_go(chance: random.Random) -> None:
            while not over.is_set():
                call = stub.Predictions.future(request, timeout=5.0)
                over.wait(chance.uniform(0.0, 0.006))
                call.cancel()

        threads = [threading.Thread(target=come_and_go, args=(random.Random(seed + i),)) for i in range(8)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()


def worker(rig: Rig) -> set[int]:
    """Process ids of the primary's Python worker."""
    pid = rig.stack["primary"].pid
    assert pid is not None
    return {child.pid for child in psutil.Process(pid).children()}


@pytest.mark.long  # how many callers must leave is a matter of luck
@pytest.mark.fault(
    "A13",
    "Callers of the primary leave when their answers are due, until TorchServe restarts its worker",
    "No call fails. SECONDARY answers for some seconds, and then PRIMARY again.",
)
def test_a_worker_that_ends_with_callers_who_leave_is_back_by_itself(open_rig: OpenRig, seed: int, seen: Seen) -> None:
    rig = open_rig()
    with rig.load(RATE) as load:
        wait_for_more(load, 50)
        before = worker(rig)
        with leavers(str(rig.stack.endpoints.primary), seed):
            eventually(lambda: worker(rig), lambda found: not found & before, 60.0)
        left = len(load.calls())

        def by_primary() -> int:
            newest = [call.decision for call in load.calls()[left:] if call.decision][-100:]
            return sum(decision.source == pb.SOURCE_PRIMARY for decision in newest)

        # The server may not know yet that the worker has ended, and takes it for well.
        eventually(by_primary, lambda answered: answered >= 90, 90.0)
        back = len(load.calls())
    calls = load.calls()
    assert {call.status for call in calls} == {"OK"}
    seen(f"seed {seed}: well again after {(back - left) / RATE:.1f} s; {summary(calls)}")
    seen(rig.check())


@contextmanager
def crowd(address: str) -> Iterator[None]:
    """Keeps more calls at a replica than its queue holds, in somebody else's name."""
    request = wire.request("champion", [bytes(MF1.row_bytes)] * 500)
    over = threading.Event()
    with grpc.insecure_channel(address) as channel:
        stub = InferenceAPIsServiceStub(channel)

        def call() -> None:
            while not over.is_set():
                with suppress(grpc.RpcError):  # most of the crowd is refused
                    stub.Predictions(request, timeout=5.0)

        threads = [threading.Thread(target=call) for _ in range(40)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()


@pytest.mark.long
@pytest.mark.fault(
    "A9",
    "Another client fills TorchServe's queue",
    "The other replica answers. The breaker stays closed, because this is overload.",
)
def test_a_full_queue_sends_orders_to_the_other_replica_and_opens_no_breaker(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig()
    with rig.load(RATE) as load:
        with crowd(str(rig.stack.endpoints.primary)):
            eventually(lambda: rig.server.replica("primary").outcomes["overload"], lambda count: count > 5)
        assert rig.server.metric("pretrade_breaker_transitions_total", replica="primary") == 0
        wait_for_more(load, 50)
    assert {call.status for call in load.calls()} == {"OK"}
    full = [
        call.decision
        for call in load.calls()
        if call.decision and pb.DEGRADATION_PRIMARY_OVERLOADED in call.decision.degradations
    ]
    assert full
    assert pb.SOURCE_SECONDARY in {decision.source for decision in full}
    seen(f"{len(full)} orders found the primary full; {summary(load.calls())}")
    seen(rig.check())


@pytest.mark.long
@pytest.mark.fault(
    "A11",
    "Both champions are killed without an embedded model",
    "CACHED_SCORE while the score is young, then RULES.",
)
def test_without_champions_cached_score_and_rules_answer_at_once(open_rig: OpenRig, seen: Seen, figure: Figure) -> None:
    rig = open_rig()
    with rig.load(RATE) as load:
        wait_for_more(load, 50)
        for name in ("primary", "secondary"):
            rig.stack[name].kill()
        for name in ("primary", "secondary"):
            rig.server.wait_for_breaker(name, admin_pb2.BREAKER_STATE_OPEN)
        at = len(load.calls())
        eventually(lambda: sources(load.calls()[at:]), lambda found: pb.SOURCE_RULES in found)
        wait_for_more(load, 100)
    assert {call.status for call in load.calls()} == {"OK"}
    assert pb.SOURCE_CACHED_SCORE in sources(load.calls())
    rules = [call.decision for call in load.calls() if call.decision and call.decision.source == pb.SOURCE_RULES]
    spent = [
        decision.budget.used_us - sum(use.used_us for use in decision.budget.stages if use.stage == pb.STAGE_AUDIT)
        for decision in rules
    ]
    median_ms = statistics.median(spent) / 1e3
    figure(median_ms < 5.0, "rules within 5 ms besides the audit")
    seen(f"{summary(load.calls())}; rules within {median_ms:.2f} ms besides the audit (median)")
    heal(rig.stack)
    seen(rig.check())


def sources(calls: Sequence[Call]) -> set[int]:
    return {call.decision.source for call in calls if call.decision}
