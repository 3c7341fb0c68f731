"""The event loop's own delays, in real time: a stall is something that blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from support.scripted_replica import ScriptedReplica, answers

from server.inference.batcher import BatcherSettings
from server.inference.breaker import BreakerSettings
from server.inference.outcome import Outcome
from server.inference.rows import Scored
from server.timing.loop_lag import LoopLag


@asynccontextmanager
async def measured() -> AsyncIterator[LoopLag]:
    lag = LoopLag(asyncio.get_running_loop().time)
    task = asyncio.create_task(lag.run())
    await asyncio.sleep(0)
    yield lag
    task.cancel()


async def test_a_stall_is_measured_and_remembered() -> None:
    clock = asyncio.get_running_loop().time
    async with measured() as lag:
        before = clock()
        time.sleep(0.2)  # noqa: ASYNC251 - blocking the loop is the point
        assert 0.15 < lag.stalled_seconds(before) <= clock() - before, "while the loop has not come round yet"
        await asyncio.sleep(0.05)
        assert 0.15 < lag.stalled_seconds(before) <= clock() - before
        assert lag.stalls >= 1
        counts, _ = lag.delays.buckets()
        assert dict(counts)["0.1"] < dict(counts)["+Inf"]
        assert lag.p95 > 0.15, "of a few delays the longest"
        assert lag.p99 >= lag.p95
        assert lag.stalled_seconds(clock()) == 0


async def test_what_the_loop_slept_is_not_held_against_a_replica() -> None:
    loop = asyncio.get_running_loop()
    async with measured() as lag:
        # Delays of up to 20 ms are no stalls, and on a busy machine there are several: patience has room for them.
        settings = BatcherSettings(min_patience_seconds=0.4, max_patience_seconds=0.4)
        breaker = BreakerSettings(consecutive_failures=1, minimum_calls=1, slow_seconds=0.4)
        replica = ScriptedReplica("primary", answers(0.5, after_seconds=0.1), settings, breaker, lag.stalled_seconds)
        row = replica.batcher.submit(b"row", loop.time() + 10)
        await asyncio.sleep(0.002)
        time.sleep(1.5)  # noqa: ASYNC251 - as above
        assert isinstance(await row, Scored)
        assert replica.outcomes == {Outcome.SUCCESS: 1}
        assert replica.breaker.passes
        assert replica.latency.p95 < 0.5
        await replica.batcher.close()


async def test_a_probe_that_timed_out_while_the_loop_stood_still_says_nothing() -> None:
    async with measured() as lag:
        breaker = BreakerSettings(consecutive_failures=1)
        replica = ScriptedReplica("primary", answers(0.5, after_seconds=0.55), None, breaker, lag.stalled_seconds)
        probing = replica.start_probing()
        await asyncio.sleep(0.01)
        time.sleep(0.52)  # noqa: ASYNC251 - longer than a probe may take
        async with asyncio.timeout(5):
            await asyncio.sleep(0.1)
        probing.cancel()
        assert replica.outcomes[Outcome.TIMEOUT] == 0
        assert replica.breaker.passes
        await replica.batcher.close()
