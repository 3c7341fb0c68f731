"""Market data for the stack: a recorded session in a loop, or the simulator."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import redis

from feature_cache.sources import session, simulator
from feature_cache.sources.simulated.scenarios import ScenarioName
from feature_cache.store.cluster import is_cluster, node_urls
from feature_cache.store.codec import CodecError, decode
from feature_cache.store.vectors import key_of
from local.stack.errors import NotReadyError
from pretrade.client.stack_file import Endpoints


def instruments(data: Path | None) -> tuple[str, ...]:
    """The instruments that the market data is about.

    Raises:
        feature_cache.sources.session.SessionError: There is no recording in `data`.
    """
    if data is None:
        return simulator.INSTRUMENTS
    return tuple(session.instruments(session.session_files([data])))


def argv(endpoints: Endpoints, data: Path | None, speed: str, scenario: ScenarioName) -> list[str]:
    """Publishes market data of the stack's instruments for ever; there is a Kafka."""
    assert endpoints.kafka_bootstrap_servers is not None
    # The embedded broker lists every batch it holds for every fetch: fewer batches keep it quick for longer.
    options = ["--speed", speed, "--kafka", endpoints.kafka_bootstrap_servers, "--linger-ms", "50"]
    for instrument in endpoints.instruments:
        options += ["--instruments", instrument]
    source = ["simulate", "--scenario", scenario] if data is None else ["replay", str(data.resolve()), "--loop"]
    return [sys.executable, "-m", "feature_cache.sources.cli", *source, *options]


def ready(endpoints: Endpoints) -> None:
    """Looks for the features of every instrument in Redis: the whole way from the feed to the cache works.

    Raises:
        NotReadyError: Some are missing.
    """
    if endpoints.redis_url is None:
        return
    try:
        with _client(endpoints.redis_url) as client:
            missing = [name for name in endpoints.instruments if not client.exists(key_of(name))]
    except redis.RedisError as error:
        raise NotReadyError(str(error)) from error
    if missing:
        raise NotReadyError(f"no features of {', '.join(missing)}")


def mid(endpoints: Endpoints, instrument: str) -> float | None:
    """The current mid of an instrument, in its quote currency; None when it is not known."""
    if endpoints.redis_url is None:
        return None
    try:
        with _client(endpoints.redis_url) as client:
            packed = client.get(key_of(instrument))
        found = decode(packed).mid if isinstance(packed, bytes) else math.nan
    except (redis.RedisError, CodecError):
        return None
    return found if math.isfinite(found) else None


def _client(redis_url: str) -> redis.Redis | redis.RedisCluster:
    if is_cluster(redis_url):
        return redis.RedisCluster.from_url(node_urls(redis_url)[0], socket_timeout=1.0)
    return redis.Redis.from_url(redis_url, socket_timeout=1.0)
