"""Redis and Kafka under the running feature worker: what a server's copy of the features sees of their faults."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final
from urllib.parse import urlsplit

import psutil
import pytest
from redis.asyncio import Redis
from support.feature_conditions import Seen, copy_of, fresh, gone, stored, until_health, url
from support.figures import Figure
from support.tcp_proxy import BLACK_HOLE, TcpProxy, through
from support.waiting import until

from feature_cache.store.l1 import FeatureCache
from feature_cache.store.vectors import connect, key_of
from local.stack.settings import LocalSettings
from local.stack.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(150)]

NAMES: Final = ("BTCUSDT.SIM", "ETHUSDT.SIM")
_MAKE_A_LIST: Final = "redis.call('DEL', KEYS[1]); return redis.call('RPUSH', KEYS[1], 'a')"
Act = Callable[[Redis], Awaitable[object]]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A simulated market through broker and worker into Valkey; every test leaves all of it running."""
    settings = LocalSettings(dir=tmp_path_factory.mktemp("features"), instruments=NAMES)
    with Stack(settings, parts={"valkey", "broker", "worker", "market"}) as stack:
        yield stack


async def command(redis: Redis, *arguments: str) -> object:
    """Sends a command that the client has no method for."""
    return await redis.execute_command(*arguments)  # type: ignore[no-untyped-call]


def host_and_port(redis_url: str) -> tuple[str, str]:
    """Where a Redis listens."""
    there = urlsplit(redis_url)
    return str(there.hostname), str(there.port)


async def slowest_get_seconds(cache: FeatureCache, until_: Callable[[], bool]) -> float:
    """Reads on and on until something holds; returns what the slowest read took."""
    slowest = 0.0
    async with asyncio.timeout(30):
        while not until_():
            began = time.perf_counter()
            cache.get(NAMES[0])
            slowest = max(slowest, time.perf_counter() - began)
            await asyncio.sleep(0.001)
    return slowest


@pytest.mark.long
@pytest.mark.fault(
    "B1",
    "Redis is killed, or frozen with SIGSTOP",
    "No read waits. Vectors are kept until their TTL; decisions call them stale after a second. "
    "The worker is not ready. Both recover.",
)
async def test_redis_killed_or_frozen_costs_no_read_any_time_and_everybody_comes_back(
    stack: Stack, seen: Seen, figure: Figure
) -> None:
    valkey = stack["valkey"]
    async with copy_of(url(stack), NAMES) as cache:
        for fault, heal in ((valkey.kill, valkey.start), (valkey.pause, valkey.resume)):
            await until(lambda: fresh(cache))
            await asyncio.to_thread(fault)
            try:
                await until(lambda: not cache.connected)
                assert not gone(cache), "what is known is good until its TTL"
                slowest = await slowest_get_seconds(cache, lambda: gone(cache))
                await until_health(stack, lambda said: said.startswith("redis"))
            finally:
                await asyncio.to_thread(heal)
            took = await until(lambda: fresh(cache))
            seen(f"{fault.__name__}: slowest read {1e3 * slowest:.1f} ms, fresh {took:.1f} s after healing")
            figure(slowest < 0.25, "no read of the features takes 250 ms")
            await until_health(stack, lambda said: said == "ok")


@pytest.mark.fault(
    "B1",
    "The network between a server and Redis swallows all packets",
    "The server's timeouts detect it. Vectors are kept until their TTL; decisions call them stale after a second.",
)
async def test_a_black_holed_redis_is_found_out_and_left(stack: Stack, seen: Seen, figure: Figure) -> None:
    with TcpProxy(":".join(host_and_port(url(stack)))) as network:
        async with copy_of(through(url(stack), network.address), NAMES) as cache:
            await until(lambda: fresh(cache))
            network.apply(BLACK_HOLE)
            found = await until(lambda: not cache.connected)
            await until(lambda: gone(cache))
            network.heal()
            took = await until(lambda: fresh(cache))
    seen(f"found out after {found:.1f} s, fresh {took:.1f} s after healing")
    figure(found < 2, "a black-holed Redis is found out in 2 s")


def password_of(redis: Redis) -> str:
    """What a client shows."""
    return str(redis.connection_pool.connection_kwargs["password"])


