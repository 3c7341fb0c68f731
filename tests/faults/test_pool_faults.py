"""Endpoints of one role that die or grow slow: the others of the role answer, and nobody else need.

The endpoints are scripted HTTP/2 peers that speak TorchServe's protocol, so that four of them cost no four TorchServes;
the secondary is a real one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import pytest
from support.figures import Figure
from support.harness import ROOMY, eventually
from support.open_loop import summary
from support.rig import OpenRig, wait_for_more
from support.scripted_peer import PeerCall, ScriptedPeer, scored

from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack

RATE: Final = 50.0
SLOW_SECONDS: Final = 0.2

Seen = Callable[[str], None]


def sound(call: PeerCall) -> None:
    call.reply(scored(call.rows))


def slow(call: PeerCall) -> None:
    threading.Event().wait(SLOW_SECONDS)
    call.reply(scored(call.rows))


@pytest.mark.long
@pytest.mark.fault(
    "A16",
    "Two of the primary's four endpoints are killed under load, then a third grows slow",
    "No call fails. PRIMARY answers from the endpoints that are well; which one did is in the audit.",
)
def test_a_role_with_four_endpoints_loses_two_and_then_one_grows_slow(
    open_rig: OpenRig, seen: Seen, figure: Figure
) -> None:
    lives = [ExitStack() for _ in range(4)]
    with ExitStack() as end:
        for life in lives:
            end.callback(life.close)
        peers = [life.enter_context(ScriptedPeer(sound)) for life in lives]
        primary = ",".join(peer.address for peer in peers)
        rig = open_rig(ROOMY, endpoints={"primary": primary})

        def healthy() -> list[str]:
            names = [f"primary-{number}" for number in (1, 2, 3, 4)]
            return [name for name in names if rig.server.replica(name).healthy]

        def rows() -> list[int]:
            return [rig.server.replica(f"primary-{number}").rows for number in (3, 4)]

        eventually(healthy, lambda found: len(found) == 4)
        with rig.load(RATE) as load:
            wait_for_more(load, 50)
            for life in lives[:2]:
                life.close()
            eventually(healthy, ["primary-3", "primary-4"].__eq__)
            wait_for_more(load, 50)
            known = len(load.calls())
            peers[2].script, slow_since = slow, time.monotonic_ns()
            wait_for_more(load, 25)
            before = rows()
            wait_for_more(load, 100)
            of_slow, of_sound = (after - was for after, was in zip(rows(), before, strict=True))
        calls = load.calls()
        assert {call.status for call in calls} == {"OK"}
        sources = [call.decision.source for call in calls if call.decision]
        assert set(sources) <= {pb.SOURCE_PRIMARY, pb.SOURCE_SECONDARY}
        assert sources[:known].count(pb.SOURCE_PRIMARY) > 0.8 * known, "two endpoints are enough for the role"
        assert of_slow < of_sound / 4
        rig.server.drain_audit()
        arrivals = sorted(
            packet.arrived_monotonic_ns
            for packet, _ in rig.server.audited()
            if any(attempt.replica == "primary-3" for attempt in packet.attempts)
        )
        asked = [one for one in arrivals if one >= slow_since]
        last_seconds = (asked[-1] - asked[0]) / 1e9 if asked else 0.0
        figure(last_seconds <= 0.1, f"an endpoint gets no order 0.1 s after its first slow row: {last_seconds:.3f} s")
        status = rig.server.replica("primary-1")
        assert not status.healthy
        slowly = f"primary-3, slow: {len(asked)} orders in {last_seconds:.3f} s"
        seen(f"{summary(calls)}; {slowly}, then {of_slow} rows; primary-4: {of_sound}")
        seen(rig.check())
