"""When the writer writes, on a clock that the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

from redis.exceptions import RedisError
from support.waiting import until

from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.worker.engines import Engines
from feature_cache.worker.writer import FeatureWriter

HOUR = 3600.0


class Store:
    """Takes vectors; each write takes as long as the test wants."""

    def __init__(self) -> None:
        self.sequences: list[int] = []
        self.answers = asyncio.Semaphore(0)
        self.fails = False

    async def write(self, snapshots: Iterable[FeatureSnapshot]) -> int:
        self.sequences += [snapshot.sequence for snapshot in snapshots]
        await self.answers.acquire()
        if self.fails:
            raise RedisError("no")
        return 0

    async def check(self) -> None:
        pass


class Bench:
    def __init__(self) -> None:
        self.now = 0.0
        self.store = Store()
        self.engines = Engines(max_instruments=3)
        self.engines.assign(0, 0, 0)
        self._events = enumerate(simulate(1, ["A.SIM"], duration_seconds=5))
        consumer = cast(Any, SimpleNamespace(written={}))
        self.writer = FeatureWriter(cast(Any, self.store), self.engines, consumer, HOUR, lambda: self.now)

    def change(self) -> None:
        offset, event = next(self._events)
        self.engines.take(0, offset, event.instrument.encode(), event.SerializeToString())
        self.engines.progress.set()

    @property
    def written(self) -> int:
        """Events that are counted as written."""
        return int(self.engines.delays.written.counts.sum())


@asynccontextmanager
async def writing() -> AsyncIterator[Bench]:
    bench = Bench()
    bench.change()
    task = asyncio.create_task(bench.writer.run())
    try:
        yield bench
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def turns() -> None:
    """Lets everybody do what can be done now."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_change_after_the_interval_is_written_at_once_however_long_the_last_write_took() -> None:
    async with writing() as bench:
        await until(lambda: len(bench.store.sequences) == 1)
        bench.now += HOUR
        bench.store.answers.release()
        await turns()
        bench.change()
        await until(lambda: len(bench.store.sequences) == 2)


async def test_a_change_within_the_interval_waits_for_its_end() -> None:
    async with writing() as bench:
        await until(lambda: len(bench.store.sequences) == 1)
        bench.now += HOUR / 2
        bench.store.answers.release()
        await until(lambda: bench.written == 1)
        bench.change()
        await turns()
        assert len(bench.store.sequences) == 1


async def test_events_count_as_written_when_redis_has_them_and_of_a_failed_write_with_the_next() -> None:
    async with writing() as bench:
        await until(lambda: len(bench.store.sequences) == 1)
        bench.change()
        assert bench.written == 0
        bench.store.fails = True
        bench.store.answers.release()
        await until(lambda: len(bench.store.sequences) == 2)
        assert bench.written == 0
        bench.store.fails = False
        bench.store.answers.release()
        await until(lambda: bench.written == 2)
