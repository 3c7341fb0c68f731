"""The store and the server's copy of it, on a real Redis-protocol server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from redis.asyncio import Redis
from support.followed_cache import following, sequence_of, snapshot
from support.guest_sets import MIXED, REGISTERED, know
from support.tcp_proxy import through
from support.twins import compiled_here
from support.waiting import until

from feature_cache.features import N_FEATURES
from feature_cache.store.codec import decode, encode
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from feature_cache.store.vectors import FeatureStore, connect, key_of
from local.stack.settings import LocalSettings
from local.stack.stack import Stack

BTC, ETH = "BTCUSDT.BINANCE", "ETHUSDT.BINANCE"


def settings() -> FeatureCacheSettings:
    return FeatureCacheSettings(reconcile_interval_seconds=0.2, timeout_seconds=0.3)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with connect(redis_url, 1.0) as client:
        yield client


@pytest.mark.stack
async def test_a_written_vector_is_stored_with_its_ttl_and_published(redis: Redis) -> None:
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(key_of(BTC))
        assert await pubsub.get_message(timeout=5) is not None
        store = FeatureStore(redis, ttl_seconds=7, timeout_seconds=5)
        await store.write([snapshot(BTC, 1), snapshot(ETH, 2)])
        await store.write([snapshot(BTC, 0), snapshot(BTC, 3)])
        published = [await pubsub.get_message(ignore_subscribe_messages=True, timeout=5) for _ in range(2)]
    sequences = [message and decode(message["data"]).sequence for message in published]
    assert sequences == [1, 3], "on the instrument's own channel, and only what is stored"
    stored = await redis.get("features:mf1:{BTCUSDT.BINANCE}")
    assert isinstance(stored, bytes)
    assert decode(stored).sequence == 3
    assert 6_000 < await redis.pttl(key_of(ETH)) <= 7_000


@pytest.mark.stack
async def test_an_older_vector_replaces_no_newer_one_and_anything_else_gives_way(redis: Redis) -> None:
    store = FeatureStore(redis, ttl_seconds=60, timeout_seconds=5)
    newest = (1 << 62) + (1 << 32)

    async def stored() -> int:
        packed = await redis.get(key_of(BTC))
        assert isinstance(packed, bytes)
        return decode(packed).sequence

    assert await store.write([snapshot(BTC, newest), snapshot(ETH, 2)]) == 0
    for older in (newest - 1, newest - (1 << 32), 1):
        assert await store.write([snapshot(BTC, older), snapshot(ETH, 3)]) == 1
        assert await stored() == newest
    assert await store.write([snapshot(BTC, newest)]) == 0, "the same one may be written again"
    assert await store.write([snapshot(BTC, newest + 1)]) == 0
    assert await stored() == newest + 1
    await redis.set(key_of(BTC), b"PTF1 garbage")
    await redis.delete(key_of(ETH))
    await redis.rpush(key_of(ETH), b"a list")
    assert await store.write([snapshot(BTC, 5), snapshot(ETH, 6)]) == 0
    assert await stored() == 5


@pytest.mark.stack
async def test_a_copy_starts_with_what_is_stored_and_follows_updates(redis: Redis, redis_url: str) -> None:
    store = FeatureStore(redis, ttl_seconds=60, timeout_seconds=5)
    await store.write([snapshot(BTC, 1)])
    async with following(FeatureCache(redis_url, settings(), [BTC, ETH])) as cache:
        assert cache.get(BTC) is None
        await until(lambda: cache.connected)
        assert sequence_of(cache, BTC) == 1
        await store.write([snapshot(BTC, 2), snapshot(ETH, 3)])
        await until(lambda: sequence_of(cache, ETH) == 3)
        assert sequence_of(cache, BTC) == 2
        entry = cache.get(BTC)
        assert entry is not None
        np.testing.assert_array_equal(entry.snapshot.values, np.arange(N_FEATURES, dtype=np.float32))
        assert 0 <= entry.age_seconds(time.monotonic()) < 5


@pytest.mark.stack
async def test_a_copy_gets_no_vectors_of_instruments_that_it_does_not_follow(redis: Redis, redis_url: str) -> None:
    store = FeatureStore(redis, ttl_seconds=60, timeout_seconds=5)
    async with following(FeatureCache(redis_url, settings(), [ETH])) as cache:
        await until(lambda: cache.connected)
        assert dict(await redis.pubsub_numsub(key_of(BTC), key_of(ETH))) == {
            key_of(BTC).encode(): 0,
            key_of(ETH).encode(): 1,
        }
        await store.write([snapshot(BTC, 1), snapshot(ETH, 1)])
        await until(lambda: sequence_of(cache, ETH) == 1)


@pytest.mark.stack
async def test_every_set_has_vectors_of_its_own(redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, REGISTERED)
    store = FeatureStore(redis, ttl_seconds=60, timeout_seconds=5)
    of_guest = replace(snapshot(BTC, 1), feature_set=MIXED, values=np.arange(3, dtype=np.float32))
    async with (
        following(FeatureCache(redis_url, settings(), [BTC])) as ours,
        following(FeatureCache(redis_url, settings(), [BTC], MIXED)) as theirs,
    ):
        await until(lambda: ours.connected and theirs.connected)
        await store.write([snapshot(BTC, 7)])
        await store.write([of_guest])
        await until(lambda: (sequence_of(ours, BTC), sequence_of(theirs, BTC)) == (7, 1))
        entry = theirs.get(BTC)
        assert entry is not None
        assert (entry.snapshot.feature_set, entry.snapshot.values.tolist()) == (MIXED, [0.0, 1.0, 2.0])
        assert (ours.rejected, theirs.rejected) == (0, 0)


@pytest.mark.stack
async def test_a_burst_larger_than_a_read_of_the_socket_arrives_whole(redis: Redis, redis_url: str) -> None:
    names = [f"N{number}.SIM" for number in range(1000)]
    patient = FeatureCacheSettings(reconcile_interval_seconds=30)
    async with following(FeatureCache(redis_url, patient, names)) as cache:
        await until(lambda: cache.connected)
        for sequence in (1, 2, 3):
            await FeatureStore(redis, 60, 5).write(snapshot(name, sequence) for name in names)
        await until(lambda: all(sequence_of(cache, name) == 3 for name in names))
        assert (cache.updates, cache.rejected, cache.disconnects) == (3000, 0, 0)


@pytest.mark.stack
async def test_what_redis_sends_is_plain_for_compiled_code(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_here("feature_cache.store.l1_c")
    patient = FeatureCacheSettings(reconcile_interval_seconds=30)
    async with following(FeatureCache(redis_url, patient, [BTC])) as cache:
        await until(lambda: cache.connected)
        monkeypatch.setattr(cache, "accept", lambda *_: False)
        await FeatureStore(redis, 60, 5).write([snapshot(BTC, 1)])
        await until(lambda: sequence_of(cache, BTC) == 1)
        assert cache.updates == 1


@pytest.mark.stack
async def test_a_write_after_redis_has_forgotten_the_script_succeeds(redis: Redis) -> None:
    store = FeatureStore(redis, ttl_seconds=60, timeout_seconds=5)
    for sequence in (1, 2):
        await redis.script_flush()
        assert await store.write([snapshot(BTC, sequence), snapshot(ETH, sequence)]) == 0
    assert await store.write([snapshot(ETH, 1), snapshot(BTC, 1)]) == 2


@pytest.mark.stack
async def test_an_update_whose_notification_was_lost_is_found_by_reading_again(redis: Redis, redis_url: str) -> None:
    async with following(FeatureCache(redis_url, settings(), [BTC])) as cache:
        await until(lambda: cache.connected)
        await redis.set(key_of(BTC), encode(snapshot(BTC, 5)))
        await until(lambda: sequence_of(cache, BTC) == 5)


@pytest.mark.stack
async def test_garbage_and_wrong_types_in_redis_are_no_vectors(redis: Redis, redis_url: str) -> None:
    await redis.set(key_of(BTC), b"garbage")
    await redis.rpush(key_of(ETH), b"a list")
    async with following(FeatureCache(redis_url, settings(), [BTC, ETH])) as cache:
        await until(lambda: cache.connected)
        assert cache.get(BTC) is None
        assert cache.rejected >= 1
        await redis.publish(key_of(BTC), b"more garbage")
        await redis.publish(key_of(BTC), encode(snapshot(BTC, 1)))
        await until(lambda: sequence_of(cache, BTC) == 1)
        await redis.flushall()
        assert sequence_of(cache, BTC) == 1, "it is good until its TTL"


@pytest.mark.stack
async def test_a_copy_ends_at_whatever_moment_it_is_cancelled(redis_url: str) -> None:
    busy = FeatureCacheSettings(reconcile_interval_seconds=0.002)
    for turns in range(60):
        task = asyncio.create_task(FeatureCache(redis_url, busy, [BTC]).run())
        for _ in range(turns):
            await asyncio.sleep(0.0002)
        task.cancel()
        ended, _ = await asyncio.wait([task], timeout=10)
        assert ended, f"goes on though cancelled after {turns} turns"
        assert task.cancelled()


@pytest.mark.stack
async def test_a_subscription_that_died_alone_is_made_anew(redis: Redis, redis_url: str) -> None:
    slow = FeatureCacheSettings(reconcile_interval_seconds=30)
    async with following(FeatureCache(redis_url, slow, [BTC])) as cache:
        await until(lambda: cache.connected)
        await redis.client_kill_filter(_type="pubsub")
        await until(lambda: cache.disconnects == 1 and cache.connected)
        await redis.publish(key_of(BTC), encode(snapshot(BTC, 1)))
        await until(lambda: sequence_of(cache, BTC) == 1)


@pytest.mark.stack
async def test_a_copy_of_thousands_of_instruments_hears_of_each(redis: Redis, redis_url: str) -> None:
    names = [f"SYMBOL{number}.BINANCE" for number in range(5000)]  # more answers than a stream takes in unread
    slow = FeatureCacheSettings(reconcile_interval_seconds=30, timeout_seconds=5)
    async with following(FeatureCache(redis_url, slow, names)) as cache:
        await until(lambda: cache.connected)
        ends = (names[0], names[-1])
        for name in ends:
            await redis.publish(key_of(name), encode(snapshot(name, 1)))
        await until(lambda: all(sequence_of(cache, name) == 1 for name in ends))


@asynccontextmanager
async def black_hole_for_the_first_connection(redis_url: str) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A proxy whose first connection delivers nothing any more, without closing, once the event is set."""
    there = urlsplit(redis_url)
    silent = asyncio.Event()
    connections = 0
    pumps: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bool) -> None:
        try:
            while chunk := await reader.read(65536):
                if not (first and silent.is_set()):
                    writer.write(chunk)
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        upstream, downstream = await asyncio.open_connection(there.hostname, there.port)
        for pair in ((reader, downstream), (upstream, writer)):
            pumps.add(asyncio.create_task(pump(*pair, first=connections == 1)))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield through(redis_url, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"), silent
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


@pytest.mark.stack
async def test_a_subscription_that_has_gone_silent_is_made_anew(redis: Redis, redis_url: str) -> None:
    async with (
        black_hole_for_the_first_connection(redis_url) as (proxied_url, silent),
        following(FeatureCache(proxied_url, settings(), [BTC])) as cache,
    ):
        await until(lambda: cache.connected)
        silent.set()
        await redis.set(key_of(BTC), encode(snapshot(BTC, 1)))
        await until(lambda: sequence_of(cache, BTC) == 1)  # keys are still read, on the other connection
        await until(lambda: cache.disconnects == 1 and cache.connected)
        await redis.publish(key_of(BTC), encode(snapshot(BTC, 2)))
        await until(lambda: sequence_of(cache, BTC) == 2)


@pytest.mark.stack
async def test_a_copy_survives_a_redis_that_is_absent_killed_or_frozen(tmp_path: Path) -> None:
    with Stack(LocalSettings(dir=tmp_path), parts={"valkey"}) as stack:
        url = stack.endpoints.redis_url
        assert url is not None
        valkey = stack["valkey"]
        await asyncio.to_thread(valkey.kill)
        async with following(FeatureCache(url, settings(), [BTC])) as cache:
            await until(lambda: cache.disconnects >= 2)
            assert not cache.connected

            await asyncio.to_thread(valkey.start)
            await until(lambda: cache.connected)
            async with connect(url, 1.0) as redis:
                await FeatureStore(redis, 60, 5).write([snapshot(BTC, 1)])
            await until(lambda: sequence_of(cache, BTC) == 1)

            await asyncio.to_thread(valkey.pause)
            try:
                await until(lambda: not cache.connected)
                assert sequence_of(cache, BTC) == 1, "what is known is good until its TTL"
            finally:
                await asyncio.to_thread(valkey.resume)
            await until(lambda: cache.connected)

            await asyncio.to_thread(valkey.kill)
            await until(lambda: not cache.connected)
            await asyncio.to_thread(valkey.start)
            await until(lambda: cache.connected)
            async with connect(url, 1.0) as redis:
                await FeatureStore(redis, 60, 5).write([snapshot(BTC, 2)])
            await until(lambda: sequence_of(cache, BTC) == 2)
