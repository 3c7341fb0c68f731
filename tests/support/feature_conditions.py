"""What tests of a running feature worker look at: a server's copy, the stored vectors and its health."""

from __future__ import annotations

import asyncio
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from redis.asyncio import Redis

from feature_cache.store.codec import BookState, CodecError, FeatureSnapshot, decode
from feature_cache.store.l1 import FeatureCache, FeatureCacheSettings
from feature_cache.store.vectors import key_of
from local.stack.stack import Stack
from support.followed_cache import following

TTL: Final = 3.0
"""Seconds for which `copy_of` serves a vector."""
Seen = Callable[[str], None]
"""The fixture `seen` of the fault tests."""


def url(stack: Stack) -> str:
    return str(stack.endpoints.redis_url)


@asynccontextmanager
async def copy_of(redis_url: str, names: tuple[str, ...]) -> AsyncIterator[FeatureCache]:
    """What a decision server holds."""
    settings = FeatureCacheSettings(ttl_seconds=TTL, reconcile_interval_seconds=0.2, timeout_seconds=0.3)
    async with following(FeatureCache(redis_url, settings, names)) as cache:
        yield cache


async def stored(redis: Redis, name: str) -> FeatureSnapshot | None:
    """The vector under an instrument's key; None when there is none, or something else."""
    (packed,) = await redis.mget([key_of(name)])
    try:
        return decode(packed) if isinstance(packed, bytes) else None
    except CodecError:
        return None


def fresh(cache: FeatureCache) -> bool:
    """Whether every instrument has a known book and a vector younger than a server asks for."""
    entries = [cache.get(name) for name in cache.instruments]
    now = time.monotonic()
    return all(e and e.snapshot.state is not BookState.UNKNOWN and e.age_seconds(now) < 0.5 for e in entries)


def gone(cache: FeatureCache) -> bool:
    return not any(cache.get(name) for name in cache.instruments)


def health(stack: Stack) -> str:
    try:
        with urllib.request.urlopen(f"{stack.endpoints.worker_url}/healthz", timeout=5) as answer:
            return str(answer.read().decode()).strip()
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode().strip()


async def until_health(stack: Stack, condition: Callable[[str], bool]) -> str:
    async with asyncio.timeout(60):
        while not condition(said := await asyncio.to_thread(health, stack)):  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.05)
    return said
