"""Every metric of the feature worker and of a live feed, and what a metric is.

What is declared is what a scrape shows and what `docs/metrics.md` says: collectors fill families in, and name none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily


@dataclass(frozen=True, slots=True)
class _Declared:
    name: str
    meaning: str
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """The base unit, which the name ends with where there is one."""
        suffix = self.name.rsplit("_", 1)[-1]
        return suffix if suffix in {"seconds", "bytes"} else "0 or 1" if self.meaning.startswith("1 ") else "count"


@dataclass(frozen=True, slots=True)
class Counter(_Declared):
    """Only grows while the process lives."""

    kind: ClassVar[str] = "counter"

    @property
    def scraped_name(self) -> str:
        """What a query calls it."""
        return f"{self.name}_total"

    def family(self, value: float | None = None) -> CounterMetricFamily:
        """Its family, with its only sample where there are no labels."""
        return CounterMetricFamily(self.name, self.meaning, value, None if value is not None else self.labels)


@dataclass(frozen=True, slots=True)
class Gauge(_Declared):
    """Goes up and down."""

    kind: ClassVar[str] = "gauge"

    @property
    def scraped_name(self) -> str:
        """What a query calls it."""
        return self.name

    def family(self, value: float | None = None) -> GaugeMetricFamily:
        """Its family, with its only sample where there are no labels."""
        return GaugeMetricFamily(self.name, self.meaning, value, None if value is not None else self.labels)


@dataclass(frozen=True, slots=True)
class Histogram(_Declared):
    """Counts of observations by bucket; a time's buckets are the budgets."""

    edges: tuple[float, ...] = ()
    """Upper edges of its buckets where it is no time."""

    kind: ClassVar[str] = "histogram"

    @property
    def scraped_name(self) -> str:
        """What a query calls it, before `_bucket`, `_sum` and `_count`."""
        return self.name

    def family(self) -> HistogramMetricFamily:
        """Its family, still empty."""
        return HistogramMetricFamily(self.name, self.meaning, labels=self.labels)


Declaration = Counter | Gauge | Histogram


def declared(module: Mapping[str, object]) -> tuple[Declaration, ...]:
    """The metrics that a module declares at its top, in their order."""
    return tuple(each for each in module.values() if isinstance(each, Counter | Gauge | Histogram))


_INSTRUMENT: Final = ("instrument",)

WORKER_EVENTS: Final = Counter("pretrade_worker_events", "Market events taken in, stale ones included.", _INSTRUMENT)
WORKER_BOOK_GAPS: Final = Counter(
    "pretrade_worker_book_gaps", "Times the update ids of the book did not follow on.", _INSTRUMENT
)
WORKER_BOOK_CROSSINGS: Final = Counter(
    "pretrade_worker_book_crossings", "Times the best bid was above the best ask.", _INSTRUMENT
)
WORKER_STALE_EVENTS: Final = Counter(
    "pretrade_worker_stale_events", "Events that were not newer than what was known.", _INSTRUMENT
)
WORKER_FUTURE_EVENTS: Final = Counter(
    "pretrade_worker_future_events", "Events too far ahead of their feed's clock.", _INSTRUMENT
)
WORKER_TIME_RESTARTS: Final = Counter(
    "pretrade_worker_time_restarts", "Times the windows began anew because event time ran back.", _INSTRUMENT
)
WORKER_FEED_RESETS: Final = Counter(
    "pretrade_worker_feed_resets", "Times the feed said it had lost continuity.", _INSTRUMENT
)
WORKER_BOOK_VALID: Final = Gauge("pretrade_worker_book_valid", "1 while the book is known.", _INSTRUMENT)
WORKER_EVENT_AGE_SECONDS: Final = Gauge(
    "pretrade_worker_event_age_seconds", "Age of the newest event from exchange time.", _INSTRUMENT
)
WORKER_POISON_RECORDS: Final = Counter(
    "pretrade_worker_poison_records", "Records that no retry makes good.", ("reason",)
)
WORKER_LAG_RECORDS: Final = Gauge(
    "pretrade_worker_lag_records", "Records between position and end of the log.", ("partition",)
)
WORKER_VECTORS_WRITTEN: Final = Counter("pretrade_worker_vectors_written", "Vectors written to Redis.")
WORKER_VECTORS_REFUSED: Final = Counter(
    "pretrade_worker_vectors_refused", "Vectors older than those another worker wrote."
)
WORKER_REDIS_FAILURES: Final = Counter(
    "pretrade_worker_redis_failures", "Writes or pings that Redis refused or did not answer."
)
WORKER_KAFKA_FAILURES: Final = Counter("pretrade_worker_kafka_failures", "Times the brokers refused or did not answer.")
WORKER_LOG_TRUNCATIONS: Final = Counter(
    "pretrade_worker_log_truncations", "Times the log no longer reached the position."
)
WORKER_RECORDS_REPEATED: Final = Counter(
    "pretrade_worker_records_repeated", "Records that had been taken before, and were ignored."
)
WORKER_REPORT_FAILURES: Final = Counter("pretrade_worker_report_failures", "Reports that Redis did not take.")
WORKER_DEAD_LETTERS_SENT: Final = Counter(
    "pretrade_worker_dead_letters_sent", "Poison records sent to the dead-letter topic."
)
WORKER_DEAD_LETTERS_DROPPED: Final = Counter(
    "pretrade_worker_dead_letters_dropped", "Poison records that could not be sent there."
)
WORKER_FEAST_PUSHED: Final = Counter("pretrade_worker_feast_pushed", "Vectors that Feast took.")
WORKER_FEAST_FAILURES: Final = Counter("pretrade_worker_feast_failures", "Pushes that Feast refused or did not answer.")

INGEST_MESSAGES: Final = Counter("pretrade_ingest_messages", "Messages received.")
INGEST_MESSAGES_REFUSED: Final = Counter(
    "pretrade_ingest_messages_refused", "Messages that were not what the venue documents."
)
INGEST_EVENTS: Final = Counter("pretrade_ingest_events", "Events published.")
INGEST_EVENTS_UNDELIVERED: Final = Counter(
    "pretrade_ingest_events_undelivered", "Events that the brokers did not take."
)
INGEST_CONNECTIONS: Final = Counter("pretrade_ingest_connections", "Connections made.")
INGEST_CONNECTIONS_LOST: Final = Counter(
    "pretrade_ingest_connections_lost", "Connections lost, and attempts that failed."
)
INGEST_BOOK_DOUBTS: Final = Counter("pretrade_ingest_book_doubts", "Times a book was found not to be the exchange's.")
INGEST_SNAPSHOT_REQUESTS: Final = Counter("pretrade_ingest_snapshot_requests", "Snapshots asked for.")
INGEST_SNAPSHOT_FAILURES: Final = Counter(
    "pretrade_ingest_snapshot_failures", "Snapshots that did not come, or could not be used."
)
INGEST_CONNECTED: Final = Gauge("pretrade_ingest_connected", "Connections that stand.")
INGEST_NEWEST_EVENT_SECONDS: Final = Gauge(
    "pretrade_ingest_newest_event_seconds", "Exchange time of the newest event, since the Unix epoch."
)
INGEST_BOOK_VALID: Final = Gauge("pretrade_ingest_book_valid", "1 while the book is known.", _INSTRUMENT)

METRICS: Final = declared(globals())
