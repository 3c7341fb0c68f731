"""The feature worker as a process of its own, between a real broker and a real Valkey."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from support import odd_sets
from support.followed_cache import following
from support.waiting import until

from feature_cache.engine.engine import FeatureEngine
from feature_cache.feature_sets import of_file
from feature_cache.sources.publisher import EventPublisher
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import BookState, FeatureSnapshot
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from feature_cache.store.vectors import FeatureStore
from feature_cache.worker import guests
from feature_cache.worker.consumer import DeadLetters, MarketEventConsumer
from feature_cache.worker.engines import Engines
from feature_cache.worker.settings import WorkerSettings
from local.stack.settings import LocalSettings
from local.stack.stack import Stack
from pretrade.market.v1 import market_pb2 as pb

pytestmark = pytest.mark.stack

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "binance_spot"
NAMES = tuple(f"{name}.SIM" for name in ("ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE", "TEN"))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Shared by the tests; each uses an instrument of its own, and leaves every part running."""
    settings = LocalSettings(dir=tmp_path_factory.mktemp("worker"), market=False)
    with Stack(settings, parts={"valkey", "broker", "worker"}) as stack:
        yield stack


@pytest.fixture
async def cache(stack: Stack) -> AsyncIterator[FeatureCache]:
    """A server's copy of all instruments."""
    assert stack.endpoints.redis_url is not None
    settings = FeatureCacheSettings(ttl_seconds=600, reconcile_interval_seconds=0.2, timeout_seconds=0.5)
    names = (*NAMES, "BTCUSDT.BINANCE", "ETHUSDT.BINANCE")
    async with following(FeatureCache(stack.endpoints.redis_url, settings, names)) as cache:
        await until(lambda: cache.connected)
        yield cache


def brokers(stack: Stack) -> str:
    address = stack.endpoints.kafka_bootstrap_servers
    assert address is not None
    return address


async def publish(stack: Stack, events: Iterable[pb.MarketEvent]) -> None:
    async with EventPublisher(brokers(stack)) as publisher:
        await publisher.publish(events, speed=None)
    assert publisher.failed == 0


def market(instrument: str, seconds: float, seed: int = 1) -> list[pb.MarketEvent]:
    return list(simulate(seed, [instrument], duration_seconds=seconds))


def expected(events: Iterable[pb.MarketEvent]) -> FeatureSnapshot:
    events = list(events)
    engine = FeatureEngine(events[0].instrument)
    for event in events:
        engine.on_event(event)
    return engine.snapshot()


def shows(cache: FeatureCache, wanted: FeatureSnapshot) -> bool:
    """Whether the copy holds these very features."""
    entry = cache.get(wanted.instrument)
    if entry is None or entry.snapshot.event_time_ns != wanted.event_time_ns:
        return False
    found = entry.snapshot
    return np.array_equal(found.values, wanted.values, equal_nan=True) and (found.bid, found.ask, found.state) == (
        wanted.bid,
        wanted.ask,
        wanted.state,
    )


def get(stack: Stack, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"{stack.endpoints.worker_url}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def healthy(stack: Stack) -> bool:
    return (await asyncio.to_thread(get, stack, "/healthz"))[0] == 200


async def until_healthy(stack: Stack, wanted: bool) -> None:
    async with asyncio.timeout(40):
        while await healthy(stack) is not wanted:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.05)


async def test_published_events_become_the_features_that_the_engine_gives(stack: Stack, cache: FeatureCache) -> None:
    events = market("ONE.SIM", 35)
    await publish(stack, events)
    wanted = expected(events)
    await until(lambda: shows(cache, wanted))
    assert np.isfinite(wanted.values).all()
    _, metrics = await asyncio.to_thread(get, stack, "/metrics")
    assert f'pretrade_worker_events_total{{instrument="ONE.SIM"}} {len(events)}.0' in metrics
    assert 'pretrade_worker_book_valid{instrument="ONE.SIM"} 1.0' in metrics
    assert 'pretrade_worker_book_gaps_total{instrument="ONE.SIM"} 0.0' in metrics


