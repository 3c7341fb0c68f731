"""A network that loses, holds, delays or cuts what server and primary say to each other; both are real."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
from support.harness import ROOMY, TOO_LONG_SECONDS, eventually
from support.open_loop import summary
from support.rig import OpenRig, wait_for_more
from support.tcp_proxy import BLACK_HOLE, HALF_OPEN, Fault, TcpProxy

from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = [pytest.mark.stack, pytest.mark.long]

RATE: Final = 50.0
Seen = Callable[[str], None]

LOST: Final[dict[str, Callable[[TcpProxy], None]]] = {
    "black hole both ways": lambda proxy: proxy.apply(BLACK_HOLE),
    "replies lost (half-open TCP)": lambda proxy: proxy.apply(HALF_OPEN),
    "SYNs lost": lambda proxy: proxy.drop_syns(),
    "refused": lambda proxy: proxy.refuse(),
}


@pytest.mark.fault(
    "A4",
    "The network to the primary swallows packets, half-closes, drops SYNs or refuses connections",
    "No call fails. The breaker opens, and closes after the repair.",
)
def test_a_primary_that_the_network_swallows_costs_no_call_its_decision(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig(proxied=("primary",))
    proxy = rig.proxies["primary"]
    with rig.load(RATE) as load:
        for name, lose in LOST.items():
            connections = proxy.accepted
            lose(proxy)
            rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_OPEN)
            at = len(load.calls())
            wait_for_more(load, 50)
            during = {call.decision.source for call in load.calls()[at + 20 :] if call.decision}
            assert during == {pb.SOURCE_SECONDARY}, name
            proxy.heal()
            rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_CLOSED)
            seen(f"{name}: {proxy.accepted - connections} new connections")
    calls = load.calls()
    assert {call.status for call in calls} == {"OK"}
    seen(summary(calls))
    seen(rig.check())


@pytest.mark.fault(
    "A4",
    "The network to the primary swallows all packets for a long time",
    "Keepalive ends the dead connection. No call waits for it.",
)
def test_keepalive_ends_a_connection_that_a_black_hole_keeps_open(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig(proxied=("primary",))
    proxy = rig.proxies["primary"]
    with rig.load(RATE):
        connections = proxy.accepted
        proxy.apply(BLACK_HOLE)
        # The client gives the dead connection up and tries another, into the same hole.
        eventually(lambda: proxy.accepted, lambda accepted: accepted > connections)
        proxy.heal()
        rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_CLOSED)
    assert {call.status for call in rig.calls()} == {"OK"}
    seen(rig.check())


@pytest.mark.fault(
    "A5", "Replies of the primary are reset or cut off in the middle", "The retry answers, never a partial score."
)
def test_a_reply_cut_in_its_middle_is_retried_and_never_used(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig(ROOMY | {"BREAKER__CONSECUTIVE_FAILURES": "1000", "RETRY__SHARE": "1"}, proxied=("primary",))
    proxy = rig.proxies["primary"]
    with rig.load(RATE) as load:
        for fault in (Fault(reset_replies_after=20), Fault(truncate_replies_after=20)):
            wanted = rig.server.replica("primary").outcomes["transport"] + 3
            proxy.apply(fault)
            eventually(lambda: rig.server.replica("primary").outcomes["transport"], wanted.__le__)
            proxy.heal()
            rig.server.decide_until(pb.SOURCE_PRIMARY)
    calls = load.calls()
    assert {call.status for call in calls} == {"OK"}
    seen(summary(calls))
    seen(rig.check())


@pytest.mark.fault(
    "A3",
    "Every reply of the primary takes more than a second longer",
    "SECONDARY answers. The breaker opens once and does not flap.",
)
def test_a_slow_primary_is_left_alone_without_flapping(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig(proxied=("primary",))
    with rig.load(RATE) as load:
        rig.proxies["primary"].apply(Fault(latency_seconds=TOO_LONG_SECONDS))
        rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_OPEN)
        load.run_for(4.0)
        closings = rig.server.metric("pretrade_breaker_transitions_total", replica="primary", state="closed")
        rig.proxies["primary"].heal()
        rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_CLOSED)
    assert closings == 0
    assert {call.status for call in load.calls()} == {"OK"}
    seen(summary(load.calls()))
    seen(rig.check())


@pytest.mark.fault(
    "A13",
    "Replies of a replica arrive long after their callers gave up",
    "The breaker ignores them, and the audit records timeouts. Nothing leaks.",
)
def test_answers_that_come_late_change_nothing(open_rig: OpenRig, seen: Seen) -> None:
    rig = open_rig(ROOMY | {"BREAKER__CONSECUTIVE_FAILURES": "3"}, proxied=("primary",))
    proxy = rig.proxies["primary"]
    with rig.load(RATE):
        proxy.apply(HALF_OPEN)
        rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_OPEN)
        assert rig.server.replica("primary").abandoned > 0
        moves = len(rig.server.log("breaker"))
        proxy.heal()
        eventually(lambda: rig.server.replica("primary").abandoned, lambda abandoned: abandoned == 0)
        # Half-open and closed by probes alone: what came late moved nothing.
        rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_CLOSED)
        assert len(rig.server.log("breaker")) >= moves + 2
    assert {call.status for call in rig.calls()} == {"OK"}
    checked = rig.check()
    late = [packet for packet, _ in rig.server.audited() if any(one.outcome == "timeout" for one in packet.attempts)]
    assert late
    log = rig.server.log_path.read_text()
    assert "never retrieved" not in log
    assert "Traceback" not in log
    seen(f"{len(late)} decisions whose first attempt was late; {checked}")
