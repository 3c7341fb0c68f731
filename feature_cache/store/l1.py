"""The decision server's in-process copy of the feature vectors.

`l1_c.pyx`, where it is compiled, takes the vectors that are plain, which almost all are; everything else comes here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, Final

import structlog
from pydantic import BaseModel, ConfigDict, Field
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from feature_cache.backoff import Backoff
from feature_cache.compiled import compiled
from feature_cache.constants import Constant
from feature_cache.ending import end
from feature_cache.feature_set import FeatureSet
from feature_cache.features import MF1
from feature_cache.store.burst import Bursts
from feature_cache.store.cluster import Cluster, is_cluster
from feature_cache.store.codec import CodecError, FeatureSnapshot, Heads, age_seconds, decode
from feature_cache.store.vectors import connect, key_of

_SILENT_CHECKS: Final = 3
_VECTORS: Final = (b"message", b"smessage")
"""Kinds of the messages that bring a vector."""
_log = structlog.get_logger(__name__)
_compiled: Final = compiled("feature_cache.store.l1_c")

Arrival = tuple[int, float]
"""When a vector came: nanoseconds since the Unix epoch, and seconds on a clock that never jumps."""


class FeatureCacheSettings(BaseModel):
    """How long the server uses feature vectors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ttl_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Age from exchange event time at which a vector is dropped, in seconds. It must not be below
    `features.max_age_seconds` to be of use."""
    max_clock_lead_seconds: Constant[float] = 1.0
    """How far a vector's publish time may be ahead of this host's clock, in seconds. A vector that is further ahead is
    not used, because its age cannot be known. Synchronised clocks differ by milliseconds."""
    reconcile_interval_seconds: Constant[float] = 1.0
    """Seconds between two readings of every key, which make up for lost notifications and show that Redis is alive."""
    timeout_seconds: Constant[float] = 0.5
    """Seconds after which a Redis that does not answer counts as lost."""
    reconnect_min_seconds: Constant[float] = 0.05
    """Seconds before the first attempt to reconnect; doubles with every failure, with jitter."""
    reconnect_max_seconds: Constant[float] = 2.0
    """Longest pause between two attempts, in seconds."""


class CachedFeatures:
    """A vector and what is needed to know its age; unpacked when somebody asks for it.

    Args:
        packed: The vector, checked by `codec.Heads`.
        sequence: Its sequence.
        age_at_receipt_seconds: Age from exchange event time when it was received, by the wall clock.
        received_monotonic: When it was received, on the monotonic clock, seconds.
    """

    __slots__ = ("_age_at_receipt_seconds", "_packed", "_received_monotonic", "_snapshot", "sequence")

    def __init__(self, packed: bytes, sequence: int, age_at_receipt_seconds: float, received_monotonic: float) -> None:
        self._packed = packed
        self._snapshot: FeatureSnapshot | None = None
        self._age_at_receipt_seconds = age_at_receipt_seconds
        self._received_monotonic = received_monotonic
        self.sequence = sequence

    @property
    def snapshot(self) -> FeatureSnapshot:
        """The vector; the same object every time."""
        if self._snapshot is None:
            self._snapshot = decode(self._packed)
        return self._snapshot

    def age_seconds(self, now_monotonic: float) -> float:
        """Age from exchange event time at an instant of the monotonic clock, whatever the wall clock did since."""
        return self._age_at_receipt_seconds + max(0.0, now_monotonic - self._received_monotonic)


class FeatureCache:
    """Follows one feature set in Redis in the background and answers from memory.

    `run` subscribes, then reads every key, then takes updates as they come and reads every key again now and then. An
    update never replaces one of the same or a higher sequence, unless that one has outlived its TTL. Without Redis the
    cache goes on answering until the TTL has passed.

    Args:
        redis_url: The Redis or Redis Cluster that the feature worker writes to.
        settings: See there.
        instruments: The instruments to follow; others are ignored.
        feature_set: The set to follow. Every set has a cache and connections of its own, so that no guest's vectors
            ever hold up those of `mf1`.
        monotonic: Seconds on a clock that never jumps.
        wall_ns: Nanoseconds since the Unix epoch.
        uniform: Uniform in [0, 1).
    """

    def __init__(
        self,
        redis_url: str,
        settings: FeatureCacheSettings,
        instruments: Iterable[str],
        feature_set: FeatureSet = MF1,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self.feature_set: Final = feature_set
        self.heads: Final = Heads(feature_set)
        self._redis_url = redis_url
        self._settings = settings
        self._ttl_seconds = settings.ttl_seconds
        self._max_lead_ns = round(1e9 * settings.max_clock_lead_seconds)
        self._entries: dict[str, CachedFeatures | None] = dict.fromkeys(instruments)
        self._names = {name.encode(): name for name in self._entries}
        self._monotonic = monotonic
        self._wall_ns = wall_ns
        self._uniform = uniform
        self._followed: set[str] = set()
        self.updates = 0
        """Vectors taken over."""
        self.outdated = 0
        """Vectors refused because a newer one was there."""
        self.rejected = 0
        """Values that were not a vector of this feature set."""
        self.expired = 0
        """Vectors dropped because of their age."""
        self.ahead = 0
        """Vectors refused because the clocks disagree: see `max_clock_lead_seconds`."""
        self.disconnects = 0
        """Times Redis was lost or not reached."""
        self.plain: Any = None if _compiled is None else _compiled.Plain(self, CachedFeatures)
        """Takes most vectors in compiled code; None where that is not there."""

    @property
    def instruments(self) -> tuple[str, ...]:
        """The instruments that are followed."""
        return tuple(self._entries)

    @property
    def connected(self) -> bool:
        """Whether Redis is being followed: subscribed, and every key read at least once since."""
        return self._followed.issuperset(self._entries)

    def get(self, instrument: str) -> CachedFeatures | None:
        """The newest vector of an instrument, from memory; None when there is none within its TTL."""
        entry = self._entries.get(instrument)
        if entry is None:
            return None
        if entry.age_seconds(self._monotonic()) > self._settings.ttl_seconds:
            self._entries[instrument] = None
            self.expired += 1
            return None
        return entry

    def accept(self, packed: bytes, arrival: Arrival | None = None) -> bool:
        """Takes one packed vector in.

        Args:
            packed: The vector.
            arrival: When it came; now by default.

        Returns:
            Whether it is now the one that `get` gives; what is refused is counted.
        """
        now_ns, now = arrival or self._now()
        try:
            name, sequence, publish_time_ns, transit_ns = self.heads.read(packed)
        except CodecError as error:
            self.rejected += 1
            _log.warning("features.rejected", set=self.feature_set.id, reason=str(error))
            return False
        instrument = self._names.get(name)
        if instrument is None:
            return False
        current = self._entries[instrument]
        if current is not None and sequence <= current.sequence and self.get(instrument) is not None:
            self.outdated += sequence < current.sequence
            return False
        if publish_time_ns - now_ns > self._max_lead_ns:
            self.ahead += 1
            if self.ahead.bit_count() == 1:  # the 1st, 2nd, 4th …: there are hundreds a second of them
                lead = round((publish_time_ns - now_ns) / 1e9, 3)
                _log.warning("features.clocks_disagree", instrument=instrument, lead_seconds=lead)
            return False
        age = age_seconds(publish_time_ns, transit_ns, now_ns)
        if age > self._ttl_seconds:
            self.expired += 1
            return False
        self._entries[instrument] = CachedFeatures(packed, sequence, age, now)
        self.updates += 1
        return True

    def _now(self) -> Arrival:
        return self._wall_ns(), self._monotonic()

    async def run(self) -> None:
        """Follows Redis for ever, through any outage of it; ends only by cancellation, which is safe at any point."""
        if is_cluster(self._redis_url):
            await self._follow_cluster()
        else:
            await self._keep_following(
                lambda: connect(self._redis_url, self._settings.timeout_seconds), tuple(self._entries), sharded=False
            )

    async def _follow_cluster(self) -> None:
        """Follows each node by itself, and sees every now and then which node holds which instruments."""
        cluster = Cluster(self._redis_url, self._settings.timeout_seconds)
        followers: dict[tuple[str, tuple[str, ...]], asyncio.Task[None]] = {}
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    try:
                        await cluster.discover()
                    except RedisError:
                        self.disconnects += 1  # what was known of the nodes stands
                    wanted = {(node, tuple(names)) for node, names in cluster.by_node(self._entries).items() if node}
                    for gone in followers.keys() - wanted:
                        await end([followers.pop(gone)])
                    for node, names in wanted - followers.keys():
                        connecting = partial(cluster.new_client, node)
                        followers[node, names] = tasks.create_task(
                            self._keep_following(connecting, names, sharded=True)
                        )
                    await asyncio.sleep(self._settings.reconcile_interval_seconds)
        finally:
            await cluster.aclose()

    async def _keep_following(self, new_client: Callable[[], Redis], names: tuple[str, ...], *, sharded: bool) -> None:
        settings = self._settings
        backoff = Backoff(settings.reconnect_min_seconds, settings.reconnect_max_seconds, uniform=self._uniform)
        while True:
            try:
                await self._follow(new_client(), names, sharded=sharded)
            except (RedisError, OSError) as error:
                if self._followed.issuperset(names):
                    backoff.reset()
                    _log.warning("features.redis_lost", error=repr(error), instruments=len(names))
                self.disconnects += 1
            finally:
                self._followed.difference_update(names)
            await asyncio.sleep(backoff.next_pause())

    async def _follow(self, redis: Redis, names: tuple[str, ...], *, sharded: bool) -> None:
        pubsub = redis.pubsub()
        try:
            await self._follow_with(redis, pubsub, names, sharded=sharded)
        finally:
            # Whatever goes wrong here must not replace what ended the following, a cancellation above all.
            for client in (pubsub, redis):
                with contextlib.suppress(RedisError, OSError):
                    await client.aclose()

    async def _follow_with(self, redis: Redis, pubsub: PubSub, names: tuple[str, ...], *, sharded: bool) -> None:
        keys = [key_of(instrument, self.feature_set.id) for instrument in names]
        async with asyncio.timeout(self._settings.timeout_seconds):
            if sharded:
                for key in keys:  # one by one: a command must not name two slots
                    await pubsub.ssubscribe(key)
            else:
                await pubsub.subscribe(*keys)
        bursts = Bursts(pubsub, self.take)
        unanswered = 0
        while True:
            # A subscription can die without a sign; a ping on it that is never answered shows it.
            if unanswered == _SILENT_CHECKS:
                raise ConnectionError("the subscription does not answer")
            bursts.heard = False
            async with asyncio.timeout(self._settings.timeout_seconds):
                await pubsub.ping()
                stored = await _read(redis, keys, sharded=sharded)
            unanswered += 1
            for packed in stored:
                if isinstance(packed, bytes):
                    self.accept(packed)
            if not self._followed.issuperset(names):
                self._followed.update(names)
                _log.info("features.redis_followed", instruments=len(names))
            await bursts.run(self._settings.reconcile_interval_seconds)
            if bursts.heard:
                unanswered = 0

    def take(self, messages: Iterable[Any]) -> None:
        """Takes what a subscription received at once."""
        accept, arrival = self.accept, self._now()
        if self.plain is not None:
            messages = self.plain.others(messages, *arrival)
        for message in messages:
            if not isinstance(message, list):
                continue  # it answers a ping
            kind = message[0]
            if kind in _VECTORS:
                accept(message[2], arrival)
            elif kind == b"sunsubscribe":
                raise ConnectionError("the node no longer holds the slot")


async def _read(redis: Redis, keys: list[str], *, sharded: bool) -> list[object]:
    """The values of some keys, None for what is no string."""
    if not keys:
        return []
    if not sharded:
        return list(await redis.mget(keys))
    async with redis.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.mget(key)  # one by one: a command must not name two slots
        return [value for values in await pipeline.execute() for value in values]