async def test_a_book_beyond_kafkas_usual_limit_of_a_message_arrives_whole(stack: Stack, cache: FeatureCache) -> None:
    (first, *_) = market("TEN.SIM", 1)
    whole, levels = first.snapshot, 120_000
    whole.bid_ticks.extend(range(min(whole.bid_ticks) - levels, min(whole.bid_ticks)))
    whole.ask_ticks.extend(range(max(whole.ask_ticks) + 1, max(whole.ask_ticks) + 1 + levels))
    whole.bid_lots.extend([10**9] * levels)
    whole.ask_lots.extend([10**9] * levels)
    assert first.ByteSize() > 2**21
    await publish(stack, [first])
    await until(lambda: shows(cache, expected([first])))


async def test_what_has_been_written_is_committed(stack: Stack, cache: FeatureCache) -> None:
    events = market("NINE.SIM", 3)
    await publish(stack, events)
    await until(lambda: shows(cache, expected(events)))
    group = AIOKafkaConsumer(
        bootstrap_servers=brokers(stack), group_id="pretrade-features", enable_auto_commit=False
    )  # asks for the group's offsets without joining it
    await group.start()
    try:
        partitions = [TopicPartition("market.events", number) for number in range(4)]
        ends = await group.end_offsets(partitions)
        async with asyncio.timeout(20):
            while any([(await group.committed(p) or 0) < ends[p] for p in partitions]):  # noqa: ASYNC110 - the broker's
                await asyncio.sleep(0.1)
    finally:
        await group.stop()


async def test_duplicates_change_nothing(stack: Stack, cache: FeatureCache) -> None:
    events = market("TWO.SIM", 8)
    repeated = [event for number, event in enumerate(events) for _ in range(1 + (number % 3 == 0))]
    await publish(stack, repeated)
    wanted = expected(events)
    await until(lambda: shows(cache, wanted))


async def test_a_gap_is_unknown_until_the_next_snapshot(stack: Stack, cache: FeatureCache) -> None:
    events = market("THREE.SIM", 11)
    deltas = [number for number, event in enumerate(events) if event.WhichOneof("event") == "delta"]
    lost = deltas[60]
    snapshot = next(
        number for number, event in enumerate(events) if number > lost and event.WhichOneof("event") == "snapshot"
    )
    await publish(stack, [*events[:lost], *events[lost + 1 : deltas[62]]])
    await until(lambda: (entry := cache.get("THREE.SIM")) and entry.snapshot.state is BookState.UNKNOWN)
    await publish(stack, events[deltas[62] : snapshot + 1])
    await until(lambda: (entry := cache.get("THREE.SIM")) and entry.snapshot.state is BookState.VALID)


async def test_poison_goes_to_the_dead_letters_and_its_neighbours_are_taken(stack: Stack, cache: FeatureCache) -> None:
    events = market("FOUR.SIM", 4)
    producer = AIOKafkaProducer(bootstrap_servers=brokers(stack), linger_ms=0)
    await producer.start()
    key = b"FOUR.SIM"
    poison = [b"\xff\xff", b"", b'{"e":"trade"}', pb.MarketEvent(instrument="FOUR.SIM").SerializeToString()]
    try:
        for number, event in enumerate(events):
            event.publish_time_ns = time.time_ns()
            await producer.send("market.events", event.SerializeToString(), key)
            if number < len(poison):
                await producer.send("market.events", poison[number], key)
        await producer.send("market.events", None, key)
        await producer.flush()
    finally:
        await producer.stop()
    wanted = expected(events)
    await until(lambda: shows(cache, wanted))
    letters = AIOKafkaConsumer(
        "market.events.dlq", bootstrap_servers=brokers(stack), auto_offset_reset="earliest", fetch_max_wait_ms=10
    )
    await letters.start()
    try:
        found = [await asyncio.wait_for(letters.getone(), 20) for _ in range(5)]
    finally:
        await letters.stop()
    assert [letter.value for letter in found] == [*poison[:1], b"", *poison[2:], None]
    reasons = [dict(letter.headers)["reason"] for letter in found]
    assert reasons == [b"not_protobuf", b"empty", b"not_protobuf", b"contract", b"empty"]
    assert all(letter.key == key for letter in found)
    assert all(dict(letter.headers)["position"].startswith(b"market.events/") for letter in found)


