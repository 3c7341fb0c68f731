"""Writes changed feature vectors to Redis, every few milliseconds."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Final

import structlog
from redis.exceptions import RedisError

from feature_cache.backoff import Backoff
from feature_cache.store.cluster import ClusterFeatureStore, PartialWriteError
from feature_cache.store.vectors import FeatureStore
from feature_cache.worker.consumer import MarketEventConsumer
from feature_cache.worker.engines import Engines

_PING_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = (0.05, 1.0)

_log = structlog.get_logger(__name__)


class FeatureWriter:
    """Conflates: however many events an instrument had since the last write, its newest vector is written once.

    While Redis is away the engines go on; the newest vectors are written when it is back.

    A write begins as soon as something has changed, but not before the interval since the last one has passed.

    Args:
        store: Where the vectors go.
        engines: Where they come from.
        consumer: Learns how far what has been written reaches.
        interval_seconds: From the beginning of a write to that of the next, at least.
        monotonic: Seconds on a clock that never jumps.
    """

    def __init__(
        self,
        store: FeatureStore | ClusterFeatureStore,
        engines: Engines,
        consumer: MarketEventConsumer,
        interval_seconds: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._engines = engines
        self._consumer = consumer
        self._interval = interval_seconds
        self._monotonic = monotonic
        self._began = -math.inf
        self.problem: str | None = "redis has not answered yet"
        """Why the newest vectors may not be in Redis, for people; None when they are."""
        self.written = 0
        """Vectors written."""
        self.refused = 0
        """Vectors that Redis did not take because another worker had written newer ones."""
        self.failures = 0
        """Writes and pings that failed."""

    async def run(self) -> None:
        """Writes for ever, through any outage of Redis; ends only by cancellation."""
        backoff = Backoff(*_RETRY_SECONDS)
        while True:
            try:
                await self._write()
            except (RedisError, OSError) as error:
                self.failures += 1
                if self.problem is None:
                    _log.warning("worker.redis_lost", error=repr(error))
                self.problem = f"redis: {error!r}"
                if isinstance(error, PartialWriteError):
                    backoff.reset()  # the other nodes' instruments must not wait for the one that is away
                await asyncio.sleep(backoff.next_pause())
                continue
            if self.problem is not None:
                _log.info("worker.redis_reached")
            self.problem = None
            backoff.reset()
            await self._wait_for_progress()

    async def _write(self) -> None:
        engines = self._engines
        engines.progress.clear()
        self._began = self._monotonic()
        async with engines.writing:
            positions = engines.positions()
            snapshots = engines.take_changed()
            events = engines.delays.take_unwritten()
            try:
                if snapshots:
                    self.refused += await self._store.write(snapshots)
                else:
                    await self._store.check()
            except PartialWriteError as error:
                engines.delays.put_back(events)
                engines.put_back(error.unwritten)
                self.refused += error.refused
                self.written += len(snapshots) - len(error.unwritten)
                raise
            except BaseException:
                engines.delays.put_back(events)
                engines.put_back(snapshots)
                raise
            self.written += len(snapshots)
            engines.delays.all_written(events)
            self._consumer.written = positions

    async def _wait_for_progress(self) -> None:
        await asyncio.sleep(self._began + self._interval - self._monotonic())
        try:
            async with asyncio.timeout(_PING_SECONDS):
                await self._engines.progress.wait()
        except TimeoutError:
            pass  # nothing came: time to see whether Redis is still there
