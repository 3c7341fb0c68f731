"""Steering of the endpoints of one role: each by itself, and all of them together."""

from __future__ import annotations

import asyncio

from support.scripted_replica import ScriptedReplica, answers

from server.control.subjects import OFF, ON, breaker_subjects, drain_subjects
from server.inference.breaker import Mode
from server.inference.pool import Pool

OPEN, AUTO, CLOSED = Mode.FORCED_OPEN.value, Mode.AUTOMATIC.value, Mode.FORCED_CLOSED.value


def pool() -> Pool:
    replicas = [ScriptedReplica(f"primary-{number}", answers(0.75)) for number in (1, 2)]
    return Pool("primary", replicas, lambda: 0.0)


async def test_a_role_with_one_endpoint_is_steered_by_its_name_alone() -> None:
    replica = ScriptedReplica("secondary", answers(0.75))
    assert list(breaker_subjects([replica])) == ["breaker/secondary"]
    assert list(drain_subjects([replica])) == ["drain/secondary"]


async def test_the_breakers_of_a_role_are_forced_together_but_for_those_that_have_a_mode_of_their_own() -> None:
    role = pool()
    subjects = breaker_subjects([role])
    assert list(subjects) == ["breaker/primary-1", "breaker/primary-2", "breaker/primary"]

    def modes() -> list[str]:
        return [replica.breaker.mode.value for replica in role.replicas]

    subjects["breaker/primary-1"].apply(CLOSED, None)
    subjects["breaker/primary"].apply(OPEN, None)
    assert modes() == [CLOSED, OPEN]
    subjects["breaker/primary-1"].apply(AUTO, None)
    assert modes() == [OPEN, OPEN], "what was said of all holds for it now"
    subjects["breaker/primary-2"].apply(CLOSED, 60.0)
    subjects["breaker/primary"].apply(AUTO, None)
    assert modes() == [AUTO, CLOSED]


async def test_a_forced_mode_of_a_role_ends_with_its_time() -> None:
    role = pool()
    breaker_subjects([role])["breaker/primary"].apply(OPEN, 60.0)
    assert not role.available
    for replica in role.replicas:
        replica.breaker._clock = lambda: asyncio.get_running_loop().time() + 61.0
    assert role.available


async def test_a_role_is_drained_together_and_an_endpoint_stays_drained_that_was_before() -> None:
    role = pool()
    subjects = drain_subjects([role])

    def drained() -> list[bool]:
        return [replica.drained for replica in role.replicas]

    subjects["drain/primary-2"].apply(ON, None)
    assert drained() == [False, True]
    subjects["drain/primary"].apply(ON, None)
    assert drained() == [True, True]
    subjects["drain/primary"].apply(OFF, None)
    assert drained() == [False, True]
    subjects["drain/primary-2"].apply(OFF, None)
    assert drained() == [False, False]