@pytest.mark.long
async def test_a_killed_worker_rebuilds_its_books_and_windows_from_the_log(stack: Stack, cache: FeatureCache) -> None:
    events = market("FIVE.SIM", 9)  # one snapshot only, at the start
    part = len(events) // 2
    await publish(stack, events[:part])
    await until(lambda: shows(cache, expected(events[:part])))
    entry = cache.get("FIVE.SIM")
    assert entry is not None
    await asyncio.to_thread(stack["worker"].kill)
    await publish(stack, events[part : part + 100])
    await asyncio.to_thread(stack["worker"].start)
    await publish(stack, events[part + 100 :])
    wanted = expected(events)
    await until(lambda: shows(cache, wanted))
    after = cache.get("FIVE.SIM")
    assert after is not None
    assert after.snapshot.sequence > entry.snapshot.sequence


async def test_without_redis_the_worker_goes_on_and_writes_the_newest_when_it_is_back(
    stack: Stack, cache: FeatureCache
) -> None:
    events = market("SIX.SIM", 9)
    part = len(events) // 2
    await publish(stack, events[:part])
    await until(lambda: shows(cache, expected(events[:part])))
    for stop, start in ((stack["valkey"].kill, stack["valkey"].start), (stack["valkey"].pause, stack["valkey"].resume)):
        await asyncio.to_thread(stop)
        await until_healthy(stack, wanted=False)
        part += 50
        await publish(stack, events[part - 50 : part])
        await asyncio.to_thread(start)
        wanted = expected(events[:part])
        await until(lambda wanted=wanted: shows(cache, wanted))  # type: ignore[misc]  # bound here for the lambda
        await until_healthy(stack, wanted=True)


@pytest.mark.long
async def test_a_second_worker_takes_over_when_the_first_ends(stack: Stack, cache: FeatureCache) -> None:
    events = market("SEVEN.SIM", 9)
    third = len(events) // 3
    await publish(stack, events[:third])
    await until(lambda: shows(cache, expected(events[:third])))
    with second_worker(stack) as second:
        await asyncio.to_thread(_wait_for_line, second, "worker.partition_taken")
        await publish(stack, events[third : 2 * third])
        await until(lambda: shows(cache, expected(events[: 2 * third])))
        await asyncio.to_thread(stack["worker"].stop)
        await publish(stack, events[2 * third :])
        await until(lambda: shows(cache, expected(events)))
        await asyncio.to_thread(stack["worker"].start)
    assert second.returncode == 0


@pytest.mark.long
async def test_a_broker_that_was_killed_and_lost_its_log_is_consumed_again(stack: Stack, cache: FeatureCache) -> None:
    events = market("EIGHT.SIM", 6)
    part = len(events) // 2
    await publish(stack, events[:part])
    await until(lambda: shows(cache, expected(events[:part])))
    await asyncio.to_thread(stack["broker"].kill)
    await until_healthy(stack, wanted=False)
    await asyncio.to_thread(stack["broker"].start)
    await until_healthy(stack, wanted=True)
    again = market("EIGHT.SIM", 3, seed=2)
    await publish(stack, again)
    wanted = expected(again)
    await until(lambda: shows(cache, wanted))


def only(name: str, directory: Path) -> Path:
    """A file with one of the odd sets."""
    file = directory / "sets.py"
    file.write_text(
        f"{Path(odd_sets.__file__).read_text()}\n"
        f"FEATURE_SETS = [one for one in FEATURE_SETS if one.feature_set.id == {name!r}]\n"
    )
    return file


class Nowhere:
    """Takes vectors, and drops them."""

    async def write(self, snapshots: Iterable[FeatureSnapshot]) -> int:
        return 0


