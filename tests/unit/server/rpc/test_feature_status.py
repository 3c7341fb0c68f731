"""The status says of each feature set that models take who takes it, what the worker gives, and what was missing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from support.cases import Clock
from support.guest_sets import ALL, MIXED, RECORDED, know

from feature_cache.features import MF1
from feature_cache.store.codec import BookState, FeatureSnapshot
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from pretrade.admin.v1 import admin_pb2 as pb
from server.decision import metrics
from server.decision.other_sets import OtherSets
from server.rpc.feature_status import FeatureStatuses, MarketParts

NAMES = ("A.SIM", "B.SIM")


def cache_of(feature_set: Any, clock: Clock) -> FeatureCache:
    return FeatureCache(
        "redis://unused", FeatureCacheSettings(), NAMES, feature_set, monotonic=clock, wall_ns=lambda: 0
    )


def says(cache: FeatureCache, name: str, age: float, state: BookState = BookState.VALID) -> None:
    vector = np.zeros(len(cache.feature_set), dtype=np.float32)
    snapshot = FeatureSnapshot(name, 7, 0, 0, 0, 0, 0, 99.0, 101.0, state, vector, cache.feature_set)
    cast(Any, cache)._entries[name] = SimpleNamespace(snapshot=snapshot, age_seconds=lambda now: age)


def samples(others: OtherSets, clock: Clock) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in metrics.of_sets(others, NAMES, clock)
        for sample in family.samples
    }


def test_each_set_that_a_model_takes_is_shown_with_its_computed_features_and_what_was_missing(
    monkeypatch: Any,
) -> None:
    know(monkeypatch, *ALL)
    clock = Clock()
    others = OtherSets(
        lambda: {"default": [MF1], "one": [RECORDED], "two": [RECORDED, MIXED]},
        lambda one: cache_of(one, clock),
        1.0,
        clock,
    )
    statuses = FeatureStatuses(
        MarketParts(cache_of(MF1, clock), cast(Any, None), NAMES, max_feature_age_seconds=1.0, other_sets=others), clock
    )
    assert (list(statuses.of_sets()), samples(others, clock)) == ([], {}), "no model was looked at"
    others.look()
    says(others.caches["mixed"], "A.SIM", 0.25)
    says(others.caches["mixed"], "B.SIM", 2.0)
    says(others.caches["recorded"], "B.SIM", 0.5, BookState.UNKNOWN)
    others.missing["recorded", "mixed"] = 4
    others.missing["mixed", "caller"] = 3
    recorded, mixed = statuses.of_sets()
    assert (recorded.feature_set, list(recorded.models)) == (RECORDED.version, ["one", "two"])
    assert (mixed.feature_set, list(mixed.models)) == (MIXED.version, ["two"])
    assert [(one.part, one.orders) for one in recorded.missing] == [("mixed", 4)]
    assert [(one.part, one.orders) for one in mixed.missing] == [("caller", 3)]

    def computed(status: pb.FeatureSetStatus) -> set[tuple[str, str, str]]:
        return {(one.vector_version, one.instrument, one.problem) for one in status.computed}

    of_mixed = {(MIXED.version, "A.SIM", ""), (MIXED.version, "B.SIM", "stale")}
    own = {(RECORDED.version, "A.SIM", "no features"), (RECORDED.version, "B.SIM", "book unknown")}
    assert (computed(mixed), computed(recorded)) == (of_mixed, of_mixed | own), "RECORDED copies from MIXED"
    first = next(one for one in mixed.computed if one.instrument == "A.SIM")
    assert (first.usable, first.age.ToNanoseconds()) == (True, 250_000_000)
    assert samples(others, clock) == {
        ("pretrade_set_feature_age_seconds", "mixed", "A.SIM"): 0.25,
        ("pretrade_set_feature_age_seconds", "mixed", "B.SIM"): 2.0,
        ("pretrade_set_feature_age_seconds", "recorded", "B.SIM"): 0.5,
        ("pretrade_set_features_present", "mixed", "A.SIM"): 1,
        ("pretrade_set_features_present", "mixed", "B.SIM"): 1,
        ("pretrade_set_features_present", "recorded", "A.SIM"): 0,
        ("pretrade_set_features_present", "recorded", "B.SIM"): 1,
        ("pretrade_set_rows_missing_total", "recorded", "mixed"): 4,
        ("pretrade_set_rows_missing_total", "mixed", "caller"): 3,
    }
