"""Pushing to a Feast that is not there, and what a push says."""

from __future__ import annotations

import asyncio
import json

import numpy as np

from feature_cache.engine.engine import FeatureEngine
from feature_cache.features import NAMES
from feature_cache.sources.simulator import simulate
from feature_cache.worker.engines import Engines
from feature_cache.worker.feast_push import FeastPush, to_request
from local.stack.ports import free_ports

INSTRUMENTS = ("BTCUSDT.SIM", "ETHUSDT.SIM")


def test_a_push_is_a_frame_whose_undefined_features_are_null() -> None:
    engine = FeatureEngine("BTCUSDT.SIM")
    for event in simulate(7, ["BTCUSDT.SIM"], duration_seconds=2):
        engine.on_event(event)
    snapshot = engine.snapshot()
    frame = json.loads(to_request([snapshot]))["df"]
    found = np.array([np.nan if frame[name] == [None] else frame[name][0] for name in NAMES], np.float32)
    np.testing.assert_array_equal(found, snapshot.values)
    assert frame["ret_30s_bps"] == [None], "two seconds are not enough"
    assert frame["event_timestamp"][0].endswith("+00:00")


async def test_a_feast_that_is_away_is_counted_and_harms_nothing() -> None:
    engines = Engines(max_instruments=10)
    engines.assign(0, 0, 0)
    for offset, event in enumerate(simulate(7, INSTRUMENTS, duration_seconds=1)):
        engines.take(0, offset, event.instrument.encode(), event.SerializeToString())
    push = FeastPush(f"http://127.0.0.1:{free_ports(1)[0]}", engines, interval_seconds=0.01)
    task = asyncio.create_task(push.run())
    async with asyncio.timeout(20):
        while not push.failures:  # noqa: ASYNC110 - a plain attribute
            await asyncio.sleep(0.01)
    assert not task.done()
    assert push.pushed == 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
