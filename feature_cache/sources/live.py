"""Runs `ingest` as a program: signals, metrics and the status line on the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from contextlib import AsyncExitStack

from rich.console import Console
from rich.live import Live
from rich.text import Text

from feature_cache.metrics_http import serve_http
from feature_cache.sources.exchanges import Binance, Coinbase, Exchange, Kraken
from feature_cache.sources.ingest import Ingest, IngestSettings
from feature_cache.sources.metrics import IngestCollector
from feature_cache.sources.publisher import EventPublisher
from feature_cache.sources.recorder import Recorder


def exchange_of(name: str, names: list[str], channel: str, url: str | None, rest_url: str | None) -> Exchange:
    """An exchange by its name on the command line.

    Args:
        name: `binance`, `binance-usdm`, `binance-coinm`, `kraken` or `coinbase`.
        names: Its instruments, as it calls them.
        channel: Coinbase's channel of books.
        url: WebSocket address instead of the exchange's.
        rest_url: The same of its REST interface.

    Raises:
        ValueError: No instruments, or more than one connection can carry.
    """
    if not names:
        raise ValueError("no instruments")
    if name == "kraken":
        return Kraken(names, url)
    if name == "coinbase":
        return Coinbase(names, channel, url, rest_url)
    return Binance(name.upper(), names, url, rest_url)


async def run(
    source: Exchange,
    publisher: EventPublisher,
    settings: IngestSettings,
    recording: Recorder | None,
    duration: float | None,
    metrics: tuple[str, int],
) -> None:
    """Publishes until the time is over, SIGINT or SIGTERM; what was published by then is delivered.

    Args:
        source: Which exchange, and what of it.
        publisher: Entered here.
        settings: See there.
        recording: Gets every line; None for none.
        duration: Seconds; None for ever.
        metrics: Address and port of `/metrics`, `/healthz` and `/readyz`; port 0 serves none of them.

    Raises:
        KafkaError: The brokers cannot be reached at the start.
        OSError: The metrics port cannot be listened on.
    """
    loop = asyncio.get_running_loop()
    async with publisher, AsyncExitStack() as stack:
        feed = Ingest(source, publisher, settings, recording)
        host, port = metrics
        if port:
            collector = IngestCollector(feed)
            # An exchange that is away is no reason to restart; `/readyz` says whether the books are there.
            stack.enter_context(serve_http(host, port, collector, lambda: None, lambda: feed.problem))
        console = Console(stderr=True)
        task = asyncio.create_task(feed.run())
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        live = Live(console=console, get_renderable=lambda: Text(_line(feed, publisher)))
        with live if console.is_terminal else contextlib.nullcontext():
            await asyncio.wait({task}, timeout=duration)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    if not console.is_terminal:
        print(_line(feed, publisher), file=sys.stderr)


def _line(feed: Ingest, publisher: EventPublisher) -> str:
    books = feed.books
    text = (
        f"{feed.connected} connected, {sum(books.values())} of {len(books)} books known, {feed.messages:,} messages, "
        f"{feed.events:,} events to {publisher.topic}, {feed.losses:,} connections lost, "
        f"{feed.doubts:,} books in doubt, {feed.requests:,} snapshots asked for"
    )
    undelivered = feed.undelivered + publisher.failed
    for count, what in ((feed.refused, "messages refused"), (undelivered, "events not delivered")):
        if count:
            text += f", {count:,} {what}"
    return text if feed.problem is None else f"{text}; {feed.problem}"
