"""A server's copy of the feature vectors, and the vectors that tests write for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from feature_cache.features import N_FEATURES
from feature_cache.store.codec import BookState, FeatureSnapshot
from feature_cache.store.l1 import FeatureCache


def snapshot(instrument: str, sequence: int) -> FeatureSnapshot:
    """A vector of this moment, with every feature at its own index."""
    return FeatureSnapshot(
        instrument=instrument,
        sequence=sequence,
        event_time_ns=1,
        book_time_ns=1,
        trade_time_ns=1,
        publish_time_ns=time.time_ns(),
        transit_ns=0,
        bid=1.0,
        ask=2.0,
        state=BookState.VALID,
        values=np.arange(N_FEATURES, dtype=np.float32),
    )


@asynccontextmanager
async def following(cache: FeatureCache) -> AsyncIterator[FeatureCache]:
    """The cache, which follows Redis for as long as the test takes."""
    task = asyncio.create_task(cache.run())
    try:
        yield cache
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled(), "nothing but cancellation ends it"


def sequence_of(cache: FeatureCache, instrument: str) -> int:
    """The sequence of an instrument's vector; 0 when there is none."""
    entry = cache.get(instrument)
    return entry.snapshot.sequence if entry else 0
