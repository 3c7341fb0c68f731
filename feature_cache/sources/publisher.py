"""Publishes market events to Kafka with their original timing.

A worker may start reading at any moment. Therefore a `BookReset` is published before an instrument's first event, since
update ids may have gone back, and a full snapshot of the book about every ten seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from feature_cache import kafka
from feature_cache.engine.snapshots import INTERVAL_NS, Snapshots, sibling
from pretrade.market.v1 import market_pb2 as pb

_STOP_SECONDS: Final = 5.0
_YIELD_EVERY: Final = 100
_SHORTEST_SLEEP_SECONDS: Final = 0.001


def with_resets(events: Iterable[pb.MarketEvent], reason: str) -> Iterator[pb.MarketEvent]:
    """Puts a `BookReset` at the same times before each instrument's first event."""
    seen: set[str] = set()
    for event in events:
        if event.instrument not in seen:
            seen.add(event.instrument)
            reset = sibling(event)
            reset.reset.reason = reason
            yield reset
        yield event


def with_snapshots(events: Iterable[pb.MarketEvent], interval_ns: int = INTERVAL_NS) -> Iterator[pb.MarketEvent]:
    """Adds a snapshot of our own book after a delta, whenever the last snapshot is `interval_ns` of event time ago."""
    snapshots = Snapshots(interval_ns)
    for event in events:
        yield event
        snapshot = snapshots.after(event)
        if snapshot is not None:
            yield snapshot


class EventPublisher:
    """Sends events to a topic, each when its time has come. An async context: entered, it is connected.

    Args:
        bootstrap_servers: Comma-separated `host:port` of the brokers.
        topic: The topic; created when missing.
        partitions: Partitions of a topic that is created.
        linger_seconds: How long an event waits for others to share its batch. A broker's work grows with the number of
            batches; the embedded one's even with that of all it holds, since it lists them for every fetch.
        monotonic: Seconds on a clock that never jumps.
        wall_ns: Nanoseconds since the Unix epoch.

    Raises:
        KafkaError: On entering, when the brokers cannot be reached.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        topic: str = "market.events",
        partitions: int = 4,
        *,
        linger_seconds: float = 0.0,
        monotonic: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.bootstrap_servers = bootstrap_servers
        self.topic = topic
        self._partitions = partitions
        self._linger_ms = round(linger_seconds * 1000)
        self._monotonic = monotonic
        self._wall_ns = wall_ns
        self.sent = 0
        """Events handed to the producer."""
        self.failed = 0
        """Events the brokers did not take."""
        self.late_seconds = 0.0
        """How far the newest event was behind its time."""

    async def __aenter__(self) -> EventPublisher:
        await kafka.create_topic(
            self.bootstrap_servers, self.topic, self._partitions, max_message_bytes=kafka.MAX_EVENT_BYTES
        )
        # A producer belongs to the running loop from its constructor on.
        self._producer = AIOKafkaProducer(
            **kafka.client(self.bootstrap_servers), linger_ms=self._linger_ms, max_request_size=kafka.MAX_EVENT_BYTES
        )
        await self._producer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        # Waits until what was sent is delivered, which without brokers would take long.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_SECONDS):
                await self._producer.stop()

    async def publish(self, events: Iterable[pb.MarketEvent], speed: float | None = 1.0) -> None:
        """Sends events until there are no more. Cancelling leaves what was sent to be delivered on exit.

        Args:
            events: In the order of their receive times, which set the pace. `publish_time_ns` is set here.
            speed: How many times faster than they were received; None for no pause at all.

        Raises:
            KafkaError: The topic is gone and cannot be had again.
        """
        start = self._monotonic()
        first_ns: int | None = None
        for event in events:
            if first_ns is None:
                first_ns = event.receive_time_ns
            if speed is not None:
                due = start + (event.receive_time_ns - first_ns) / 1e9 / speed
                early = due - self._monotonic()
                self.late_seconds = max(0.0, -early)
                if early > _SHORTEST_SLEEP_SECONDS:
                    await asyncio.sleep(early)
            await self.send(event)
            if self.sent % _YIELD_EVERY == 0:
                await asyncio.sleep(0)

    async def send(self, event: pb.MarketEvent) -> asyncio.Future[object]:
        """Sends one event now; waits while too many are under way. `publish_time_ns` is set here.

        Returns:
            What is done when the brokers have taken the event, or refused it.

        Raises:
            KafkaError: The topic is gone and cannot be had again, or the brokers take nothing any more.
        """
        event.publish_time_ns = self._wall_ns()
        sending: asyncio.Future[object] = await self._producer.send(
            self.topic, event.SerializeToString(), event.instrument.encode()
        )
        sending.add_done_callback(self._delivered)
        self.sent += 1
        return sending

    def _delivered(self, sending: asyncio.Future[object]) -> None:
        if not sending.cancelled() and isinstance(sending.exception(), KafkaError):
            self.failed += 1
