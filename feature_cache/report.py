"""What the worker knows of each instrument beside its features: told about once a second, read by `pretrade status`.

`features.report:{INSTRUMENT}` holds the newest report as JSON and expires when none follows. Nothing decides on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from feature_cache.codec import BookState


class InstrumentReport(BaseModel):
    """One instrument as its worker sees it."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    worker: str
    """`host:pid`."""
    state: BookState
    unknown_because: str
    """Why the book is unknown, for people; empty while it is known."""
    event_age_seconds: float
    """Age of the newest event from exchange time."""
    lag_records: int | None
    """Records between position and end of the partition's log; None before they were counted."""
    vector_version: str
    """Feature set and fingerprint."""
    events: int
    gaps: int
    crossings: int
    resets: int
    time_restarts: int

    @property
    def losses(self) -> int:
        """Times the book became unknown."""
        return self.gaps + self.crossings + self.resets + self.time_restarts


def key_of(instrument: str) -> str:
    """The Redis key of an instrument's report."""
    return f"features.report:{{{instrument}}}"


class ReportReader:
    """The reading side.

    Args:
        redis: A client that returns bytes; not closed here.
        timeout_seconds: How long Redis may take to answer.
    """

    def __init__(self, redis: Redis, timeout_seconds: float) -> None:
        self._redis = redis
        self._timeout_seconds = timeout_seconds

    async def read(self, instruments: Iterable[str]) -> dict[str, InstrumentReport]:
        """The reports that there are; none at all while Redis does not answer. Never raises."""
        names = list(instruments)
        try:
            async with (
                asyncio.timeout(self._timeout_seconds),
                self._redis.pipeline(transaction=False) as pipeline,
            ):
                for name in names:
                    pipeline.get(key_of(name))
                values = await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError):
            return {}
        found = {}
        for name, value in zip(names, values, strict=True):
            if isinstance(value, bytes):
                try:
                    found[name] = InstrumentReport.model_validate_json(value)
                except ValidationError:
                    continue  # of another version of the worker, or nobody's: as good as none
        return found
