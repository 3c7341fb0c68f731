"""Replicas whose processes die, hang or grow slow: who answers instead, and what it is counted as."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness import eventually
from open_loop import summary
from rig import OpenRig

from pretrade.admin.v1 import admin_pb2
from pretrade.decision.v1 import decision_pb2 as pb

pytestmark = pytest.mark.stack

RATE = 100.0

Seen = Callable[[str], None]


@pytest.mark.fault("A1", "primary killed with -9 under load", "no failed call; SECONDARY; PRIMARY after its restart")
def test_a_killed_primary_fails_no_call_and_the_secondary_answers_until_it_is_back(
    open_rig: OpenRig, seen: Seen
) -> None:
    rig = open_rig()
    with rig.load(RATE) as load:
        eventually(lambda: len(load.calls()), lambda count: count > 100)
        rig.stack["primary"].kill()
        rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_OPEN)
        opened = len(load.calls())
        eventually(lambda: len(load.calls()), lambda count: count > opened + 100)
        until = len(load.calls()) - 50
        rig.stack.restart("primary")
        rig.server.wait_for_breaker("primary", admin_pb2.BREAKER_STATE_CLOSED)
        closed = len(load.calls())
        eventually(lambda: len(load.calls()), lambda count: count > closed + 100)
    calls = load.calls()
    assert {call.status for call in calls} == {"OK"}
    during = [call.decision for call in calls[opened + 50 : until] if call.decision]
    assert {decision.source for decision in during} == {pb.SOURCE_SECONDARY}
    assert all(pb.DEGRADATION_PRIMARY_BREAKER_OPEN in decision.degradations for decision in during)
    assert {call.decision.source for call in calls[closed + 50 :] if call.decision} == {pb.SOURCE_PRIMARY}
    assert rig.server.replica("primary").outcomes["transport"] > 0
    seen(summary(calls))
    seen(rig.check())
