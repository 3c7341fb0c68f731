"""The command `ingest`: an exchange's live market data to Kafka."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import signal
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.live import Live
from rich.text import Text

from feature_cache import logs
from feature_cache.cli import KAFKA, TOPIC, Kafka, Linger, Topic
from feature_cache.exchanges import Binance, Coinbase, Exchange, Kraken
from feature_cache.ingest import Ingest, IngestSettings
from feature_cache.metrics import IngestCollector, serve_http
from feature_cache.publisher import EventPublisher
from feature_cache.recorder import Recorder


class ExchangeName(enum.StrEnum):
    """Exchanges on the command line."""

    BINANCE = "binance"
    BINANCE_USDM = "binance-usdm"
    BINANCE_COINM = "binance-coinm"
    KRAKEN = "kraken"
    COINBASE = "coinbase"


class ChannelName(enum.StrEnum):
    """Coinbase's book channels on the command line."""

    LEVEL2_BATCH = "level2_batch"
    LEVEL2 = "level2"
    FULL = "full"


def ingest(
    exchange: Annotated[ExchangeName, typer.Option(help="Where from.")],
    instruments: Annotated[list[str], typer.Option(help="BTCUSDT, BTC-USD, …, comma-separated; can be repeated.")],
    kafka: Kafka = KAFKA,
    topic: Topic = TOPIC,
    linger_ms: Linger = 0.0,
    record: Annotated[
        Path | None, typer.Option(help="Folder for a recording that `replay` reads, one file a connection.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="WebSocket address instead of the exchange's: a proxy, another site, a test.")
    ] = None,
    rest_url: Annotated[
        str | None, typer.Option(help="Address of the REST interface instead of the exchange's.")
    ] = None,
    channel: Annotated[
        ChannelName, typer.Option(help="Coinbase's books; level2 and full need an address that authenticates us.")
    ] = ChannelName.LEVEL2_BATCH,
    silence: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds without a message after which a connection is made anew.")
    ] = 60.0,
    duration: Annotated[float | None, typer.Option(min=0, help="Seconds. [default: for ever]")] = None,
    metrics_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of /metrics, /healthz and /readyz on 127.0.0.1; 0 serves none.")
    ] = 0,
) -> None:
    """Publish an exchange's live market data to Kafka, through lost connections and gaps, until interrupted."""
    names = [name for group in instruments for name in group.split(",") if name]
    for option, value, schemes in (
        ("--url", url, ("ws://", "wss://")),
        ("--rest-url", rest_url, ("http://", "https://")),
    ):
        if value is not None and not value.startswith(schemes):
            raise typer.BadParameter(f"must begin with {' or '.join(schemes)}", param_hint=option)
    try:
        source = _exchange(exchange, names, channel, url, rest_url)
        recording = Recorder(record, source.venue, time.time_ns()) if record is not None else None
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    logs.configure("info", "ingest")
    for name in ("aiokafka", "websockets", "httpx"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters of them is in our own lines
    publisher = EventPublisher(kafka, topic, linger_seconds=linger_ms / 1000)
    settings = IngestSettings(silence_seconds=silence)
    try:
        uvloop.run(_ingest(source, publisher, settings, recording, duration, metrics_port))
    except (KafkaError, OSError) as error:
        print(f"{kafka if isinstance(error, KafkaError) else 'metrics'}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _exchange(
    name: ExchangeName, names: list[str], channel: ChannelName, url: str | None, rest_url: str | None
) -> Exchange:
    if not names:
        raise ValueError("no instruments")
    if name is ExchangeName.KRAKEN:
        return Kraken(names, url)
    if name is ExchangeName.COINBASE:
        return Coinbase(names, channel.value, url, rest_url)
    return Binance(name.value.upper(), names, url, rest_url)


async def _ingest(
    source: Exchange,
    publisher: EventPublisher,
    settings: IngestSettings,
    recording: Recorder | None,
    duration: float | None,
    metrics_port: int,
) -> None:
    """Runs until the time is over, SIGINT or SIGTERM; what was published by then is delivered."""
    loop = asyncio.get_running_loop()
    async with publisher, AsyncExitStack() as stack:
        feed = Ingest(source, publisher, settings, recording)
        if metrics_port:
            collector = IngestCollector(feed)
            # An exchange that is away is no reason to begin anew; whoever waits for the books asks `/readyz`.
            stack.enter_context(serve_http("127.0.0.1", metrics_port, collector, lambda: None, lambda: feed.problem))
        console = Console(stderr=True)
        task = asyncio.create_task(feed.run())
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        live = Live(console=console, get_renderable=lambda: Text(_ingest_line(feed, publisher)))
        with live if console.is_terminal else contextlib.nullcontext():
            await asyncio.wait({task}, timeout=duration)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    if not console.is_terminal:
        print(_ingest_line(feed, publisher), file=sys.stderr)


def _ingest_line(feed: Ingest, publisher: EventPublisher) -> str:
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


if __name__ == "__main__":
    typer.run(ingest)
