"""Books for people to look at: published by a worker's engines to a real Redis, and read by a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
from redis.asyncio import Redis
from support.waiting import until

from feature_cache.store.books import BookReader
from feature_cache.store.codec import BookState
from feature_cache.store.vectors import FeatureStore, book_key_of, connect
from feature_cache.worker.books import BookPublisher
from feature_cache.worker.engines import Engines
from pretrade.market.v1 import market_pb2 as pb

START_NS = 1_700_000_000 * 10**9


def engines_of(*instruments: str) -> Engines:
    """Engines of instruments whose books have five levels of each side."""
    engines = Engines(1_000)
    engines.assign(0, 0, 0)
    levels = {
        "bid_ticks": [9_900 - place for place in range(5)],
        "bid_lots": [1_500] * 5,
        "ask_ticks": [10_100 + place for place in range(5)],
        "ask_lots": [250] * 5,
    }
    for instrument in instruments:
        hear(engines, instrument, snapshot=pb.BookSnapshot(last_update_id=1, **levels))
    return engines


def hear(engines: Engines, instrument: str, **body: pb.BookSnapshot | pb.BookReset) -> None:
    at = engines.positions()[0]
    times = dict.fromkeys(("event_time_ns", "receive_time_ns", "publish_time_ns"), START_NS + at)
    event = pb.MarketEvent(instrument=instrument, price_decimals=2, size_decimals=3, **times, **body)  # type: ignore[arg-type]  # one of the oneof
    engines.take(0, at, instrument.encode(), event.SerializeToString())


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with connect(redis_url, 1.0) as client:
        yield client


@pytest.mark.stack
async def test_the_best_levels_are_published_and_read_and_go_when_nobody_publishes_them(redis: Redis) -> None:
    name = "BOOK.SIM"
    engines, store = engines_of(name), FeatureStore(redis, 60, 5)
    publisher, reader = BookPublisher(engines=engines, store=store, levels=2, interval_seconds=0.1), BookReader(store)
    publishing = asyncio.create_task(publisher.run())
    try:
        await until(lambda: publisher.written >= 1)
        book = await reader.read(name)
        assert book is not None
        assert (book.bids, book.asks) == ([(99.0, 1.5), (98.99, 1.5)], [(101.0, 0.25), (101.01, 0.25)])
        assert (book.state, book.unknown_because, book.event_time_ns) == (BookState.VALID, "", START_NS)
        hear(engines, name, reset=pb.BookReset(reason="reconnect"))
        before = publisher.written
        await until(lambda: publisher.written >= before + 2)
        book = await reader.read(name)
        assert book is not None
        assert (book.bids, book.asks, book.unknown_because) == ([], [], "reconnect")
        assert 0 < await redis.pttl(book_key_of(name)) <= 1_000, "ten intervals"
    finally:
        publishing.cancel()
    await redis.set(book_key_of(name), b"\xff", px=10_000)
    assert await reader.read(name) is None, "what is no book is none"
    assert await reader.read("OTHER.SIM") is None


async def test_a_redis_that_is_away_is_counted_and_ends_nothing() -> None:
    async with connect("redis://127.0.0.1:1", 1.0) as nowhere:
        publisher = BookPublisher(FeatureStore(nowhere, 60, 1), engines_of("BOOK.SIM"), 2, 0.1)
        publishing = asyncio.create_task(publisher.run())
        await until(lambda: publisher.failures >= 2)
        assert publisher.written == 0
        assert not publishing.done()
        publishing.cancel()


class _Recording(FeatureStore):
    """A store that keeps how many books each write had."""

    def __init__(self) -> None:
        self.writes: list[int] = []
        self.life_ms = 0

    async def write_texts(self, key_of: Callable[[str], str], texts: Mapping[str, str], life_ms: int) -> None:
        self.writes.append(len(texts))
        self.life_ms = life_ms


@pytest.mark.parametrize(("interval", "shortest"), [(0.6, 0.6), (0.1, 0.3)])
async def test_many_books_are_spread_over_the_interval_and_at_most_200_a_second(
    interval: float, shortest: float
) -> None:
    store = _Recording()
    publisher = BookPublisher(store, engines_of(*(f"N{number}.SIM" for number in range(50))), 2, interval)
    publishing = asyncio.create_task(publisher.run())
    took = await until(lambda: publisher.written >= 50)
    assert store.writes[:3] == [20, 20, 10]
    assert took >= shortest
    assert store.life_ms >= 10 * shortest * 1000, "until the tenth after it"
    publishing.cancel()


async def test_no_book_is_published_where_there_shall_be_none() -> None:
    store = _Recording()
    publisher = BookPublisher(store, engines_of("BOOK.SIM"), 0, 0.1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(publisher.run(), 0.3)
    assert not store.writes
