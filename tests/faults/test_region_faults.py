"""Two regions that both decide: one is lost, with everything that was under way there, and comes back."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.decision_server import DecisionServer
from support.every_way import EveryWay
from support.figures import Figure
from support.harness import INSTRUMENTS, ROOMY, eventually
from support.rig import ROOMY_SECONDS, OpenRig
from support.server_group import server_group
from support.tcp_proxy import BLACK_HOLE, TcpProxy

from loadtest.generators.measurement import percentile
from loadtest.studies.failover import Call, run

pytestmark = [pytest.mark.stack, pytest.mark.long]
Seen = Callable[[str], None]
RATE, SECONDS, LOST_AT, BACK_AT = 60.0, 35.0, 5.0, 10.0
"""A server in Envoy takes 5 s to start, and on a busy machine three times that."""
QUICKLY_SECONDS = 0.4
DEADLINE_SECONDS = 4.0
"""Room for a server of two, on a machine that has other work; a call that is swallowed waits for half of it."""


@pytest.mark.fault(
    "F3",
    "A region is lost under load, and comes back",
    "No call fails, with the client library: the other region answers its orders inside their deadlines.",
)
def test_the_other_region_answers_for_one_that_is_lost(
    open_rig: OpenRig, tmp_path: Path, seen: Seen, figure: Figure
) -> None:
    rig = open_rig(ROOMY, warm_up_calls=30)
    endpoints = rig.stack.endpoints
    addresses = {name: str(getattr(endpoints, name)) for name in ("primary", "secondary", "challenger")}
    assert endpoints.redis_url is not None
    with DecisionServer(tmp_path / "b", endpoints.redis_url, settings=ROOMY, **addresses) as other:
        other.wait_until_well("primary", "secondary")
        for number in range(30):
            other.decide(order_ref=f"warm-up-{number}")
        calls: list[Call] = []
        sending = threading.Thread(
            target=lambda: asyncio.run(
                run(
                    rig.server.address,
                    other.address,
                    INSTRUMENTS,
                    rate=RATE,
                    seconds=SECONDS,
                    deadline_seconds=2 * ROOMY_SECONDS,
                    observe=calls.append,
                )
            )
        )
        sending.start()
        reached(calls, LOST_AT)
        rig.server.kill()
        reached(calls, BACK_AT)
        rig.server.start()
        sending.join()
        rig.server.drain_audit()
        other.drain_audit()
        audited = [Counter(packet.order.order_ref for packet, _ in server.audited()) for server in (rig.server, other)]
    assert len(calls) == int(RATE * SECONDS)
    lost = [call for call in calls if call.home == "a" and LOST_AT + 1 < call.due < BACK_AT]
    assert lost
    assert {call.answered_by for call in lost} == {"b"}
    unanswered = Counter(call.action for call in calls if not call.answered_by)
    assert not unanswered
    quickly = sum(bool(call.answered_by) and call.seconds <= QUICKLY_SECONDS for call in calls) / len(calls)
    figure(quickly > 0.95, "95 % answered in 400 ms through the loss of a region")
    assert any(call.answered_by == "a" for call in calls if call.due > BACK_AT + 1), "it has its orders back"
    for call in calls:
        assert audited["ab".index(call.answered_by)][call.order_ref] == 1, "audited where it was answered"
    both = set(audited[0]) & set(audited[1]) - {f"warm-up-{number}" for number in range(30)}
    after = [call.seconds for call in lost if call.answered_by]
    seen(
        f"{len(calls)} of {len(calls)} orders answered, {quickly:.1%} in 400 ms; "
        f"while a was lost those of its flows by b, p99 "
        f"{1e3 * percentile(after, 0.99):.0f} ms; "
        f"{len(both)} orders were decided in both regions"
    )


@pytest.mark.fault(
    "F3",
    "A region is lost under load, killed or cut off without a word; callers ask in every way that Python has",
    "No call fails, with the client library: the other region answers. Each decision that was heard is in the audit of "
    "the region that made it, once.",
)
@pytest.mark.timeout(400)  # three servers start
@pytest.mark.parametrize("loss", ["killed", "cut off"])
def test_no_way_of_asking_loses_a_call_with_a_region(tmp_path: Path, loss: str, seen: Seen) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with ExitStack() as running:
        a, b = (running.enter_context(server_group(tmp_path / name, 1)) for name in "ab")
        proxy = running.enter_context(TcpProxy(a.decision))
        with EveryWay(proxy.address, b.decision, deadline_seconds=DEADLINE_SECONDS) as callers:
            callers.wait_for_more(30)
            if loss == "killed":
                a.kill()
                callers.wait_for_more(30)
                a = running.enter_context(server_group(tmp_path / "a", 1))
                proxy.point_to(a.decision)
            else:
                proxy.apply(BLACK_HOLE)
                callers.wait_for_more(30)
                proxy.heal()
            before = len(callers.heard)
            eventually(lambda: {one.server for one in callers.heard[before:]}, lambda found: proxy.address in found)
            callers.wait_for_more(30)
        assert (a.stop(), b.stop()) == (0, 0)
    assert callers.errors == []
    audits = a.audited(), b.audited()
    callers.decided_once(*audits)
    by_b = sum(one.server == b.decision for one in callers.heard)
    assert 0 < by_b < len(callers.heard)
    twice = audits[0].keys() & audits[1].keys()
    seen(f"{len(callers.heard)} orders, none without decision, {by_b} by b; {len(twice)} were decided in both regions")


def reached(calls: list[Call], seconds: float) -> None:
    """Waits until the orders that are due at this instant have ended."""
    eventually(lambda: max((call.due for call in list(calls)), default=0.0), lambda due: due >= seconds)