async def refuse_the_password(redis: Redis) -> None:
    await redis.config_set("requirepass", "another")
    await command(redis, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    await command(redis, "CLIENT", "KILL", "TYPE", "pubsub")


REFUSALS: Final[dict[str, tuple[Act, Act, str]]] = {
    "OOM": (lambda r: r.config_set("maxmemory", 1), lambda r: r.config_set("maxmemory", 0), "OutOfMemory"),
    "READONLY": (
        lambda r: command(r, "REPLICAOF", "127.0.0.1", "1"),
        lambda r: command(r, "REPLICAOF", "NO", "ONE"),
        "ReadOnly",
    ),
    "NOAUTH": (refuse_the_password, lambda r: r.config_set("requirepass", password_of(r)), "Authentication"),
}


@pytest.mark.fault(
    "B2",
    "Redis refuses writes: OOM, READONLY or NOAUTH",
    "The worker's health names the error. Nothing crashes, and Redis is refilled once it accepts writes.",
)
async def test_a_redis_that_refuses_is_named_and_refilled_once_it_accepts(stack: Stack, seen: Seen) -> None:
    pid = stack["worker"].pid
    async with connect(url(stack), 1.0) as redis, copy_of(url(stack), NAMES) as cache:
        for name, (refuse, accept, said) in REFUSALS.items():
            await until(lambda: fresh(cache))
            await refuse(redis)
            try:
                await until_health(stack, lambda health, said=said: said in health)  # type: ignore[misc]
            finally:
                await accept(redis)
            took = await until(lambda: fresh(cache))
            seen(f"{name}: fresh {took:.1f} s after healing")
    assert stack["worker"].pid == pid
    assert stack["worker"].alive


@pytest.mark.long
@pytest.mark.fault(
    "B2", "Redis is loading its data (LOADING)", "The servers treat Redis as unavailable until it has loaded."
)
async def test_a_redis_that_is_loading_is_waited_for(
    stack: Stack, tmp_path_factory: pytest.TempPathFactory, seen: Seen
) -> None:
    keys, load_microseconds = 2_000, 1_000
    with Stack(LocalSettings(dir=tmp_path_factory.mktemp("master")), parts={"valkey"}) as master:
        async with connect(url(master), 1.0) as full:
            await full.mset({f"key-{number}": b"x" * 2_000 for number in range(keys)})
        async with connect(url(stack), 1.0) as redis, copy_of(url(stack), NAMES) as cache:
            await until(lambda: fresh(cache))
            await redis.config_set("key-load-delay", load_microseconds)
            await redis.config_set("loading-process-events-interval-bytes", 4096)
            await redis.config_set("masterauth", password_of(full))
            await command(redis, "REPLICAOF", *host_and_port(url(master)))
            try:
                await until_health(stack, lambda said: "loading" in said.lower())
                await until_health(stack, lambda said: "ReadOnly" in said)
            finally:
                await command(redis, "REPLICAOF", "NO", "ONE")
                await redis.config_set("key-load-delay", 0)
                await redis.flushall()
            took = await until(lambda: fresh(cache))
            seen(f"fresh {took:.1f} s after it accepted writes again")


@pytest.mark.fault(
    "B2",
    "A feature key in Redis is flushed, evicted, of another type or garbage",
    "The server keeps its last copy and counts the garbage. The worker's next write refills the key.",
)
async def test_keys_that_vanish_or_are_spoilt_are_refilled(stack: Stack, seen: Seen) -> None:
    key = key_of(NAMES[0])
    spoil: dict[str, Act] = {
        "FLUSHALL": lambda r: r.flushall(),
        "evicted": lambda r: r.delete(key),
        "wrong type": lambda r: command(r, "EVAL", _MAKE_A_LIST, "1", key),
        "garbage": lambda r: r.set(key, b"PTF1\xff\xff garbage"),
    }
    async with connect(url(stack), 1.0) as redis, copy_of(url(stack), NAMES) as cache:
        for name, act in spoil.items():
            await until(lambda: fresh(cache))
            before = time.monotonic()
            await act(redis)
            assert cache.get(NAMES[0]) is not None
            async with asyncio.timeout(20):
                while await stored(redis, NAMES[0]) is None:  # noqa: ASYNC110 - another process's work
                    await asyncio.sleep(0.005)
            seen(f"{name}: refilled after {1e3 * (time.monotonic() - before):.0f} ms")
        assert cache.connected


@pytest.mark.long
@pytest.mark.fault(
    "C1",
    "The broker is killed and restarted with an empty log, then frozen",
    "The worker is not ready and idles. It rejoins without help and serves known books again.",
)
async def test_a_broker_that_goes_away_is_waited_for_without_a_busy_loop(stack: Stack, seen: Seen) -> None:
    broker = stack["broker"]
    worker = psutil.Process(stack["worker"].pid)
    async with copy_of(url(stack), NAMES) as cache:
        for fault, heal in ((broker.kill, broker.start), (broker.pause, broker.resume)):
            await until(lambda: fresh(cache))
            await asyncio.to_thread(fault)
            try:
                said = await until_health(stack, lambda said: said != "ok")
                used, began = worker.cpu_times(), time.monotonic()
                await until(lambda: gone(cache))
                share = (sum(worker.cpu_times()[:2]) - sum(used[:2])) / max(time.monotonic() - began, 0.5)
            finally:
                await asyncio.to_thread(heal)
            took = await until(lambda: fresh(cache))
            await until_health(stack, lambda said: said == "ok")
            seen(f"{fault.__name__}: {said!r}, {share:.0%} of a core meanwhile, fresh {took:.1f} s after healing")
            assert share < 0.5
