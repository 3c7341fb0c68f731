"""Two regions that both decide: one is lost, with everything that was under way there, and comes back."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support.decision_server import DecisionServer
from support.figures import Figure
from support.harness import INSTRUMENTS, eventually
from support.rig import ROOMY, ROOMY_SECONDS, OpenRig

from loadtest.generators.measurement import percentile
from loadtest.studies.failover import Call, run

pytestmark = [pytest.mark.stack, pytest.mark.long]
Seen = Callable[[str], None]
RATE, SECONDS, LOST_AT, BACK_AT = 60.0, 35.0, 5.0, 10.0
"""A server in Envoy takes 5 s to start, and on a busy machine three times that."""
QUICKLY_SECONDS = 0.4


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


def reached(calls: list[Call], seconds: float) -> None:
    """Waits until the orders that are due at this instant have ended."""
    eventually(lambda: max((call.due for call in list(calls)), default=0.0), lambda due: due >= seconds)
