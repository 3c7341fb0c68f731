"""Composes the feature worker: market events from Kafka in, feature vectors to Redis out."""

from __future__ import annotations

import asyncio
import signal
from contextlib import AsyncExitStack
from typing import Final

import structlog

from feature_cache.ending import end
from feature_cache.metrics_http import serve_http
from feature_cache.store.cluster import open_store
from feature_cache.worker.books import BookPublisher
from feature_cache.worker.consumer import DEAD_LETTER_SUFFIX, DeadLetters, MarketEventConsumer
from feature_cache.worker.engines import Engines
from feature_cache.worker.guests import Guest, Guests, launcher
from feature_cache.worker.metrics import WorkerCollector
from feature_cache.worker.reporter import Reporter
from feature_cache.worker.settings import WorkerSettings, computed_by
from feature_cache.worker.writer import FeatureWriter

_log = structlog.get_logger(__name__)
_REDIS_TIMEOUT_SECONDS: Final = 0.5
"""A Redis that does not answer within this counts as lost. A healthy one needs milliseconds, and decision servers take
features of a second for stale."""


async def serve(settings: WorkerSettings) -> None:
    """Runs the worker until SIGTERM or SIGINT.

    Raises:
        OSError: The metrics port cannot be listened on.
    """
    sets = [(one, launcher(one, settings.features_file, settings.log_level)) for one in computed_by(settings)]
    guests = Guests([Guest(registered, launch) for registered, launch in sets])
    engines = Engines(settings.max_instruments, guests)
    dead_letters = DeadLetters(settings.kafka_bootstrap_servers, settings.kafka_topic + DEAD_LETTER_SUFFIX)
    consumer = MarketEventConsumer(settings, engines, dead_letters)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(
            open_store(settings.redis_url.get_secret_value(), settings.ttl_seconds, _REDIS_TIMEOUT_SECONDS)
        )
        writer = FeatureWriter(store, engines, consumer, settings.flush_interval_seconds)
        reporter = Reporter(store, engines, consumer, settings)
        books = BookPublisher(store, engines, settings.book_levels, settings.book_interval_seconds)
        if settings.metrics_port:
            collector = WorkerCollector(engines, consumer, writer, dead_letters, reporter, books, guests)
            stack.enter_context(
                serve_http(
                    settings.metrics_host,
                    settings.metrics_port,
                    collector,
                    problem=lambda: consumer.problem or writer.problem,
                    not_ready=lambda: consumer.problem or writer.problem or reporter.problem,
                )
            )
        stopped = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(part.run()) for part in (consumer, writer, dead_letters, reporter, books)]
            if guests.all:
                stack.callback(guests.close)
                guests.start()
                computing = guests.run(store, lambda: engines.all().values(), settings.flush_interval_seconds)
                running.append(tasks.create_task(computing))
                _log.info("worker.computes", sets=[guest.feature_set.version for guest in guests.all])
            _log.info("worker.started", topic=settings.kafka_topic, group=settings.kafka_group)
            await stopped.wait()
            _log.info("worker.stopping")
            await end(running)
    _log.info("worker.stopped")
