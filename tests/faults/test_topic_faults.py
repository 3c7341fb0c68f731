"""What goes wrong in the topic of the market events itself: poison, a log that is lost, a burst."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Final

import numpy as np
import psutil
import pytest
from aiokafka import AIOKafkaProducer
from prometheus_client.parser import text_string_to_metric_families
from support.followed_cache import following
from support.waiting import until

from feature_cache.engine.engine import FeatureEngine
from feature_cache.sources.publisher import EventPublisher
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import BookState
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.market.v1 import market_pb2 as pb

pytestmark = [pytest.mark.stack, pytest.mark.timeout(150)]

PATIENCE_SECONDS: Final = 60.0
POISON_BYTES: Final = 900_000
Seen = Callable[[str], None]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Broker, worker and Valkey without a market: each test publishes one of its own, and leaves all parts running."""
    settings = LocalSettings(dir=tmp_path_factory.mktemp("topic"), market=False)
    with pytest.MonkeyPatch.context() as environment:
        # A machine that is slow must not make a venue silent while a test waits.
        environment.setenv("PRETRADE_WORKER_READY_AGE_SECONDS", "3600")
        with Stack(settings, parts={"valkey", "broker", "worker"}) as stack:
            yield stack


def brokers(stack: Stack) -> str:
    return str(stack.endpoints.kafka_bootstrap_servers)


