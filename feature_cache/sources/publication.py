"""Runs the publishing of recorded or simulated markets as a program: signals, and the output on the terminal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from aiokafka.errors import KafkaError
from rich.console import Console
from rich.live import Live
from rich.text import Text

from feature_cache.sources.files import SessionError
from feature_cache.sources.publisher import EventPublisher
from pretrade.market.v1 import market_pb2 as pb


def run(
    rounds: Iterator[Iterable[pb.MarketEvent]],
    speed: float | None,
    publisher: EventPublisher,
    participle: str,
    share: Callable[[], float] | None = None,
) -> int:
    """Publishes rounds of events one after the other until the end, SIGINT or SIGTERM, and tells how it goes.

    Args:
        rounds: Read and published one by one.
        speed: How many times faster than they were received; None for no pause at all.
        publisher: Entered here.
        participle: What happened to the events, for people.
        share: How much of the round has been read, from 0 to 1; None where nobody knows.

    Returns:
        The exit code: 0, or 1 when not every event was delivered.
    """
    # The publisher counts what the brokers did not take; aiokafka would write several lines for every attempt.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    console = Console(stderr=True)
    start = time.monotonic()

    def summary() -> str:
        seconds = time.monotonic() - start
        rate = publisher.sent / seconds
        text = f"{publisher.sent:,} events {participle} to {publisher.topic} in {seconds:,.1f} s ({rate:,.0f}/s)"
        if share is not None:
            text += f", {share():.0%} of the files read"
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
    return 1 if failure or publisher.failed else 0


async def _publish(publisher: EventPublisher, rounds: Iterator[Iterable[pb.MarketEvent]], speed: float | None) -> None:
    """What was sent by the end is delivered, whatever ended it."""
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
