"""All settings of the feature worker, from `PRETRADE_WORKER_*` environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from feature_cache import feature_sets, kafka
from feature_cache.feature_sets import Registered
from feature_cache.store import cluster

PREFIX: Final = "PRETRADE_WORKER_"


class WorkerSettings(BaseSettings):
    """A wrong value refuses to start."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """URL of the Redis to write to; a Redis Cluster, version 7 or later, is
    `redis+cluster://[user:password@]host:port,host:port…` (`rediss+cluster` with TLS), naming some of its nodes."""
    ttl_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 10.0
    """Seconds a vector stays in Redis when nothing newer replaces it."""
    flush_interval_seconds: Annotated[float, Field(gt=0, le=1)] = 0.002
    """Seconds from the beginning of a write to Redis to that of the next, at least; each writes the newest vector of
    every instrument that changed. After a pause a change is written at once."""
    kafka_bootstrap_servers: Annotated[str, Field(pattern=r"^[^\s@/]+$")] = "127.0.0.1:9092"
    """Comma-separated `host:port` of the brokers. TLS, name and password are in `PRETRADE_KAFKA_*`."""
    kafka_topic: str = "market.events"
    """Topic of the market events; created with `kafka_partitions` partitions when it is missing."""
    kafka_partitions: Annotated[int, Field(ge=1, le=1000)] = 4
    """Partitions of a topic that this worker creates."""
    kafka_replicas: Annotated[int, Field(ge=1, le=10)] = 1
    """Copies of each partition of a topic that this worker creates."""
    kafka_group: str = "pretrade-features"
    """Consumer group; workers of one group share the partitions."""
    rewind_seconds: Annotated[float, Field(ge=0, le=86_400)] = 45.0
    """Seconds of the log that are read again when a partition is taken over: the longest window and the feed's
    interval between two snapshots must fit."""
    poll_interval_seconds: Annotated[float, Field(ge=0, le=1)] = 0.002
    """Seconds between two readings of the topic once all there was has been read; fewer readings are less work for the
    brokers and for the worker."""
    fetch_wait_seconds: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Seconds, in whole milliseconds, for which brokers may hold back the answer to a fetch that finds nothing new.
    Apache Kafka answers as soon as something comes; the embedded broker lets them pass, where they are latency."""
    book_levels: Annotated[int, Field(ge=0, le=100)] = 10
    """Levels of each side of a book that are written to Redis for people to look at, in the console; no decision uses
    them. 0 writes none."""
    book_interval_seconds: Annotated[float, Field(ge=0.1, le=60)] = 0.5
    """Seconds between two such writes of one book. One takes about 40 µs of the worker, which writes at most 200 a
    second: each of a thousand books comes every five seconds."""
    max_instruments: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Instruments kept; events of further ones are poison."""
    features_file: Path | None = None
    """Python file with feature sets of your own, in a list `FEATURE_SETS`, whose own features this worker computes; see
    docs/feature-sets.md. The decision servers need the same one as `PRETRADE_FEATURES__FILE`."""
    computed_sets: tuple[str, ...] = ()
    """Ids of further feature sets that this worker computes, of installed packages; a JSON list. Those of
    `features_file` are computed in any case."""
    ready_lag_records: Annotated[int, Field(ge=0, le=10**9)] = 10_000
    """Records between position and end of a partition's log beyond which the worker is not ready."""
    ready_age_seconds: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Seconds since the newest event of any instrument of a venue beyond which the worker is not ready. One instrument
    may trade rarely, all of a venue do not; a feed that was stopped on purpose does not count."""
    metrics_host: str = "127.0.0.1"
    """Address on which `/metrics`, `/healthz` and `/readyz` are served."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of `/metrics`, `/healthz` and `/readyz`; 0 serves none of them."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is logged."""

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, url: SecretStr) -> SecretStr:
        cluster.check_url(url.get_secret_value())
        return url


def load() -> WorkerSettings:
    """Reads the settings.

    Raises:
        pydantic.ValidationError: A value breaks its rule.
        ValueError: A `PRETRADE_WORKER_*` variable names no setting, or those of `feature_cache/kafka.py` or a feature
            set are wrong.
    """
    unknown = sorted(
        name
        for name in os.environ
        if name.upper().startswith(PREFIX)
        and name.upper().removeprefix(PREFIX).lower() not in WorkerSettings.model_fields
    )
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(unknown)}")
    settings = WorkerSettings()
    computed_by(settings)
    try:
        kafka.client(settings.kafka_bootstrap_servers)
    except kafka.KafkaSecurityError as error:
        raise ValueError(str(error)) from None
    return settings


def computed_by(settings: WorkerSettings) -> list[Registered]:
    """The feature sets that a worker with these settings computes, besides `mf1`.

    Raises:
        ValueError: A set is wrong or not known, or has nothing to compute.
    """
    sets = feature_sets.load(settings.features_file)
    for set_id in settings.computed_sets:
        named = sets.by_id(set_id)
        if named is None or named.make is None:
            computed = ", ".join(one.feature_set.id for one in sets if one.make is not None) or "none is"
            raise ValueError(f"{PREFIX}COMPUTED_SETS: {set_id!r} is no computed set known here; {computed}")
    named_too, file = settings.computed_sets, str(settings.features_file)
    return [one for one in sets if one.make is not None and (one.origin == file or one.feature_set.id in named_too)]
