"""The checker of the fault tests finds what it is there to find."""

from __future__ import annotations

import pytest
from invariants import of_unheard
from open_loop import Call

from pretrade.audit.v1 import packet_pb2
from server.audit.columns import REPLIED, unconfirmed_status

ALLOWED_US = 400_000


def violations(heard: str, status: str, used_us: int) -> list[str]:
    """Of a call that heard no decision and has one row."""
    packet = packet_pb2.DecisionPacket()
    packet.decision.budget.allowed_us = ALLOWED_US
    packet.decision.budget.used_us = used_us
    return of_unheard(Call("one", 0.0, 0.0, 0.4, heard), [(packet, status)])


@pytest.mark.parametrize("heard", ["DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED", ""])
def test_a_row_of_an_unheard_reply_that_says_replied_is_found(heard: str) -> None:
    (found,) = violations(heard, REPLIED, 5_000)
    assert found.startswith("I1: one heard")


@pytest.mark.parametrize("heard", ["DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED", ""])
def test_a_row_that_says_it_is_unconfirmed_is_as_it_should_be(heard: str) -> None:
    assert not violations(heard, unconfirmed_status("cancelled"), 5_000)


def test_only_a_reply_at_the_last_moment_may_have_crossed_its_callers_deadline() -> None:
    assert not violations("DEADLINE_EXCEEDED", REPLIED, 395_000)
    assert violations("UNAVAILABLE", REPLIED, 395_000)
