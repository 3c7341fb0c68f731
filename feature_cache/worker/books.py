"""Publishes the best levels of every book to Redis, for people to look at: slowly, and a few at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from redis.exceptions import RedisError

from feature_cache.engine.engine import FeatureEngine
from feature_cache.store.books import PublishedBook
from feature_cache.store.cluster import ClusterFeatureStore
from feature_cache.store.vectors import FeatureStore, book_key_of
from feature_cache.worker.engines import Engines

_AT_A_TIME: Final = 20
"""Books of one write. They take some 0.8 ms, for which no event is taken in."""
_PAUSE_SECONDS: Final = 0.1
"""Between two writes, at least: so books take 1 % of a core at most, however many there are."""
_LIFE_ROUNDS: Final = 10


class BookPublisher:
    """Writes every book once in an interval, or as often as 200 books a second allow where there are many.

    The books are spread over that time, so that a worker of many instruments is never held up for long.

    Args:
        store: Where the books go.
        engines: Whose books.
        levels: Of each side; 0 publishes nothing.
        interval_seconds: Between two writes of one book, at least.
        wall_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(
        self,
        store: FeatureStore | ClusterFeatureStore,
        engines: Engines,
        levels: int,
        interval_seconds: float,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._store = store
        self._engines = engines
        self._levels = levels
        self._interval_seconds = interval_seconds
        self._wall_ns = wall_ns
        self.written = 0
        """Books that Redis took."""
        self.failures = 0
        """Writes that Redis did not take."""

    async def run(self) -> None:
        """Publishes for ever, through any outage of Redis; ends only by cancellation."""
        if not self._levels:
            await asyncio.Event().wait()  # a part that ends takes the worker with it
        while True:
            live = [engine for engines in self._engines.live().values() for engine in engines.values()]
            parts = [live[first : first + _AT_A_TIME] for first in range(0, len(live), _AT_A_TIME)]
            pause = max(_PAUSE_SECONDS, self._interval_seconds / max(1, len(parts)))
            for part in parts:
                await asyncio.sleep(pause)
                await self._publish(part, round(_LIFE_ROUNDS * pause * len(parts) * 1000))
            if not parts:
                await asyncio.sleep(pause)

    async def _publish(self, engines: list[FeatureEngine], life_ms: int) -> None:
        books = {engine.instrument: self._book(engine).model_dump_json() for engine in engines}
        try:
            await self._store.write_texts(book_key_of, books, life_ms)
        except (RedisError, OSError):
            self.failures += 1  # the writer, which needs Redis too, has the words for it
        else:
            self.written += len(books)

    def _book(self, engine: FeatureEngine) -> PublishedBook:
        bids, asks = engine.depth(self._levels)
        return PublishedBook(
            state=engine.state,
            unknown_because=engine.unknown_because,
            event_time_ns=engine.time_ns,
            written_ns=self._wall_ns(),
            bids=bids,
            asks=asks,
        )
