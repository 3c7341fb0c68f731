"""Endpoints that a name leads to: they are tried, join, and are let go without a row lost; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import numpy as np
import pytest
from support.scripted_replica import Script, ScriptedReplica, answers, fails
from support.virtual_time import until

from feature_cache.ending import end
from feature_cache.features import N_FEATURES
from server.control.subjects import breaker_subjects, drain_subjects
from server.inference.batcher import BatcherSettings
from server.inference.breaker import Mode
from server.inference.members import MOST_MEMBERS, Members
from server.inference.outcome import Outcome
from server.inference.pool import Pool
from server.inference.rows import Scored
from server.models.deployment import Deployment

NAME = "models.test:7070"
ROW = np.ones(N_FEATURES, dtype="<f4").tobytes()
NEW = "bb" * 8
PATIENT = BatcherSettings(min_patience_seconds=9, max_patience_seconds=9)


class Endpoint(ScriptedReplica):
    """Opens no connection; knows whether it was closed."""

    closed = False

    async def __aenter__(self) -> Endpoint:
        self._prober = self.start_probing()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed = True
        await end([self._prober])
        await self.batcher.close()


class World:
    """A name, the servers behind its addresses, and the pool that follows it."""

    def __init__(self, *addresses: str) -> None:
        self.found: list[str] | OSError = [self.address(one) for one in addresses]
        self.scripts: dict[str, Script] = {}
        self.made: list[Endpoint] = []
        self.lookups = 0
        self.pool = Pool("primary", (), lambda: 0.0, [f"primary-{one}" for one in range(1, MOST_MEMBERS + 1)])
        self.members = Members(self.pool, NAME, self.make, self.resolve)

    @staticmethod
    def address(one: str) -> str:
        return f"10.0.0.{one}:7070"

    def lead_to(self, *addresses: str) -> None:
        self.found = [self.address(one) for one in addresses]

    def make(self, name: str, address: str) -> Endpoint:
        made = Endpoint(name, self.scripts.get(address, answers(0.75)), PATIENT)
        made.endpoint = address
        self.made.append(made)
        return made

    async def resolve(self, target: str) -> list[str]:
        assert target == NAME
        self.lookups += 1
        await asyncio.sleep(0.01)
        if isinstance(self.found, OSError):
            raise self.found
        return self.found

    @property
    def names(self) -> dict[str, str]:
        """The endpoints that get rows: the ends of their addresses by name."""
        return {one.name: one.endpoint.removeprefix("10.0.0.").removesuffix(":7070") for one in self.pool.replicas}


@asynccontextmanager
async def world(*addresses: str) -> AsyncIterator[World]:
    made = World(*addresses)
    running = asyncio.create_task(made.members.run())
    try:
        yield made
    finally:
        await end([running])
        assert all(one.closed for one in made.made)


async def later(lookups: int, w: World) -> None:
    """Waits for so many more lookups, and what follows from them."""
    wanted = w.lookups + lookups
    await until(lambda: w.lookups >= wanted)
    await asyncio.sleep(1)


async def test_each_address_is_an_endpoint_and_gets_rows_when_it_has_answered() -> None:
    async with world("1", "2", "3") as w:
        w.scripts[w.address("2")] = fails(Outcome.TRANSPORT)
        assert not w.pool.available
        await until(lambda: len(w.names) == 2)
        assert w.names == {"primary-1": "1", "primary-3": "3"}
        assert [one.name for one in w.pool.candidates] == ["primary-2"]
        await later(3, w)
        assert len(w.names) == 2
        w.made[1].script = answers(0.75)
        await until(lambda: w.names == {"primary-1": "1", "primary-2": "2", "primary-3": "3"})
        assert not w.pool.candidates


async def test_a_new_address_joins_and_one_that_is_gone_gets_no_more_rows() -> None:
    async with world("1", "2") as w:
        await until(lambda: len(w.names) == 2)
        w.lead_to("2", "3")
        await until(lambda: set(w.names.values()) == {"2", "3"})
        assert w.made[0].closed
        calls = w.made[0].calls
        await asyncio.sleep(60)
        assert w.made[0].calls == calls, "nobody asks it, not even a probe"


async def test_rows_that_wait_at_an_endpoint_that_goes_get_their_scores() -> None:
    async with world("1") as w:
        await until(lambda: len(w.names) == 1)
        (slow,) = w.pool.replicas
        cast(Endpoint, slow).script = answers(0.25, after_seconds=7.0)
        waiting = [slow.batcher.submit(ROW, asyncio.get_running_loop().time() + 60) for _ in range(3)]
        await asyncio.sleep(0.001)
        w.lead_to("2")
        await until(lambda: slow not in w.pool.replicas)
        assert not w.made[0].closed
        results = await asyncio.gather(*waiting)
        assert all(isinstance(one, Scored) and one.score == 0.25 for one in results)
        await until(lambda: w.made[0].closed)


async def test_an_endpoint_that_hangs_is_closed_all_the_same() -> None:
    async with world("1") as w:
        await until(lambda: len(w.names) == 1)
        (hung,) = w.pool.replicas
        cast(Endpoint, hung).script = answers(0.25, after_seconds=3_600)
        waiting = hung.batcher.submit(ROW, asyncio.get_running_loop().time() + 7_200)
        await asyncio.sleep(0.001)
        w.lead_to("2")
        await until(lambda: w.made[0].closed)
        assert not isinstance(await waiting, Scored)


@pytest.mark.parametrize("nothing", [[], OSError("no such name")])
async def test_a_lookup_that_finds_nothing_takes_nothing_away(nothing: Any) -> None:
    async with world("1", "2") as w:
        await until(lambda: len(w.names) == 2)
        w.found = nothing
        await later(5, w)
        assert w.names == {"primary-1": "1", "primary-2": "2"}
        w.lead_to("2")
        await until(lambda: w.names == {"primary-2": "2"})


async def test_a_name_that_leads_nowhere_at_first_is_looked_up_more_often() -> None:
    async with world() as w:
        await asyncio.sleep(2)
        assert w.lookups > 3
        w.lead_to("1")
        began = asyncio.get_running_loop().time()
        await until(lambda: len(w.names) == 1)
        assert asyncio.get_running_loop().time() - began < 1


async def test_a_name_of_an_endpoint_is_free_again_when_it_is_closed() -> None:
    async with world("1", "2") as w:
        await until(lambda: len(w.names) == 2)
        first = w.pool.replicas[0]
        cast(Endpoint, first).script = answers(0.25, after_seconds=7.0)
        waiting = first.batcher.submit(ROW, asyncio.get_running_loop().time() + 60)
        await asyncio.sleep(0.001)
        w.lead_to("2", "3")
        await until(lambda: len(w.names) == 2 and "3" in w.names.values())
        assert w.names == {"primary-2": "2", "primary-3": "3"}, "the other one still scores"
        await waiting
        await until(lambda: w.made[0].closed)
        w.lead_to("2", "3", "4")
        await until(lambda: w.names == {"primary-1": "4", "primary-2": "2", "primary-3": "3"})


async def test_addresses_beyond_the_most_are_left() -> None:
    async with world(*(f"{one:03}" for one in range(1, MOST_MEMBERS + 4))) as w:
        await until(lambda: len(w.names) == MOST_MEMBERS)
        await later(2, w)
        assert len(w.made) == MOST_MEMBERS


async def test_what_was_said_of_a_role_or_a_name_holds_for_those_that_join() -> None:
    async with world("1") as w:
        drains, breakers = drain_subjects([w.pool]), breaker_subjects([w.pool])
        await until(lambda: len(w.names) == 1)
        drains["drain/primary-2"].apply("on", None)
        breakers["breaker/primary"].apply("forced_open", None)
        w.lead_to("1", "2", "3")
        await until(lambda: len(w.names) == 3)
        assert [one.drained for one in w.pool.replicas] == [False, True, False]
        assert {one.breaker.mode for one in w.pool.replicas} == {Mode.FORCED_OPEN}
        drains["drain/primary"].apply("on", None)
        breakers["breaker/primary"].apply("automatic", None)
        w.lead_to("1", "2", "3", "4")
        await until(lambda: len(w.names) == 4)
        assert all(one.drained for one in w.pool.replicas)
        assert {one.breaker.mode for one in w.pool.replicas} == {Mode.AUTOMATIC}


class Loader:
    """Has an endpoint serve a version when it is told to."""

    def __init__(self) -> None:
        self.may = asyncio.Event()

    def manages(self, _replica: str) -> bool:
        return True

    async def load(self, replica: Any, record: Any) -> None:
        await self.may.wait()
        replica.script = answers(0.75, version=record.version)


class Registry:
    def usable(self, version: str) -> Any:
        return type("Record", (), {"version": version})()


async def test_one_that_joins_after_a_promotion_decides_nothing_before_it_serves_the_champion() -> None:
    async with world("1") as w:
        loader = Loader()
        loader.may.set()
        clock = asyncio.get_running_loop().time
        deployment = Deployment(cast(Any, Registry()), cast(Any, loader), (w.pool,), None, cast(Any, None), 60.0, clock)
        w.pool.on_join(lambda replica: deployment.join(w.pool, replica))
        await until(lambda: len(w.names) == 1)
        assert w.pool.replicas[0].available, "nothing was promoted: it decides by what it serves"
        deployment.apply(NEW)
        await until(lambda: w.pool.replicas[0].wanted_version == NEW)
        loader.may.clear()
        w.lead_to("1", "2")
        await until(lambda: len(w.names) == 2)
        newcomer = w.pool.replicas[1]
        assert not newcomer.available
        assert newcomer.ejected == f"does not serve model {NEW} yet"
        loader.may.set()
        await until(lambda: newcomer.available)
        assert newcomer.wanted_version == NEW
        deployment.close()
