"""Commands that feed the market data topic: `replay` a recording, `simulate` a market."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.live import Live
from rich.text import Text

from feature_cache.publisher import EventPublisher, with_resets, with_snapshots
from feature_cache.session import SessionError, read_session, session_files
from feature_cache.session import instruments as recorded_instruments
from feature_cache.simulator import INSTRUMENTS, simulate
from pretrade.market.v1 import market_pb2 as pb

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

Kafka = Annotated[str, typer.Option(help="Comma-separated host:port of the Kafka brokers.")]
Topic = Annotated[str, typer.Option(help="Topic to publish to; created when missing.")]
Speed = Annotated[str, typer.Option(help="How many times faster than it happened, or max.")]

Linger = Annotated[
    float,
    typer.Option("--linger-ms", min=0, max=1000, help="How long an event waits for others to share its batch."),
]

_LINGER_MS = 20.0
KAFKA = "127.0.0.1:9092"
TOPIC = "market.events"


@app.command()
def replay(
    paths: Annotated[list[Path], typer.Argument(help="Recordings (*.gz), or folders of them.")],
    speed: Speed = "1",
    kafka: Kafka = KAFKA,
    topic: Topic = TOPIC,
    linger_ms: Linger = _LINGER_MS,
    loop: Annotated[bool, typer.Option("--loop", help="Begin again at the end, for ever.")] = False,
    instruments: Annotated[list[str] | None, typer.Option(help="Only these, for example BTCUSDT.BINANCE.")] = None,
) -> None:
    """Publish recorded exchange sessions to Kafka with their original timing."""
    factor = _factor(speed)
    try:
        files = session_files(paths)
        chosen = {name for name in recorded_instruments(files) if not instruments or name in instruments}
    except SessionError as error:
        raise typer.BadParameter(str(error)) from error
    if not chosen:
        raise typer.BadParameter(f"no recording of {', '.join(instruments or [])}")

    def rounds() -> Iterator[Iterable[pb.MarketEvent]]:
        for _ in itertools.count() if loop else range(1):
            yield with_snapshots(with_resets(read_session(files, chosen), "replay"))

    _run(rounds(), factor, EventPublisher(kafka, topic, linger_seconds=linger_ms / 1000), "replayed")


@app.command("simulate")
def simulate_market(
    seed: Annotated[int, typer.Option(help="The same seed gives the same market.")] = 1,
    rate: Annotated[float, typer.Option(min=0.1, max=100_000, help="Steps per instrument and second.")] = 150.0,
    duration: Annotated[float | None, typer.Option(min=0, help="Simulated seconds. [default: for ever]")] = None,
    speed: Speed = "1",
    kafka: Kafka = KAFKA,
    topic: Topic = TOPIC,
    linger_ms: Linger = _LINGER_MS,
    instruments: Annotated[list[str] | None, typer.Option(help="SYMBOL.SIM; default BTCUSDT.SIM, ETHUSDT.SIM.")] = None,
) -> None:
    """Publish a seeded, simulated market to Kafka."""
    factor = _factor(speed)
    try:
        events = simulate(
            seed,
            instruments or INSTRUMENTS,
            events_per_second=rate,
            start_ns=time.time_ns(),
            duration_seconds=duration,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    publisher = EventPublisher(kafka, topic, linger_seconds=linger_ms / 1000)
    _run(iter((with_resets(events, "simulation"),)), factor, publisher, "simulated")


def _factor(speed: str) -> float | None:
    if speed == "max":
        return None
    try:
        factor = float(speed)
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf"):
        raise typer.BadParameter("must be a positive number, or max", param_hint="--speed")
    return factor


def _run(
    rounds: Iterator[Iterable[pb.MarketEvent]], speed: float | None, publisher: EventPublisher, participle: str
) -> None:
    # The publisher counts what the brokers did not take; aiokafka would write several lines for every attempt.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    console = Console(stderr=True)
    start = time.monotonic()

    def summary() -> str:
        seconds = time.monotonic() - start
        rate = publisher.sent / seconds
        text = f"{publisher.sent:,} events {participle} to {publisher.topic} in {seconds:,.1f} s ({rate:,.0f}/s)"
        if publisher.late_seconds > 0.1:
            text += f", {publisher.late_seconds:,.1f} s behind"
        return f"{text}, {publisher.failed:,} not delivered" if publisher.failed else text

    failure: str | None = None
    live = Live(console=console, get_renderable=lambda: Text(summary()))
    with live if console.is_terminal else contextlib.nullcontext():
        try:
            asyncio.run(_publish(publisher, rounds, speed))
        except KafkaError as error:
            failure = f"{publisher.bootstrap_servers}: {error}"
        except SessionError as error:
            failure = str(error)
    if not console.is_terminal or failure:
        print(failure or summary(), file=sys.stderr)
    if failure or publisher.failed:
        raise typer.Exit(1)


async def _publish(publisher: EventPublisher, rounds: Iterator[Iterable[pb.MarketEvent]], speed: float | None) -> None:
    """Publishes until the end, SIGINT or SIGTERM; what was sent by then is delivered."""
    loop = asyncio.get_running_loop()

    async def publish() -> None:
        async with publisher:
            for events in rounds:
                await publisher.publish(events, speed)

    task = asyncio.create_task(publish())
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    app()
