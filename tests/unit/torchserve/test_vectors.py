"""The vector of a set in a recording is the one that a worker and a server make of the same events."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from support.cases import Clock, new_case
from support.guest_sets import ALL, FILE, MIXED, RECORDED, know
from support.waiting import until

from feature_cache.feature_set import ROW, FeatureSet
from feature_cache.feature_sets import parts_of
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.store.l1 import CachedFeatures, FeatureCache, FeatureCacheSettings
from feature_cache.worker.engines import Engines
from feature_cache.worker.guests import Guest, Guests, launcher
from pretrade.decision.v1 import decision_pb2 as pb
from server.decision.other_sets import OtherSets
from server.inference.model_names import DEFAULT
from torchserve.point_in_time import known_at

NAME = "A.SIM"
EVENTS = list(itertools.islice(simulate(1, [NAME]), 400))
AGE_SECONDS = 0.125


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, *ALL)


def test_a_set_has_a_part_of_each_source_but_the_callers() -> None:
    assert [(part.source, part.places.tolist()) for part in parts_of(RECORDED)] == [
        ("mf1", [0, 2, 4]),
        ("recorded", [1, 5]),
        ("mixed", [3]),
    ]
    assert [part.source for part in parts_of(MIXED)] == ["mf1", "mixed"]


@pytest.mark.long
@pytest.mark.parametrize("side", [pb.SIDE_BUY, pb.SIDE_SELL])
async def test_training_has_the_vector_that_worker_and_server_make_to_the_bit(side: pb.Side.ValueType) -> None:
    guests = Guests([Guest(one, launcher(one, FILE)) for one in ALL])
    engines = Engines(3, guests)
    engines.assign(0, 0, 0)
    for offset, event in enumerate(EVENTS, start=1):
        engines.take(0, offset, event.instrument.encode(), event.SerializeToString())
    (of_mf1,) = engines.take_changed()
    published: dict[FeatureSet, FeatureSnapshot] = {}

    def all_published() -> bool:
        for guest in guests.all:
            published.update((snapshot.feature_set, snapshot) for _, snapshot in guest.exchange())
        return len(published) == 2 and all(one.sequence == of_mf1.sequence for one in published.values())

    try:
        await until(all_published)
    finally:
        guests.close()

    def follow(feature_set: FeatureSet) -> FeatureCache:
        cache = FeatureCache("redis://unused", FeatureCacheSettings(), [NAME], feature_set, wall_ns=lambda: 0)
        entry = SimpleNamespace(snapshot=published[feature_set], age_seconds=lambda now: AGE_SECONDS)
        cast(Any, cache)._entries["BTCUSDT.BINANCE"] = cast(CachedFeatures, entry)
        return cache

    clock = Clock()
    others = OtherSets(lambda: {DEFAULT: [RECORDED]}, follow, max_age_seconds=1.0, clock=clock)
    others.look()
    case = new_case(side=side, sequence=1)
    case.snapshot, case.snapshot_age_seconds = of_mf1, AGE_SECONDS
    others.fill_in([case], clock.now)
    row = case.row_of(RECORDED)
    assert row is not None
    at_ns = of_mf1.event_time_ns + round(AGE_SECONDS * 1e9)
    trained = known_at(EVENTS, [NAME], np.array([at_ns]), RECORDED)
    trained = RECORDED.for_sell(trained) if side == pb.SIDE_SELL else trained
    assert np.isfinite(trained).all()
    np.testing.assert_array_equal(np.frombuffer(row, ROW), trained[0])
