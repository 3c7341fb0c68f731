"""The worker's report on each instrument: written about once a second, shown by `pretrade status`.

`features.report:{INSTRUMENT}` holds the newest report as JSON and expires when none follows. No decision depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError
from redis.exceptions import RedisError

from feature_cache.store.codec import BookState
from feature_cache.store.vectors import report_key_of

if TYPE_CHECKING:
    from feature_cache.store.cluster import ClusterFeatureStore
    from feature_cache.store.vectors import FeatureStore


class InstrumentReport(BaseModel):
    """One instrument as its worker sees it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

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


class ReportReader:
    """The reading side.

    Args:
        store: Where the reports are.
    """

    def __init__(self, store: FeatureStore | ClusterFeatureStore) -> None:
        self._store = store

    async def read(self, instruments: Sequence[str]) -> dict[str, InstrumentReport]:
        """The reports that there are; none at all while Redis does not answer. Never raises."""
        try:
            values = await self._store.read_texts(report_key_of, instruments)
        except (RedisError, OSError):
            return {}
        found = {}
        for name, value in values.items():
            try:
                found[name] = InstrumentReport.model_validate_json(value)
            except ValidationError:
                continue  # of another version of the worker, or not a report: treated as none
        return found
