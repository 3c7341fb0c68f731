"""Packed feature vectors in Redis, written by the worker and followed by every decision server.

`features:SET:{INSTRUMENT}` (the braces are part of the key: a hash tag, so that a cluster keeps all sets of an
instrument together) holds an instrument's newest vector of a feature set and expires after the TTL. A vector never
replaces one of a higher sequence: a worker that was frozen while its instruments went to another worker may resume and
write. A vector that is stored is also published on the channel of its key's name, so that a server subscribes to its
own instruments and sets, and gets no others. In a Redis Cluster that is a shard channel, since a cluster sends an
ordinary message to each of its nodes (see `cluster`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo
from redis.exceptions import AskError, ClusterError

from feature_cache.features import MF1
from feature_cache.store.codec import FeatureSnapshot, encode

_DRIVER: Final = DriverInfo()
"""What every client says of itself: to look up its version takes milliseconds, and would at every connection."""

_SET_UNLESS_OLDER: Final = """
local found = redis.pcall('GETRANGE', KEYS[1], 0, 15)
if type(found) == 'string' and #found == 16 and string.sub(found, 1, 4) == 'PTF1' then
  local old_low, old_high = struct.unpack('<I4I4', found, 9)
  local low, high = struct.unpack('<I4I4', ARGV[1], 9)
  if old_high > high or (old_high == high and old_low > low) then return 1 end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call(ARGV[3], KEYS[1], ARGV[1])
return 0
"""
"""Stores and publishes a packed vector, unless its sequence (see `codec`) is lower than the stored one's; returns 1 for
refused. The sequence is compared in halves, since Lua's numbers do not hold 64 bits."""
_ITS_NAME: Final = hashlib.sha1(_SET_UNLESS_OLDER.encode(), usedforsecurity=False).hexdigest()
"""What Redis calls the script once it has run."""


def key_of(instrument: str, set_id: str = MF1.id) -> str:
    """The Redis key of an instrument's vector of a set, which is also the channel that the vector is published on."""
    return f"features:{set_id}:{{{instrument}}}"


def connect(redis_url: str, connect_timeout_seconds: float) -> Redis:
    """A client without retries of its own; nothing is connected before the first command.

    Its users have retry loops of their own and know better than the client when a retry is of use. They also bound the
    time of each command with `asyncio.timeout`. The client's own `socket_timeout` uses `asyncio.wait_for`, which in
    Python 3.11 can lose a cancellation, so that a cancelled task would go on.
    """
    return Redis.from_url(
        redis_url,
        socket_connect_timeout=connect_timeout_seconds,
        socket_timeout=None,
        retry=Retry(NoBackoff(), 0),
        driver_info=_DRIVER,
    )


def report_key_of(instrument: str) -> str:
    """The Redis key of an instrument's report."""
    return f"features.report:{{{instrument}}}"


def book_key_of(instrument: str) -> str:
    """The Redis key of an instrument's book, for people."""
    return f"features.book:{{{instrument}}}"


class FeatureStore:
    """The writing side.

    Args:
        redis: A client that returns bytes; not closed here.
        ttl_seconds: How long a vector stays when nothing newer replaces it.
        timeout_seconds: How long Redis may take to answer.
        sharded: Whether it is a node of a cluster.
    """

    def __init__(self, redis: Redis, ttl_seconds: float, timeout_seconds: float, *, sharded: bool = False) -> None:
        self._redis = redis
        self._publish = "SPUBLISH" if sharded else "PUBLISH"
        self._ttl_ms = round(ttl_seconds * 1000)
        self._timeout_seconds = timeout_seconds

    async def write(self, snapshots: Iterable[FeatureSnapshot]) -> int:
        """Stores and publishes vectors in one round trip. Cancelling may leave some of them written.

        Returns:
            How many were not stored because newer ones were there.

        Raises:
            RedisError: Redis refused or was lost; some may be written. Writing again is harmless.
            TimeoutError: Redis did not answer in time; the same.
        """
        async with asyncio.timeout(self._timeout_seconds), self._redis.pipeline(transaction=False) as pipeline:
            for snapshot in snapshots:
                key, packed = key_of(snapshot.instrument, snapshot.feature_set.id), encode(snapshot)
                arguments = (1, key, packed, self._ttl_ms, self._publish)
                # The first command of each write gives Redis the script, whatever Redis has forgotten by then.
                if len(pipeline) == 0:
                    pipeline.eval(_SET_UNLESS_OLDER, *arguments)
                else:
                    pipeline.evalsha(_ITS_NAME, *arguments)
            answers = await pipeline.execute()
        return sum(answers)

    async def write_texts(self, key_of: Callable[[str], str], texts: Mapping[str, str], life_ms: int) -> None:
        """Stores a text for each instrument under its key, for so many milliseconds. Raises as `write` does."""
        async with asyncio.timeout(self._timeout_seconds), self._redis.pipeline(transaction=False) as pipeline:
            for instrument, text in texts.items():
                pipeline.set(key_of(instrument), text, px=life_ms)
            await pipeline.execute()

    async def read_texts(self, key_of: Callable[[str], str], instruments: Sequence[str]) -> dict[str, bytes]:
        """The texts that there are, by instrument. Raises as `write` does; a value that is no text is none."""
        async with asyncio.timeout(self._timeout_seconds), self._redis.pipeline(transaction=False) as pipeline:
            for instrument in instruments:
                pipeline.get(key_of(instrument))
            values = await pipeline.execute(raise_on_error=False)
        for value in values:
            if isinstance(value, (AskError, ClusterError)):
                raise value
        pairs = zip(instruments, values, strict=True)
        return {instrument: value for instrument, value in pairs if isinstance(value, bytes)}

    async def check(self) -> None:
        """Sees whether Redis is there. Raises as `write` does."""
        async with asyncio.timeout(self._timeout_seconds):
            await self._redis.ping()
