"""How long models may still decide: told by the newest instant of the market."""

from __future__ import annotations

import numpy as np
from support.cases import Clock
from support.scripted_replica import ScriptedReplica, answers

from feature_cache import features
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from server.inference.wire import ModelIdentity
from server.models.expiry import ModelExpiry
from server.models.metrics import of_expiry

NOW = 1_800_000_000


def vector(instrument: str, market_seconds: int) -> bytes:
    values = np.zeros(features.N_FEATURES, dtype=np.float32)
    at, published = market_seconds * 10**9, NOW * 10**9
    return encode(FeatureSnapshot(instrument, 1, at, at, at, published, 0, 99.0, 101.0, BookState.VALID, values))


def test_the_newest_instant_of_the_market_counts_and_the_grace_is_added() -> None:
    cache = FeatureCache(
        "redis://unused", FeatureCacheSettings(), ("A.SIM", "B.SIM"), monotonic=Clock(), wall_ns=lambda: NOW * 10**9
    )
    grace = [0.0]
    expiry = ModelExpiry(cache, lambda: grace[0])
    assert expiry.left_seconds(2_000) is None, "no market is known"
    assert cache.accept(vector("A.SIM", 1_000))
    assert expiry.left_seconds(2_000) == 1_000.0
    assert cache.accept(vector("B.SIM", 2_500))
    assert expiry.left_seconds(2_000) == -500.0
    grace[0] = 600.0
    assert expiry.left_seconds(2_000) == 100.0
    assert expiry.left_seconds(0) is None, "it does not expire"


async def test_the_metric_is_of_replicas_whose_model_expires_and_of_no_others() -> None:
    cache = FeatureCache(
        "redis://unused", FeatureCacheSettings(), ("A.SIM",), monotonic=Clock(), wall_ns=lambda: NOW * 10**9
    )
    assert cache.accept(vector("A.SIM", 1_000))
    replicas = [ScriptedReplica(name, answers(0.5)) for name in ("primary", "secondary", "challenger")]
    for replica, expires_at in zip(replicas, (900, 0), strict=False):  # the challenger has not answered yet
        replica.model = ModelIdentity("champion", "aa" * 8, 0.5, expires_at)
    (family,) = of_expiry(replicas, ModelExpiry(cache, lambda: 0.0))
    assert [(one.labels["replica"], one.value) for one in family.samples] == [("primary", -100.0)]
