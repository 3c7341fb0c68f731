"""The worker's side of the reports: every instrument's state to Redis, and to the log when it changes."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import Callable
from typing import Final

import structlog
from redis.exceptions import RedisError

from feature_cache.engine.book import CLOSED
from feature_cache.engine.engine import FeatureEngine
from feature_cache.features import MF1
from feature_cache.store.cluster import ClusterFeatureStore
from feature_cache.store.report import InstrumentReport
from feature_cache.store.vectors import FeatureStore, report_key_of
from feature_cache.worker.consumer import MarketEventConsumer
from feature_cache.worker.engines import Engines
from feature_cache.worker.settings import WorkerSettings

_INTERVAL_SECONDS: Final = 1.0
"""Between two reports of every instrument's state. People read them, in `pretrade status`."""
_LIFE_INTERVALS: Final = 5
_NAMED: Final = 3
_log = structlog.get_logger(__name__)


class Reporter:
    """Tells the state of every instrument, to Redis and, when it changes, to the log.

    Args:
        store: Where the reports go.
        engines: Whose instruments.
        consumer: Knows the lag.
        settings: See there.
        wall_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(
        self,
        store: FeatureStore | ClusterFeatureStore,
        engines: Engines,
        consumer: MarketEventConsumer,
        settings: WorkerSettings,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._store = store
        self._engines = engines
        self._consumer = consumer
        self._settings = settings
        self._wall_ns = wall_ns
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._logged: dict[str, tuple[str, int]] = {}
        self.failures = 0
        """Reports that Redis did not take."""

    @property
    def problem(self) -> str | None:
        """Why not every vector is good to decide on, for people; None when all are.

        All is well when the lag is known and small, every book is valid (or unknown because its feed was stopped on
        purpose), and every venue has sent something recently.
        """
        lag = dict(self._consumer.lag)
        live = self._engines.live()
        if not live.keys() <= lag.keys():
            return "lag not known yet"
        behind = max((lag[partition] for partition in live), default=0)
        if behind > self._settings.ready_lag_records:
            return f"{behind} records behind"
        unknown = [
            f"{name} ({reason})"
            for engines in live.values()
            for name, engine in engines.items()
            if (reason := engine.unknown_because) not in ("", CLOSED)
        ]
        if unknown:
            return f"book unknown: {', '.join(unknown[:_NAMED])}{' …' if len(unknown) > _NAMED else ''}"
        return self._silence(live)

    def _silence(self, live: dict[int, dict[str, FeatureEngine]]) -> str | None:
        """The venue that has been silent for too long, for people; None when there is none."""
        now_ns = self._wall_ns()
        ages: dict[str, float] = {}
        followed: set[str] = set()
        for engines in live.values():
            for name, engine in engines.items():
                venue = name.rpartition(".")[2]
                ages[venue] = min(ages.get(venue, math.inf), engine.age_seconds(now_ns))
                if engine.unknown_because != CLOSED:
                    followed.add(venue)
        oldest = max(followed, key=lambda venue: ages[venue], default=None)
        if oldest is None or ages[oldest] <= self._settings.ready_age_seconds:
            return None
        return f"newest event of {oldest} is {ages[oldest]:.0f} s old"

    async def run(self) -> None:
        """Reports for ever, through any outage of Redis; ends only by cancellation."""
        life_ms = round(_LIFE_INTERVALS * _INTERVAL_SECONDS * 1000)
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            reports = {
                name: self._report(partition, engine)
                for partition, engines in self._engines.live().items()
                for name, engine in engines.items()
            }
            self._log_changes(reports)
            try:
                texts = {name: report.model_dump_json() for name, report in reports.items()}
                await self._store.write_texts(report_key_of, texts, life_ms)
            except (RedisError, OSError):
                self.failures += 1  # the writer, which needs Redis too, has the words for it

    def _report(self, partition: int, engine: FeatureEngine) -> InstrumentReport:
        return InstrumentReport(
            worker=self._name,
            state=engine.state,
            unknown_because=engine.unknown_because,
            event_age_seconds=engine.age_seconds(self._wall_ns()),
            lag_records=self._consumer.lag.get(partition),
            vector_version=MF1.version,
            events=engine.events,
            gaps=engine.book.gaps,
            crossings=engine.book.crossings,
            resets=engine.resets,
            time_restarts=engine.time_restarts,
        )

    def _log_changes(self, reports: dict[str, InstrumentReport]) -> None:
        """One line for every book that became unknown since the last look, and one for every one that is back."""
        for name, report in reports.items():
            reason, losses = self._logged.get(name, ("", report.losses))
            if report.unknown_because and (report.unknown_because, report.losses) != (reason, losses):
                _log.warning("worker.book_unknown", instrument=name, reason=report.unknown_because, times=report.losses)
            elif report.losses > losses:
                _log.warning("worker.book_was_unknown", instrument=name, times=report.losses)
            elif reason and not report.unknown_because:
                _log.info("worker.book_known", instrument=name)
        self._logged = {name: (report.unknown_because, report.losses) for name, report in reports.items()}
