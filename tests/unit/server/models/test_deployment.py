"""A version on the endpoints of a pool: some of them may not take it; in virtual time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.scripted_replica import ScriptedReplica, answers
from support.virtual_time import until

from pretrade.admin.v1 import admin_pb2
from server.inference.pool import Pool
from server.inference.wire import ModelIdentity
from server.models.deployment import Deployment, DeploymentError
from server.models.management import LoadError

OLD, NEW = "aa" * 8, "bb" * 8


class Loader:
    """Loads what it is asked to, but for endpoints without memory."""

    def __init__(self) -> None:
        self.full: set[str] = set()
        self.loaded: list[str] = []

    def manages(self, _replica: str) -> bool:
        return True

    async def load(self, replica: Any, record: Any) -> None:
        if replica.name in self.full:
            raise LoadError(f"{replica.name}: no memory")
        self.loaded.append(f"{replica.name}/{record.version}")

    async def make_default(self, _replica: object, _version: str) -> None: ...
    async def unload(self, _replica: object, _version: str) -> None: ...


class Registry:
    def usable(self, version: str) -> Any:
        return SimpleNamespace(version=version)

    def set_alias(self, _alias: str, _version: str) -> None: ...


class World:
    """A pool of primaries and one secondary, and the deployment on them."""

    def __init__(self, primaries: int) -> None:
        clock = asyncio.get_running_loop().time
        self.primaries = [ScriptedReplica(f"primary-{one}", answers(0.75)) for one in range(1, primaries + 1)]
        self.secondary = ScriptedReplica("secondary", answers(0.75))
        self.secondary.model = ModelIdentity("champion", OLD, 0.5, 0)
        self.pool = Pool("primary", self.primaries, lambda: 0.0)
        self.loader = Loader()

        async def set_champion(version: str, *_: object) -> admin_pb2.Change:
            self.deployment.apply(version)
            return admin_pb2.Change()

        self.deployment = Deployment(
            cast(Any, Registry()), cast(Any, self.loader), (self.pool, self.secondary), None, set_champion, 60.0, clock
        )

    def wanted(self) -> list[str | None]:
        return [one.wanted_version for one in self.primaries]


async def test_an_endpoint_that_cannot_load_the_new_champion_is_ejected_until_it_can() -> None:
    world = World(4)
    world.loader.full = {"primary-2", "primary-4"}
    await world.deployment.make_champion(NEW, "ann", "better")
    await until(lambda: world.wanted() == [NEW, None, NEW, None])
    await until(lambda: [bool(one.ejected) for one in world.primaries] == [False, True, False, True])
    assert world.primaries[1].ejected == f"does not serve model {NEW}"
    assert not world.primaries[1].available
    assert world.pool.available
    world.loader.full = set()
    await until(lambda: world.wanted() == [NEW] * 4)
    assert all(one.available for one in world.primaries)
    world.deployment.close()


async def test_a_version_that_most_of_a_pool_cannot_load_does_not_become_the_champion() -> None:
    world = World(4)
    world.loader.full = {"primary-1", "primary-2", "primary-3"}
    with pytest.raises(LoadError, match="primary-1: no memory"):
        await world.deployment.make_champion(NEW, "ann", "better")
    assert world.wanted() == [None] * 4
    assert not any(one.ejected for one in world.primaries)


async def test_a_role_with_one_endpoint_must_load_it() -> None:
    world = World(2)
    world.loader.full = {"secondary"}
    with pytest.raises(LoadError, match="secondary"):
        await world.deployment.make_champion(NEW, "ann", "better")
    assert world.loader.loaded == []


async def test_the_last_endpoint_of_a_pool_is_not_ejected() -> None:
    world = World(2)
    world.loader.full = {"primary-1", "primary-2"}
    world.deployment.apply(NEW)  # another server promoted it
    await until(lambda: any(one.ejected for one in world.primaries))
    await asyncio.sleep(30)
    assert sum(bool(one.ejected) for one in world.primaries) == 1
    assert world.pool.available
    world.deployment.apply("")
    assert not any(one.ejected for one in world.primaries), "what they serve decides again"
    world.deployment.close()


async def test_a_model_that_shares_its_replicas_gets_its_first_champion_and_the_default_one_waits_for_an_answer() -> (
    None
):
    world = World(2)
    world.secondary.model = None
    with pytest.raises(DeploymentError, match="no champion has answered yet"):
        await world.deployment.make_champion(NEW, "ann", "the first")
    world.deployment._may_be_first = True
    await world.deployment.make_champion(NEW, "ann", "the first")
    await until(lambda: world.wanted() == [NEW, NEW])
    assert world.deployment.champion_version == NEW
    world.deployment.close()
