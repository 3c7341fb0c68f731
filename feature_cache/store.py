"""Packed feature vectors in Redis, written by the worker and followed by every decision server.

`features:{INSTRUMENT}` (the braces are part of the key: a hash tag) holds an instrument's newest vector and expires
after the TTL; every vector is also published on the channel `features.updates`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from feature_cache.codec import FeatureSnapshot, encode

CHANNEL: Final = "features.updates"


def key_of(instrument: str) -> str:
    """The Redis key of an instrument's vector."""
    return f"features:{{{instrument}}}"


def connect(redis_url: str, timeout_seconds: float) -> Redis:
    """A client whose every connect, command and reply is bounded by `timeout_seconds`, without retries of its own.

    Whoever uses it has a loop that tries again, and knows better than the client when that is of use. Nothing is
    connected before the first command.
    """
    return Redis.from_url(
        redis_url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),
    )


class FeatureStore:
    """The writing side.

    Args:
        redis: A client that returns bytes; not closed here.
        ttl_seconds: How long a vector stays when nothing newer replaces it.
    """

    def __init__(self, redis: Redis, ttl_seconds: float) -> None:
        self._redis = redis
        self._ttl_ms = round(ttl_seconds * 1000)

    async def write(self, snapshots: Iterable[FeatureSnapshot]) -> None:
        """Stores and publishes vectors in one round trip. Cancelling may leave some of them written.

        Raises:
            RedisError: Redis refused or did not answer in time; some may be written. Writing again is harmless.
        """
        async with self._redis.pipeline(transaction=False) as pipeline:
            for snapshot in snapshots:
                packed = encode(snapshot)
                pipeline.set(key_of(snapshot.instrument), packed, px=self._ttl_ms)
                pipeline.publish(CHANNEL, packed)
            await pipeline.execute()
