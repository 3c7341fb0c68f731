"""Sessions end by themselves."""

from __future__ import annotations

import pytest

from pretrade.admin.v1 import admin_pb2 as pb
from pretrade.client.credentials import ClientCredentials
from pretrade.console import sessions
from pretrade.console.calls import ServerCalls
from pretrade.console.sessions import Session, Sessions


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def session(clock: Clock, name: str = "ann", caller: pb.GetCallerResponse | None = None) -> Session:
    calls = ServerCalls("127.0.0.1:1", ClientCredentials(token="t"))
    return Session(calls, caller or pb.GetCallerResponse(name="operator-token", states_author=True), name, clock)


async def test_a_session_that_nobody_looks_at_ends(clock: Clock) -> None:
    open_ones = Sessions(clock)
    await open_ones.add(one := session(clock))
    clock.now += 1_700.0
    assert await open_ones.find(one.id) is one
    clock.now += 1_700.0
    assert await open_ones.find(one.id) is one, "it was looked at in between"
    clock.now += 1_900.0
    assert await open_ones.find(one.id) is None


async def test_everybody_logs_in_again_after_a_shift(clock: Clock) -> None:
    open_ones = Sessions(clock)
    await open_ones.add(one := session(clock))
    for _ in range(47):
        clock.now += 900.0
        assert await open_ones.find(one.id) is one
    clock.now += 1_000.0
    assert await open_ones.find(one.id) is None


async def test_there_are_never_too_many(clock: Clock) -> None:
    open_ones = Sessions(clock)
    first = session(clock)
    await open_ones.add(first)
    for _ in range(sessions._MOST):
        clock.now += 0.001
        await open_ones.add(session(clock))
    assert len(open_ones) == sessions._MOST
    assert await open_ones.find(first.id) is None
    await open_ones.end_all()
    assert not len(open_ones)


async def test_ids_and_secrets_of_sessions_differ_and_are_not_shown(clock: Clock) -> None:
    one, other = session(clock), session(clock)
    assert len({one.id, one.csrf, other.id, other.csrf}) == 4
    assert one.id not in repr(one)
    assert one.csrf not in repr(one)
    assert one.is_own(one.csrf)
    assert not one.is_own(other.csrf)
    assert not one.is_own("ä")


async def test_the_audit_names_who_the_server_knows_and_else_who_was_stated(clock: Clock) -> None:
    proven = pb.GetCallerResponse(
        name="sub-ann", roles=["operator", "viewer"], methods=["/pretrade.admin.v1.AdminService/SetFlag"]
    )
    assert session(clock, "bob", proven).author == "sub-ann"
    assert session(clock, "bob").author == "bob"
    assert session(clock, caller=proven).role == "operator"
    assert session(clock, caller=proven).may("SetFlag")
    assert not session(clock, caller=proven).may("SetChain")
    assert not session(clock, caller=proven).may("SetFlag", "AuditService")
