"""The metrics and health of the worker and of a live feed, over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from feature_cache.store.codec import BookState
from feature_cache.worker import metric_families as families

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from prometheus_client.metrics_core import Metric

    from feature_cache.sources.ingest import Ingest
    from feature_cache.worker.consumer import DeadLetters, MarketEventConsumer
    from feature_cache.worker.engines import Engines
    from feature_cache.worker.feast_push import FeastPush
    from feature_cache.worker.reporter import Reporter
    from feature_cache.worker.writer import FeatureWriter


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
        poison = families.WORKER_POISON_RECORDS.family()
        for reason, count in dict(self._engines.poison).items():
            poison.add_metric([reason], count)
        yield poison
        lag = families.WORKER_LAG_RECORDS.family()
        for partition, records in dict(self._consumer.lag).items():
            lag.add_metric([str(partition)], records)
        yield lag
        yield families.WORKER_VECTORS_WRITTEN.family(self._writer.written)
        yield families.WORKER_VECTORS_REFUSED.family(self._writer.refused)
        yield families.WORKER_REDIS_FAILURES.family(self._writer.failures)
        yield families.WORKER_KAFKA_FAILURES.family(self._consumer.failures)
        yield families.WORKER_LOG_TRUNCATIONS.family(self._engines.truncations)
        yield families.WORKER_RECORDS_REPEATED.family(self._engines.repeats)
        yield families.WORKER_REPORT_FAILURES.family(self._reporter.failures)
        yield families.WORKER_DEAD_LETTERS_SENT.family(self._dead_letters.sent)
        yield families.WORKER_DEAD_LETTERS_DROPPED.family(self._dead_letters.dropped)
        if self._feast is not None:
            yield families.WORKER_FEAST_PUSHED.family(self._feast.pushed)
            yield families.WORKER_FEAST_FAILURES.family(self._feast.failures)

    def _instruments(self) -> Iterator[Metric]:
        events = families.WORKER_EVENTS.family()
        gaps = families.WORKER_BOOK_GAPS.family()
        crossings = families.WORKER_BOOK_CROSSINGS.family()
        stale = families.WORKER_STALE_EVENTS.family()
        future = families.WORKER_FUTURE_EVENTS.family()
        restarts = families.WORKER_TIME_RESTARTS.family()
        resets = families.WORKER_FEED_RESETS.family()
        valid = families.WORKER_BOOK_VALID.family()
        age = families.WORKER_EVENT_AGE_SECONDS.family()
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


class IngestCollector(Collector):
    """As `WorkerCollector`, of a live feed."""

    def __init__(self, feed: Ingest) -> None:
        self._feed = feed

    def collect(self) -> Iterator[Metric]:
        """Every metric of the feed."""
        feed = self._feed
        yield families.INGEST_MESSAGES.family(feed.messages)
        yield families.INGEST_MESSAGES_REFUSED.family(feed.refused)
        yield families.INGEST_EVENTS.family(feed.events)
        yield families.INGEST_EVENTS_UNDELIVERED.family(feed.undelivered)
        yield families.INGEST_CONNECTIONS.family(feed.connects)
        yield families.INGEST_CONNECTIONS_LOST.family(feed.losses)
        yield families.INGEST_BOOK_DOUBTS.family(feed.doubts)
        yield families.INGEST_SNAPSHOT_REQUESTS.family(feed.requests)
        yield families.INGEST_SNAPSHOT_FAILURES.family(feed.request_failures)
        yield families.INGEST_CONNECTED.family(feed.connected)
        yield families.INGEST_NEWEST_EVENT_SECONDS.family(feed.newest_event_ns / 1e9)
        valid = families.INGEST_BOOK_VALID.family()
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
