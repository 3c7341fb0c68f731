"""How long models may still decide: told by the newest instant of the market."""

from __future__ import annotations

import numpy as np
from support.cases import Clock

from feature_cache import features
from feature_cache.store.codec import BookState, FeatureSnapshot, encode
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from server.models.expiry import ModelExpiry

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
