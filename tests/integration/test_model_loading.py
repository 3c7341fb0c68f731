"""Versions come and go in a TorchServe that runs, and none is taken for another."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from local.demo.variants import inverted, recalibrated
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from server.inference.addresses import addresses_of
from server.inference.breaker import BreakerSettings
from server.inference.replica import Replica, ReplicaLimits, ReplicaSettings
from server.models.loading import ModelLoader
from server.models.management import LoadError
from server.models.registry import ModelUnusableError, Registry

pytestmark = [pytest.mark.stack, pytest.mark.long]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Registry:
    """A registry of this file's own."""
    store = tmp_path_factory.mktemp("registry")
    shutil.copytree(model_store, store, dirs_exist_ok=True)
    return Registry(store)


@pytest.fixture(scope="module")
def first(registry: Registry) -> str:
    """The version that TorchServe starts with."""
    version: str = json.loads((registry.root / "challenger.json").read_text())["version"]
    return version


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Iterator[Stack]:
    settings = LocalSettings(dir=tmp_path_factory.mktemp("loading"), model_store=registry.root)
    with Stack(settings, parts={"challenger", "secondary"}) as stack:
        yield stack


@pytest.fixture
async def replica(stack: Stack) -> AsyncIterator[Replica]:
    import asyncio  # noqa: PLC0415

    endpoint = stack.endpoints.challenger
    assert endpoint is not None
    limits = ReplicaLimits(ReplicaSettings(probe_timeout_seconds=5.0), breaker=BreakerSettings(slow_seconds=5.0))
    clock = asyncio.get_running_loop().time
    made = Replica("challenger", endpoint, "challenger", None, limits, clock=clock, random=lambda: 0.5)
    async with made as replica:
        await asyncio.wait_for(replica.proven.wait(), 30)
        yield replica


@pytest.fixture
def loader(stack: Stack) -> ModelLoader:
    return ModelLoader(stack.endpoints.management, "{version}.mar", timeout_seconds=60.0)


async def test_a_version_is_loaded_beside_the_other_and_asked_for_by_name(
    registry: Registry, first: str, replica: Replica, loader: ModelLoader
) -> None:
    second = recalibrated(registry, first)
    await loader.load(replica, registry.usable(second))
    await loader.load(replica, registry.usable(second))  # there already
    assert set(await loader.loaded(replica)) == {first, second}
    answers = {}
    for wanted in (None, second, first):
        replica.wanted_version = wanted
        answers[wanted] = (await replica._score([bytes(100)])).model.version
    assert answers == {None: first, second: second, first: first}

    await loader.make_default(replica, second)
    replica.wanted_version = None
    assert (await replica._score([bytes(100)])).model.version == second
    await loader.unload(replica, first)
    await loader.unload(replica, first)  # gone already
    assert await loader.loaded(replica) == [second]
    # And back, as after a rollback to a version that was unloaded.
    await loader.load(replica, registry.usable(first))
    await loader.make_default(replica, first)
    await loader.unload(replica, second)
    assert await loader.loaded(replica) == [first]


async def test_a_version_is_loaded_at_every_address_of_a_replica(
    stack: Stack, registry: Registry, first: str, replica: Replica
) -> None:
    addresses = [stack.endpoints.management[name] for name in ("challenger", "secondary")]

    async def resolve(_target: str) -> list[str]:
        return addresses

    both = ModelLoader({"challenger": "replicas:7071"}, "{version}.mar", 60.0, resolve)
    each = [ModelLoader({"challenger": address}, "{version}.mar", 60.0) for address in addresses]
    second = recalibrated(registry, first)
    assert await both.loaded(replica) == [], "what is at one address only may not be asked for"
    await both.load(replica, registry.usable(second))
    assert await both.loaded(replica) == [second]
    assert all([second in await loader.loaded(replica) for loader in each])
    await both.unload(replica, second)
    assert [await loader.loaded(replica) for loader in each] == [[first], []]


async def test_a_name_is_resolved_and_one_without_an_address_is_a_replica_that_did_not_load(
    registry: Registry, first: str, replica: Replica
) -> None:
    assert await addresses_of("localhost:7071") == await addresses_of("127.0.0.1:7071") == ["127.0.0.1:7071"]
    assert await addresses_of("[::1]:7071") == ["[::1]:7071"]
    nowhere = ModelLoader({"challenger": "nowhere.invalid:7071"}, "{version}.mar", 60.0)
    with pytest.raises(LoadError, match=r"nowhere\.invalid"):
        await nowhere.load(replica, registry.usable(first))


async def test_a_version_that_gives_other_scores_than_when_it_was_exported_is_refused(
    registry: Registry, first: str, replica: Replica, loader: ModelLoader
) -> None:
    second = inverted(registry, first)
    record = registry.usable(second)
    await loader.load(replica, record)
    wrong = replace(record, canned_scores=1 - record.canned_scores)
    with pytest.raises(LoadError, match="off its canned scores"):
        await loader.load(replica, wrong)
    await loader.unload(replica, second)


async def test_what_is_no_model_is_refused_and_changes_nothing(
    registry: Registry, first: str, replica: Replica, loader: ModelLoader
) -> None:
    nowhere = replace(registry.usable(first), version="00" * 8)
    with pytest.raises(LoadError, match="did not load 0000000000000000"):
        await loader.load(replica, nowhere)
    with pytest.raises(ModelUnusableError, match="wants features"):
        await loader.load(replica, replace(registry.usable(first), problem="it wants features mf0"))
    broken = "11" * 8
    with zipfile.ZipFile(registry.path(broken), "w") as archived:
        archived.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": {"modelName": "x", "modelVersion": broken}}))
    impatient = ModelLoader(loader._management, "{version}.mar", timeout_seconds=10.0)
    with pytest.raises(LoadError):
        await impatient.load(replica, replace(registry.usable(first), version=broken))
    registry.path(broken).unlink()
    assert await loader.loaded(replica) == [first]
    assert (await replica._score([bytes(100)])).model.version == first