@pytest.mark.long
async def test_history_is_read_no_faster_than_a_guest_can_take_it(
    kafka_bootstrap_servers: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(guests, "_MOST_QUEUED", 1_200)
    events = market("SLOW.SIM", 12)[:2_000]
    engine = FeatureEngine("SLOW.SIM")
    shown = sum(engine.on_event(event) for event in events)
    assert shown > 1_500
    async with EventPublisher(kafka_bootstrap_servers) as publisher:
        await publisher.publish(events, speed=None)
    (slow,) = of_file(only("slow", tmp_path))
    guest = guests.Guest(slow, guests.launcher(slow, tmp_path / "sets.py"))
    beside = guests.Guests([guest])
    engines = Engines(10, beside)
    settings = WorkerSettings(kafka_bootstrap_servers=kafka_bootstrap_servers)
    letters = DeadLetters(kafka_bootstrap_servers, "market.events.dlq")
    running = [
        asyncio.create_task(MarketEventConsumer(settings, engines, letters).run()),
        asyncio.create_task(beside.run(cast(FeatureStore, Nowhere()), lambda: engines.all().values(), 0.002)),
    ]
    try:
        await until(lambda: guest.events == shown)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        guest.close()
    assert not guest.suspensions, "it would have fallen behind, and lost the history"


@pytest.mark.long
async def test_a_worker_beside_a_set_that_keeps_the_interpreter_for_ever_publishes_mf1_and_ends_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRADE_WORKER_FEATURES_FILE", str(only("keeps", tmp_path)))
    events = market("ONE.SIM", 35)
    with Stack(LocalSettings(dir=tmp_path / "stack", market=False), parts={"valkey", "broker", "worker"}) as stack:
        await publish(stack, events[:100])

        async def metrics() -> str:
            return (await asyncio.to_thread(get, stack, "/metrics"))[1]

        async with asyncio.timeout(60):
            while 'pretrade_worker_set_waiting_events{set="keeps"} 0.0' in await metrics():  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
        assert stack.endpoints.redis_url is not None
        settings = FeatureCacheSettings(ttl_seconds=600, reconcile_interval_seconds=0.2, timeout_seconds=0.5)
        async with following(FeatureCache(stack.endpoints.redis_url, settings, NAMES)) as cache:
            await publish(stack, events[100:])
            await until(lambda: shows(cache, expected(events)))
        assert 'pretrade_worker_set_events_total{set="keeps"} 0.0' in await metrics()
        (of_set,) = psutil.Process(stack["worker"].pid).children()
        await asyncio.to_thread(stack["worker"].stop)
        assert not of_set.is_running()


@pytest.mark.skipif(not DATA.is_dir(), reason="the recorded sessions are not there")
async def test_the_replay_command_publishes_a_recording_until_it_is_interrupted(
    stack: Stack, cache: FeatureCache
) -> None:
    argv = [sys.executable, "-m", "feature_cache.sources.replay", str(DATA), "--speed", "10", "--loop"]
    argv += ["--kafka", brokers(stack)]
    process = await asyncio.to_thread(subprocess.Popen, argv, stderr=subprocess.PIPE, text=True)
    try:
        names = ("BTCUSDT.BINANCE", "ETHUSDT.BINANCE")
        await until(lambda: all((entry := cache.get(n)) and entry.snapshot.state is BookState.VALID for n in names))
        process.send_signal(signal.SIGINT)
        _, shown = await asyncio.to_thread(process.communicate, timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, shown
    assert "events replayed to market.events" in shown


@pytest.mark.long
def test_a_replay_without_a_broker_or_a_recording_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "empty")], "no recording"),
        ([str(tmp_path), "--speed", "0"], "positive number"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "feature_cache.sources.replay", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2
        assert message in ended.stderr
    ended = subprocess.run(
        [sys.executable, "-m", "feature_cache.sources.cli", "simulate", "--duration", "1", "--kafka", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("127.0.0.1:1: ")
    assert "Traceback" not in ended.stderr


@contextmanager
def second_worker(stack: Stack) -> Iterator[subprocess.Popen[str]]:
    """Another worker of the same group; ended by SIGTERM."""
    env = os.environ | {
        "PRETRADE_WORKER_REDIS_URL": str(stack.endpoints.redis_url),
        "PRETRADE_WORKER_KAFKA_BOOTSTRAP_SERVERS": brokers(stack),
    }
    process = subprocess.Popen([sys.executable, "-m", "feature_cache"], env=env, stderr=subprocess.PIPE, text=True)
    try:
        yield process
        process.terminate()
        process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()


def _wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")
