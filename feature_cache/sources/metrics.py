"""The metrics of a live feed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client.registry import Collector

from feature_cache.metrics import Counter, Gauge, declared

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from feature_cache.sources.ingest import Ingest

_INSTRUMENT: Final = ("instrument",)

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
"""Every metric of this folder, in the order of the page that explains them."""


class IngestCollector(Collector):
    """Builds the metrics of a live feed from its own counters when they are scraped."""

    def __init__(self, feed: Ingest) -> None:
        self._feed = feed

    def collect(self) -> Iterator[Metric]:
        """Every metric of the feed."""
        feed = self._feed
        yield INGEST_MESSAGES.family(feed.messages)
        yield INGEST_MESSAGES_REFUSED.family(feed.refused)
        yield INGEST_EVENTS.family(feed.events)
        yield INGEST_EVENTS_UNDELIVERED.family(feed.undelivered)
        yield INGEST_CONNECTIONS.family(feed.connects)
        yield INGEST_CONNECTIONS_LOST.family(feed.losses)
        yield INGEST_BOOK_DOUBTS.family(feed.doubts)
        yield INGEST_SNAPSHOT_REQUESTS.family(feed.requests)
        yield INGEST_SNAPSHOT_FAILURES.family(feed.request_failures)
        yield INGEST_CONNECTED.family(feed.connected)
        yield INGEST_NEWEST_EVENT_SECONDS.family(feed.newest_event_ns / 1e9)
        valid = INGEST_BOOK_VALID.family()
        for instrument, known in feed.books.items():
            valid.add_metric([instrument], known)
        yield valid
