"""What the benchmark compares the engine with computes the same features."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from feature_cache.engine.engine import FeatureEngine
from feature_cache.features import NAMES
from feature_cache.sources.simulator import simulate
from local.bench.feature_pandas import frame_of, measure_pandas, pandas_features
from local.bench.feature_steps import levels_of, measure_steps
from pretrade.market.v1 import market_pb2 as pb


@pytest.fixture(scope="module")
def events() -> list[pb.MarketEvent]:
    return list(simulate(3, ["BTCUSDT.SIM"], duration_seconds=45))


@pytest.mark.long
def test_pandas_and_the_engine_give_the_same_features(events: list[pb.MarketEvent]) -> None:
    computed = pandas_features(frame_of(events)).to_numpy(dtype=np.float64)
    engine = FeatureEngine("BTCUSDT.SIM")
    compared = finite = 0
    for number, (event, following) in enumerate(itertools.pairwise(events)):
        engine.on_event(event)
        # With pandas, everything that happened at one time is known at once: of a taker's several trades, the last.
        if number >= 200 and number % 20 == 0 and following.event_time_ns != event.event_time_ns:
            ours = engine.snapshot().values
            np.testing.assert_allclose(ours, computed[number], rtol=1e-4, atol=1e-6, err_msg=f"{number}: {NAMES}")
            compared += 1
            finite += bool(np.isfinite(ours).all())
    assert compared > 200
    assert finite > 50, "the longest windows were full"


@pytest.mark.long
def test_every_step_is_measured_on_all_events(events: list[pb.MarketEvent]) -> None:
    some = events[:3000]
    steps = {step.name: step for step in [*measure_steps(some), *measure_pandas(some)]}
    assert steps["parse"].count == steps["book and windows"].count == len(some)
    assert steps["book and windows"].levels == levels_of(some) > len(some)
    assert all(0 < step.median_us <= step.p99_us for step in steps.values())
