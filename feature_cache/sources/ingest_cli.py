"""The command `ingest`: an exchange's live market data to Kafka."""

from __future__ import annotations

import enum
import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from feature_cache.sources.cli import KAFKA, TOPIC, ExchangeName, Kafka, Linger, Topic

app = typer.Typer(add_completion=False)


class ChannelName(enum.StrEnum):
    """Coinbase's book channels on the command line."""

    LEVEL2_BATCH = "level2_batch"
    LEVEL2 = "level2"
    FULL = "full"


@app.command()
def ingest(
    exchange: Annotated[ExchangeName, typer.Option(help="The exchange.")],
    instruments: Annotated[list[str], typer.Option(help="BTCUSDT, BTC-USD, …, comma-separated; can be repeated.")],
    kafka: Kafka = KAFKA,
    topic: Topic = TOPIC,
    linger_ms: Linger = 0.0,
    record: Annotated[
        Path | None, typer.Option(help="Also record to this folder, one file for each connection; `replay` reads it.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="WebSocket address instead of the exchange's: a proxy, another site, a test.")
    ] = None,
    rest_url: Annotated[
        str | None, typer.Option(help="Address of the REST interface instead of the exchange's.")
    ] = None,
    channel: Annotated[
        ChannelName,
        typer.Option(help="Coinbase's book channel; level2 and full need an address that authenticates us."),
    ] = ChannelName.LEVEL2_BATCH,
    silence: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Reconnect after so many seconds without a message.")
    ] = 60.0,
    duration: Annotated[float | None, typer.Option(min=0, help="Seconds. [default: for ever]")] = None,
    metrics_host: Annotated[str, typer.Option(help="Address of /metrics, /healthz and /readyz.")] = "127.0.0.1",
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Their port; 0 serves none of them.")] = 0,
) -> None:
    """Publish an exchange's live market data to Kafka until interrupted. Reconnects, and recovers from gaps."""
    # The clients of exchanges and brokers, which take longer to load than most other commands take in all.
    import uvloop  # noqa: PLC0415
    from aiokafka.errors import KafkaError  # noqa: PLC0415

    from feature_cache import logs  # noqa: PLC0415
    from feature_cache.sources import live  # noqa: PLC0415
    from feature_cache.sources.ingest import IngestSettings  # noqa: PLC0415
    from feature_cache.sources.publisher import EventPublisher  # noqa: PLC0415
    from feature_cache.sources.recorder import Recorder  # noqa: PLC0415

    names = [name for group in instruments for name in group.split(",") if name]
    for option, value, schemes in (
        ("--url", url, ("ws://", "wss://")),
        ("--rest-url", rest_url, ("http://", "https://")),
    ):
        if value is not None and not value.startswith(schemes):
            raise typer.BadParameter(f"must begin with {' or '.join(schemes)}", param_hint=option)
    try:
        source = live.exchange_of(exchange.value, names, channel.value, url, rest_url)
        recording = Recorder(record, source.venue, time.time_ns()) if record is not None else None
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    logs.configure("info", "ingest")
    for name in ("aiokafka", "websockets", "httpx"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters of them is in our own lines
    publisher = EventPublisher(kafka, topic, linger_seconds=linger_ms / 1000)
    settings = IngestSettings(silence_seconds=silence)
    try:
        uvloop.run(live.run(source, publisher, settings, recording, duration, (metrics_host, metrics_port)))
    except (KafkaError, OSError) as error:
        print(f"{kafka if isinstance(error, KafkaError) else 'metrics'}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
