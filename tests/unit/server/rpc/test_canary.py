"""What is listed of models: the alias of a champion is on the version that decides, and on no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from feature_cache import features
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from local.demo.variants import recalibrated
from server.inference.wire import ModelIdentity
from server.models.expiry import ModelExpiry
from server.models.registry import CANDIDATE, CARD_FILE, CARDS, EVALUATION_FILE, NOT_MEASURED, Registry
from server.rpc.canary import CanarySteering

MARKET_NS = 1_800_000_000 * 10**9
NOTHING = np.zeros(features.N_FEATURES, dtype=np.float32)


class Loader:
    """Says that nothing is loaded."""

    async def loaded(self, replica: object) -> list[str]:
        return []


@pytest.fixture
def registry(tmp_path: Path, model_store: Path) -> Registry:
    return Registry(Path(shutil.copytree(model_store, tmp_path / "store", ignore=shutil.ignore_patterns("aliases"))))


@pytest.fixture
def first(registry: Registry) -> str:
    version: str = json.loads((registry.root / "champion.json").read_text())["version"]
    return version


def steering(registry: Registry, champion: str) -> tuple[CanarySteering, Any]:
    """The part under test, and the deployment that it asks."""
    deployment = SimpleNamespace(registry=registry, champion_version=champion, loader=Loader())
    none = cast(Any, None)
    cache = FeatureCache(
        "redis://unused", FeatureCacheSettings(), ("A.SIM",), monotonic=lambda: 0.0, wall_ns=lambda: MARKET_NS
    )
    at = (MARKET_NS,) * 4
    assert cache.accept(encode(FeatureSnapshot("A.SIM", 1, *at, 0, 99.0, 101.0, BookState.VALID, NOTHING)))
    replicas = cast(Any, {"primary": SimpleNamespace(model=None), "secondary": SimpleNamespace(model=None)})
    expiry = ModelExpiry(cache, lambda: 0.0)
    made = CanarySteering(none, cast(Any, deployment), none, replicas, (1.0,), none, none, expiry)
    deployment.replicas = replicas
    return made, deployment


async def listed(steering: CanarySteering) -> dict[str, list[str]]:
    return {one.model_version: list(one.aliases) for one in (await steering.list_models()).models if one.aliases}


async def test_the_champion_is_the_version_that_decides_and_a_candidate_is_none(registry: Registry, first: str) -> None:
    candidate = recalibrated(registry, first)
    models, deployment = steering(registry, first)
    assert await listed(models) == {first: ["champion"]}, "also when no alias was ever set"
    registry.set_alias("champion", first)
    registry.set_alias(CANDIDATE, candidate)
    assert await listed(models) == {first: ["champion"], candidate: ["candidate"]}
    deployment.champion_version = candidate  # the control state names it; the registry's alias follows later
    assert await listed(models) == {candidate: ["champion"]}
    registry.set_alias("previous", first)
    assert await listed(models) == {candidate: ["champion"], first: ["previous"]}


async def test_the_champion_is_told_with_how_long_it_may_still_decide(registry: Registry, first: str) -> None:
    models, deployment = steering(registry, first)
    said = await models.champion()
    assert said is not None
    assert not said.HasField("expires_in"), "it has not answered yet"
    for expires_at, seconds in ((1_800_000_060, 60), (1_799_999_940, -60), (0, None)):
        deployment.replicas["secondary"].model = ModelIdentity("champion", first, 0.5, expires_at)
        said = await models.champion()
        assert said is not None
        assert (said.expires_in.seconds if said.HasField("expires_in") else None) == seconds


async def test_the_champion_stands_as_its_card_says(registry: Registry, first: str) -> None:
    models, deployment = steering(registry, "")
    assert await models.champion() is None, "none has answered yet"
    deployment.champion_version = first
    said = await models.champion()
    assert said is not None
    assert (said.model_version, said.standing, said.card) == (first, NOT_MEASURED, "")
    second = recalibrated(registry, first)
    card = registry.root / CARDS / second / CARD_FILE
    card.parent.mkdir(parents=True)
    card.write_text("# Model card")
    (card.parent / EVALUATION_FILE).write_text(json.dumps({"standing": {"xgboost": "does not beat the rules"}}))
    deployment.champion_version = second
    said = await models.champion()
    assert said is not None
    assert (said.model_version, said.standing, said.card) == (second, "does not beat the rules", str(card))
    (model,) = [one for one in (await models.list_models()).models if one.model_version == second]
    assert (model.kind, model.standing, model.card) == ("xgboost", "does not beat the rules", str(card))
