"""The metrics and health of the worker and of a live feed, over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from feature_cache.codec import BookState

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from prometheus_client.metrics_core import Metric

    from feature_cache.consumer import DeadLetters, MarketEventConsumer
    from feature_cache.engines import Engines
    from feature_cache.feast_push import FeastPush
    from feature_cache.ingest import Ingest
    from feature_cache.reporter import Reporter
    from feature_cache.writer import FeatureWriter


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
        feast: FeastPush | None = None,
    ) -> None:
        self._engines = engines
        self._consumer = consumer
        self._writer = writer
        self._dead_letters = dead_letters
        self._feast = feast
        self._reporter = reporter

    def collect(self) -> Iterator[Metric]:
        """Every metric of the worker."""
        yield from self._instruments()
        poison = CounterMetricFamily(
            "pretrade_worker_poison_records", "Records that no retry makes good.", labels=["reason"]
        )
        for reason, count in dict(self._engines.poison).items():
            poison.add_metric([reason], count)
        yield poison
        lag = GaugeMetricFamily(
            "pretrade_worker_lag_records", "Records between position and end of the log.", labels=["partition"]
        )
        for partition, records in dict(self._consumer.lag).items():
            lag.add_metric([str(partition)], records)
        yield lag
        for name, help_text, count in (
            ("vectors_written", "Vectors written to Redis.", self._writer.written),
            ("vectors_refused", "Vectors older than those another worker wrote.", self._writer.refused),
            ("redis_failures", "Writes or pings that Redis refused or did not answer.", self._writer.failures),
            ("kafka_failures", "Times the brokers refused or did not answer.", self._consumer.failures),
            ("log_truncations", "Times the log no longer reached the position.", self._engines.truncations),
            ("records_repeated", "Records that had been taken before, and were ignored.", self._engines.repeats),
            ("report_failures", "Reports that Redis did not take.", self._reporter.failures),
            ("dead_letters_sent", "Poison records sent to the dead-letter topic.", self._dead_letters.sent),
            ("dead_letters_dropped", "Poison records that could not be sent there.", self._dead_letters.dropped),
        ):
            yield CounterMetricFamily(f"pretrade_worker_{name}", help_text, count)
        if self._feast is not None:
            yield CounterMetricFamily("pretrade_worker_feast_pushed", "Vectors that Feast took.", self._feast.pushed)
            yield CounterMetricFamily(
                "pretrade_worker_feast_failures", "Pushes that Feast refused or did not answer.", self._feast.failures
            )

    def _instruments(self) -> Iterator[Metric]:
        counters = {
            name: CounterMetricFamily(f"pretrade_worker_{name}", help_text, labels=["instrument"])
            for name, help_text in (
                ("events", "Market events taken in, stale ones included."),
                ("book_gaps", "Times the update ids of the book did not follow on."),
                ("book_crossings", "Times the best bid was above the best ask."),
                ("stale_events", "Events that were not newer than what was known."),
                ("future_events", "Events too far ahead of their feed's clock."),
                ("time_restarts", "Times the windows began anew because event time ran back."),
                ("feed_resets", "Times the feed said it had lost continuity."),
            )
        }
        valid = GaugeMetricFamily("pretrade_worker_book_valid", "1 while the book is known.", labels=["instrument"])
        age = GaugeMetricFamily(
            "pretrade_worker_event_age_seconds", "Age of the newest event from exchange time.", labels=["instrument"]
        )
        now_ns = time.time_ns()
        for instrument, engine in self._engines.all().items():
            for name, count in (
                ("events", engine.events),
                ("book_gaps", engine.book.gaps),
                ("book_crossings", engine.book.crossings),
                ("stale_events", engine.stale + engine.book.stale),
                ("future_events", engine.future),
                ("time_restarts", engine.time_restarts),
                ("feed_resets", engine.resets),
            ):
                counters[name].add_metric([instrument], count)
            valid.add_metric([instrument], engine.state is not BookState.UNKNOWN)
            age.add_metric([instrument], engine.age_seconds(now_ns))
        yield from (*counters.values(), valid, age)


class IngestCollector(Collector):
    """As `WorkerCollector`, of a live feed."""

    def __init__(self, feed: Ingest) -> None:
        self._feed = feed

    def collect(self) -> Iterator[Metric]:
        """Every metric of the feed."""
        feed = self._feed
        for name, help_text, count in (
            ("messages", "Messages received.", feed.messages),
            ("messages_refused", "Messages that were not what the venue documents.", feed.refused),
            ("events", "Events published.", feed.events),
            ("events_undelivered", "Events that the brokers did not take.", feed.undelivered),
            ("connections", "Connections made.", feed.connects),
            ("connections_lost", "Connections lost, and attempts that failed.", feed.losses),
            ("book_doubts", "Times a book was found not to be the exchange's.", feed.doubts),
            ("snapshot_requests", "Snapshots asked for.", feed.requests),
            ("snapshot_failures", "Snapshots that did not come, or could not be used.", feed.request_failures),
        ):
            yield CounterMetricFamily(f"pretrade_ingest_{name}", help_text, count)
        yield GaugeMetricFamily("pretrade_ingest_connected", "Connections that stand.", feed.connected)
        newest = GaugeMetricFamily("pretrade_ingest_newest_event_seconds", "Exchange time of the newest event.")
        newest.add_metric([], feed.newest_event_ns / 1e9)
        yield newest
        valid = GaugeMetricFamily("pretrade_ingest_book_valid", "1 while the book is known.", labels=["instrument"])
        for instrument, known in feed.books.items():
            valid.add_metric([instrument], known)
        yield valid


class _QuietHandler(WSGIRequestHandler):
    timeout = 10.0
    """Seconds that a caller may take to send its request, or to read the answer."""

    def handle(self) -> None:
        """As the base class, without a traceback for a caller that is slow or gone."""
        with suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 — the base class names it so
        """Says nothing: a line for every scrape and probe would drown the log."""


@contextmanager
def serve_http(
    host: str,
    port: int,
    collector: Collector,
    problem: Callable[[], str | None],
    not_ready: Callable[[], str | None],
) -> Iterator[int]:
    """Serves `/metrics`, `/healthz` and `/readyz` while the context is open.

    Each request has a thread: a probe must not wait for a caller that has connected and says nothing.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        collector: What `/metrics` shows.
        problem: Why the worker is not healthy, or None: `/healthz` answers 503 with the reason, or 200.
        not_ready: Why its vectors are not all good to decide on, or None: `/readyz`, likewise.

    Yields:
        The port.
    """
    registry = CollectorRegistry()
    registry.register(collector)
    metrics = make_wsgi_app(registry)

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return cast("Iterable[bytes]", metrics(environ, start_response))
        checks = {"/healthz": problem, "/readyz": not_ready}
        reason = checks[path]() if path in checks else "not found"
        status = {None: "200 OK", "not found": "404 Not Found"}.get(reason, "503 Service Unavailable")
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{reason or 'ok'}\n".encode()]

    with make_server(host, port, answer, ThreadingWSGIServer, _QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
