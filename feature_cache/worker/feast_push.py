"""Pushes feature vectors to a Feast feature server, beside the worker's own path and without delaying it."""

from __future__ import annotations

import asyncio
import json
import math
import urllib.request
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from feature_cache.features import FEATURE_SET_ID, NAMES
from feature_cache.store.codec import FeatureSnapshot
from feature_cache.worker.engines import Engines

_TIMEOUT_SECONDS: Final = 10.0
_INTERVAL_SECONDS: Final = 1.0
"""Training needs no finer history, and a push costs the feature server an HTTP request and a write per instrument."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_log = structlog.get_logger(__name__)


class FeastPush:
    """Pushes the newest vector of each instrument that changed, every so often, to Feast's stores.

    It looks at the engines by itself and talks HTTP from a thread. What cannot be pushed is dropped and counted: the
    next push carries newer vectors.

    Args:
        url: Base URL of `feast serve` with the repository in `feature_repo/`.
        engines: Where the vectors come from.
        interval_seconds: Between two pushes.
    """

    def __init__(self, url: str, engines: Engines, interval_seconds: float = _INTERVAL_SECONDS) -> None:
        self._url = f"{url.rstrip('/')}/push"
        self._engines = engines
        self._interval_seconds = interval_seconds
        self._sequences: dict[str, int] = {}
        self._reached = True
        self.pushed = 0
        """Vectors that Feast took."""
        self.failures = 0
        """Pushes that Feast refused or did not answer."""

    async def run(self) -> None:
        """Pushes for ever, through any outage of Feast; ends only by cancellation."""
        while True:
            await asyncio.sleep(self._interval_seconds)
            if not self._engines.caught_up:
                continue
            snapshots = [engine.snapshot() for engine in self._engines.all().values()]
            news = [one for one in snapshots if self._sequences.get(one.instrument) != one.sequence]
            if not news:
                continue
            self._sequences = {one.instrument: one.sequence for one in snapshots}
            try:
                await asyncio.to_thread(_post, self._url, to_request(news))
            except OSError as error:
                self.failures += 1
                if self._reached:
                    _log.warning("worker.feast_lost", error=repr(error))
                self._reached = False
            else:
                self.pushed += len(news)
                if not self._reached:
                    _log.info("worker.feast_reached")
                self._reached = True


def to_request(snapshots: Iterable[FeatureSnapshot]) -> bytes:
    """The body of Feast's `/push`: a frame by columns, undefined features as null, times in microseconds."""
    rows = list(snapshots)
    columns: dict[str, list[object]] = {
        "instrument": [row.instrument for row in rows],
        "event_timestamp": [
            (_EPOCH + timedelta(microseconds=row.event_time_ns // 1000)).isoformat(timespec="microseconds")
            for row in rows
        ],
    }
    for index, name in enumerate(NAMES):
        values = [float(row.values[index]) for row in rows]
        columns[name] = [value if math.isfinite(value) else None for value in values]
    return json.dumps({"push_source_name": FEATURE_SET_ID, "df": columns, "to": "online_and_offline"}).encode()


def _post(url: str, body: bytes) -> None:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310 — set by the operator
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):  # noqa: S310
        pass