def metrics(stack: Stack) -> dict[str, float]:
    """The worker's metrics by name, summed over labels."""
    with urllib.request.urlopen(f"{stack.endpoints.worker_url}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("pretrade_worker_")
            found[name] = found.get(name, 0.0) + sample.value
    return found


def ready(stack: Stack) -> bool:
    try:
        with urllib.request.urlopen(f"{stack.endpoints.worker_url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


async def until_ready(stack: Stack, wanted: bool) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await asyncio.to_thread(ready, stack) is not wanted:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.05)


@asynccontextmanager
async def copy_of(stack: Stack, instrument: str) -> AsyncIterator[FeatureCache]:
    """What a decision server holds, for as long as the test takes."""
    settings = FeatureCacheSettings(ttl_seconds=600, reconcile_interval_seconds=0.2, timeout_seconds=0.5)
    async with following(FeatureCache(str(stack.endpoints.redis_url), settings, [instrument])) as cache:
        await until(lambda: cache.connected)
        yield cache


def market(instrument: str, count: int, seed: int = 1, events_per_second: float = 150.0) -> list[pb.MarketEvent]:
    return list(islice(simulate(seed, [instrument], events_per_second=events_per_second), count))


async def publish(stack: Stack, events: Iterable[pb.MarketEvent]) -> None:
    async with EventPublisher(brokers(stack)) as publisher:
        await publisher.publish(events, speed=None)
    assert publisher.failed == 0


def holds(cache: FeatureCache, events: Sequence[pb.MarketEvent]) -> bool:
    """Whether the copy holds the very features that all these events give, by an engine of our own."""
    entry = cache.get(events[0].instrument)
    if entry is None or entry.snapshot.publish_time_ns != events[-1].publish_time_ns:
        return False
    engine = FeatureEngine(events[0].instrument)
    for event in events:
        engine.on_event(event)
    wanted = engine.snapshot()
    return entry.snapshot.state is wanted.state and np.array_equal(entry.snapshot.values, wanted.values, equal_nan=True)


@pytest.mark.fault(
    "C3",
    "Unreadable records among good ones: not protobuf, empty, null, too large, wrong key or wrong version",
    "Each goes to the dead-letter topic with its reason. The good records give the same features as without them.",
)
async def test_poison_among_the_events_of_a_market_goes_to_the_dead_letters(stack: Stack, seen: Seen) -> None:
    events = market("POISON.SIM", 400)
    stranger = next(simulate(1, ["OTHER.SIM"])).SerializeToString()
    empty = pb.MarketEvent(instrument="POISON.SIM").SerializeToString()
    poison = [b"\xff\xff", b"", None, b"\xff" * POISON_BYTES, b'{"e":"trade"}', stranger, empty]
    before = await asyncio.to_thread(metrics, stack)
    async with copy_of(stack, "POISON.SIM") as cache:
        async with EventPublisher(brokers(stack)) as publisher:
            producer = AIOKafkaProducer(bootstrap_servers=brokers(stack))
            await producer.start()
            try:
                for number, event in enumerate(events):
                    await publisher.publish([event], speed=None)
                    if number % 50 == 25:
                        await producer.send_and_wait("market.events", poison[number // 50 % len(poison)], b"POISON.SIM")
            finally:
                await producer.stop()
        sent = sum(number % 50 == 25 for number in range(len(events)))
        await until(lambda: holds(cache, events))
    wanted = before["dead_letters_sent_total"] + sent
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (now := await asyncio.to_thread(metrics, stack))["dead_letters_sent_total"] < wanted:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.1)
    assert now["poison_records_total"] - before.get("poison_records_total", 0) == sent
    assert now["dead_letters_dropped_total"] == before["dead_letters_dropped_total"]
    await until_ready(stack, wanted=True)
    seen(f"{sent} dead letters among {len(events)} events, whose features are exact")


@pytest.mark.long
@pytest.mark.fault(
    "C5",
    "The broker restarts with an empty log",
    "It is counted. The book is unknown until the new log has a snapshot.",
)
async def test_a_log_that_was_lost_makes_books_unknown_until_the_new_one_has_told_them(
    stack: Stack, seen: Seen
) -> None:
    events = market("LOST.SIM", 2_000)
    again = market("LOST.SIM", 300, seed=2)
    first = next(number for number, event in enumerate(again) if event.HasField("snapshot"))
    before = await asyncio.to_thread(metrics, stack)
    async with copy_of(stack, "LOST.SIM") as cache:
        await publish(stack, events)
        await until(lambda: holds(cache, events))
        await asyncio.to_thread(stack["broker"].kill)
        await until_ready(stack, wanted=False)
        await asyncio.to_thread(stack["broker"].start)
        began = time.monotonic()
        # What comes before any snapshot: it follows on nothing, whatever its update ids are.
        tail = [event for event in again[first + 1 :] if event.HasField("delta")]
        await publish(stack, tail)
        await until(lambda: (entry := cache.get("LOST.SIM")) and entry.snapshot.state is BookState.UNKNOWN)
        noticed = time.monotonic() - began
        await publish(stack, again)
        await until(lambda: (entry := cache.get("LOST.SIM")) and entry.snapshot.state is BookState.VALID)
        entry = cache.get("LOST.SIM")
        assert entry is not None
        assert entry.snapshot.bid < entry.snapshot.ask
    await until_ready(stack, wanted=True)
    now = await asyncio.to_thread(metrics, stack)
    # The broker forgot the group too: the worker may find the new log by joining again, before it misses the old one.
    counted = sum(now[name] - before[name] for name in ("kafka_failures_total", "log_truncations_total"))
    assert counted > 0
    seen(f"unknown {noticed:.1f} s after the restart, counted {counted:.0f} times, valid again with the snapshot")


@pytest.mark.long
@pytest.mark.fault(
    "C6",
    "60,000 events of one instrument arrive in a burst",
    "They are conflated: few writes and bounded memory, and at the end exact features.",
)
async def test_a_burst_is_conflated_and_caught_up_with(stack: Stack, seen: Seen) -> None:
    events = market("BURST.SIM", 60_000, seed=7, events_per_second=1500)
    worker = psutil.Process(stack["worker"].pid)
    before, memory = await asyncio.to_thread(metrics, stack), worker.memory_info().rss
    async with copy_of(stack, "BURST.SIM") as cache:
        began = time.monotonic()
        await publish(stack, events)
        published = time.monotonic() - began
        took = await until(lambda: holds(cache, events))
    after = await asyncio.to_thread(metrics, stack)
    written = after["vectors_written_total"] - before["vectors_written_total"]
    grown = (worker.memory_info().rss - memory) / 2**20
    seen(
        f"{len(events) / published:,.0f} events/s, caught up {took:.1f} s after the last; {written:.0f} vectors "
        f"written; {grown:+.0f} MiB"
    )
    assert written < len(events) / 5
    assert grown < 100
