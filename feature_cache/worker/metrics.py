"""The metrics of the feature worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client.registry import Collector

from feature_cache.metrics import Counter, Gauge, Histogram, declared
from feature_cache.store.codec import BookState
from feature_cache.worker.delays import EDGES_SECONDS

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from feature_cache.worker.books import BookPublisher
    from feature_cache.worker.consumer import DeadLetters, MarketEventConsumer
    from feature_cache.worker.engines import Engines
    from feature_cache.worker.guests import Guest, Guests
    from feature_cache.worker.reporter import Reporter
    from feature_cache.worker.writer import FeatureWriter

_INSTRUMENT: Final = ("instrument",)
_SET: Final = ("set",)

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
    "pretrade_worker_time_restarts", "Times that the windows started again because event time ran back.", _INSTRUMENT
)
WORKER_FEED_RESETS: Final = Counter(
    "pretrade_worker_feed_resets", "Times the feed said it had lost continuity.", _INSTRUMENT
)
WORKER_BOOK_VALID: Final = Gauge("pretrade_worker_book_valid", "1 while the book is known.", _INSTRUMENT)
WORKER_EVENT_AGE_SECONDS: Final = Gauge(
    "pretrade_worker_event_age_seconds", "Age of the newest event from exchange time.", _INSTRUMENT
)
WORKER_EVENT_DELAY_SECONDS: Final = Histogram(
    "pretrade_worker_event_delay_seconds",
    "From the publication of an event until the worker has read it, and until Redis has a vector that includes it.",
    ("step",),
    EDGES_SECONDS,
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
WORKER_BOOKS_WRITTEN: Final = Counter("pretrade_worker_books_written", "Books written to Redis for people to look at.")
WORKER_BOOK_FAILURES: Final = Counter(
    "pretrade_worker_book_failures", "Writes of books, some at once, that Redis did not take."
)
WORKER_DEAD_LETTERS_SENT: Final = Counter(
    "pretrade_worker_dead_letters_sent", "Poison records sent to the dead-letter topic."
)
WORKER_DEAD_LETTERS_DROPPED: Final = Counter(
    "pretrade_worker_dead_letters_dropped", "Poison records that could not be sent there."
)
WORKER_SET_EVENTS: Final = Counter("pretrade_worker_set_events", "Events that a computed set has taken in.", _SET)
WORKER_SET_WAITING: Final = Gauge(
    "pretrade_worker_set_waiting_events", "Events that a computed set has not taken in yet.", _SET
)
WORKER_SET_DROPPED: Final = Counter(
    "pretrade_worker_set_dropped",
    "Events that a computed set was not shown because it was suspended, or that were lost with its process.",
    _SET,
)
WORKER_SET_VECTORS: Final = Counter("pretrade_worker_set_vectors", "Vectors that a computed set gave.", _SET)
WORKER_SET_CPU_SECONDS: Final = Counter(
    "pretrade_worker_set_cpu_seconds", "CPU time that the processes of a computed set took.", _SET
)
WORKER_SET_SUSPENSIONS: Final = Counter(
    "pretrade_worker_set_suspensions",
    "Times that a computed set was suspended: it raised, gave impossible values, was stuck in a call, or fell behind, "
    "or its process died.",
    (*_SET, "reason"),
)
WORKER_SET_SUSPENDED: Final = Gauge("pretrade_worker_set_suspended", "1 while a computed set is suspended.", _SET)

METRICS: Final = declared(globals())
"""Every metric of this folder, in the order of the page that explains them."""


class WorkerCollector(Collector):
    """Builds the metrics from the components' own counters when they are scraped, which costs events nothing.

    Counters of an instrument begin again at 0 when its partition is taken over.
    """

    def __init__(
        self,
        engines: Engines,
        consumer: MarketEventConsumer,
        writer: FeatureWriter,
        dead_letters: DeadLetters,
        reporter: Reporter,
        books: BookPublisher,
        guests: Guests | None = None,
    ) -> None:
        self._engines = engines
        self._consumer = consumer
        self._writer = writer
        self._dead_letters = dead_letters
        self._reporter = reporter
        self._books = books
        self._guests = () if guests is None else guests.all

    def collect(self) -> Iterator[Metric]:
        """Every metric of the worker."""
        yield from self._instruments()
        yield self._delays()
        poison = WORKER_POISON_RECORDS.family()
        for reason, count in dict(self._engines.poison).items():
            poison.add_metric([reason], count)
        yield poison
        lag = WORKER_LAG_RECORDS.family()
        for partition, records in dict(self._consumer.lag).items():
            lag.add_metric([str(partition)], records)
        yield lag
        yield WORKER_VECTORS_WRITTEN.family(self._writer.written)
        yield WORKER_VECTORS_REFUSED.family(self._writer.refused)
        yield WORKER_REDIS_FAILURES.family(self._writer.failures)
        yield WORKER_KAFKA_FAILURES.family(self._consumer.failures)
        yield WORKER_LOG_TRUNCATIONS.family(self._engines.truncations)
        yield WORKER_RECORDS_REPEATED.family(self._engines.repeats)
        yield WORKER_REPORT_FAILURES.family(self._reporter.failures)
        yield WORKER_BOOKS_WRITTEN.family(self._books.written)
        yield WORKER_BOOK_FAILURES.family(self._books.failures)
        yield WORKER_DEAD_LETTERS_SENT.family(self._dead_letters.sent)
        yield WORKER_DEAD_LETTERS_DROPPED.family(self._dead_letters.dropped)
        yield from self._sets()

    def _sets(self) -> Iterator[Metric]:
        suspensions = WORKER_SET_SUSPENSIONS.family()
        for guest in self._guests:
            for reason, count in dict(guest.suspensions).items():
                suspensions.add_metric([guest.feature_set.id, reason], count)
        yield suspensions
        by_set: tuple[tuple[Counter | Gauge, Callable[[Guest], float]], ...] = (
            (WORKER_SET_EVENTS, lambda guest: guest.events),
            (WORKER_SET_WAITING, lambda guest: guest.waiting),
            (WORKER_SET_DROPPED, lambda guest: guest.dropped),
            (WORKER_SET_VECTORS, lambda guest: guest.vectors),
            (WORKER_SET_CPU_SECONDS, lambda guest: guest.seconds),
            (WORKER_SET_SUSPENDED, lambda guest: guest.suspended),
        )
        for declared_metric, value_of in by_set:
            family = declared_metric.family()
            for guest in self._guests:
                family.add_metric([guest.feature_set.id], value_of(guest))
            yield family

    def _delays(self) -> Metric:
        delays = WORKER_EVENT_DELAY_SECONDS.family()
        for step, histogram in (("read", self._engines.delays.read), ("written", self._engines.delays.written)):
            edges = (*map(str, EDGES_SECONDS), "+Inf")
            buckets = list(zip(edges, map(int, histogram.counts.cumsum()), strict=True))
            delays.add_metric([step], buckets, histogram.sum_seconds)
        return delays

    def _instruments(self) -> Iterator[Metric]:
        events = WORKER_EVENTS.family()
        gaps = WORKER_BOOK_GAPS.family()
        crossings = WORKER_BOOK_CROSSINGS.family()
        stale = WORKER_STALE_EVENTS.family()
        future = WORKER_FUTURE_EVENTS.family()
        restarts = WORKER_TIME_RESTARTS.family()
        resets = WORKER_FEED_RESETS.family()
        valid = WORKER_BOOK_VALID.family()
        age = WORKER_EVENT_AGE_SECONDS.family()
        now_ns = time.time_ns()
        for instrument, engine in self._engines.all().items():
            labels = (instrument,)
            events.add_metric(labels, engine.events)
            gaps.add_metric(labels, engine.book.gaps)
            crossings.add_metric(labels, engine.book.crossings)
            stale.add_metric(labels, engine.stale + engine.book.stale)
            future.add_metric(labels, engine.future)
            restarts.add_metric(labels, engine.time_restarts)
            resets.add_metric(labels, engine.resets)
            valid.add_metric(labels, engine.state is not BookState.UNKNOWN)
            age.add_metric(labels, engine.age_seconds(now_ns))
        yield from (events, gaps, crossings, stale, future, restarts, resets, valid, age)
