"""Live market data: from an exchange's public connections to the topic, with reconnects and resynchronisation.

    connect ─▶ subscribe ─▶ messages ─▶ Conversation ─▶ events ─▶ topic
       ▲                        │            ▲
       │ backoff, jitter        │ lost       │ snapshot: REST, or subscribing again
       └────────────────────────┘            └── a book that differs from the exchange's

A connection that ends, stays silent for too long or answers no ping is lost: its books become unknown (a `BookReset`
each), and the feed reconnects. After a gap, a failed checksum or a crossing the feed requests the book again, one
request at a time, more slowly after every failure; after `resync_attempts` failures it reconnects. Messages that cannot
be read are counted and skipped. If the exchange's messages do not prove that a book is whole, the feed reconnects
instead.

Everything that happens is a `Line`. The recorder and the decoder get the same lines in the same order, so a replay of
the recording gives the same events.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Annotated, Final

import httpx
import structlog
from aiokafka.errors import KafkaError
from pydantic import BaseModel, ConfigDict, Field
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from feature_cache.backoff import Backoff
from feature_cache.engine.book import CLOSED, OrderBook
from feature_cache.engine.snapshots import Snapshots, sibling
from feature_cache.feeds.wire import FeedError
from feature_cache.sources import recorder
from feature_cache.sources.conversation import Conversation
from feature_cache.sources.exchanges import Exchange, Stream
from feature_cache.sources.publisher import EventPublisher
from feature_cache.sources.recorder import Line, Recorder
from pretrade.market.v1 import market_pb2 as pb

_MAX_MESSAGE: Final = 64 * 2**20  # a whole level-2 or level-3 book
_STEADY_SECONDS: Final = 10.0
_TRY_AGAIN: Final = frozenset({403, 408, 418, 425, 429})
_log = structlog.get_logger(__name__)


class IngestSettings(BaseModel):
    """How patient a live feed is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    connect_timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 10.0
    """Seconds that a connection may take to stand."""
    silence_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds without a message after which a connection counts as lost."""
    ping_seconds: Annotated[float, Field(gt=0, le=300)] = 10.0
    """Seconds between two pings, and seconds that the answer to one may take."""
    reconnect_min_seconds: Annotated[float, Field(gt=0, le=60)] = 0.5
    """Seconds before a reconnect; doubles with every failure, with jitter."""
    reconnect_max_seconds: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Longest pause between two connections, in seconds."""
    request_timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 10.0
    """Seconds that a snapshot over REST may take."""
    resync_min_seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Seconds before a book is asked for again; doubles with every failure, with jitter."""
    resync_max_seconds: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Longest pause between two requests for one book, in seconds."""
    resync_attempts: Annotated[int, Field(ge=1, le=1000)] = 5
    """Failed requests after which the book's connection is reopened."""


class Ingest:
    """Feeds one exchange's instruments to the topic until it is cancelled.

    Args:
        exchange: Which, and what of it.
        publisher: Entered already.
        settings: See there.
        recording: Gets every line; None for none. Closed here.
        monotonic: Seconds on a clock that never jumps.
        wall_ns: Nanoseconds since the Unix epoch.
    """

    def __init__(
        self,
        exchange: Exchange,
        publisher: EventPublisher,
        settings: IngestSettings,
        recording: Recorder | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._exchange = exchange
        self._publisher = publisher
        self._settings = settings
        self._recording = recording
        self._monotonic = monotonic
        self._wall_ns = wall_ns
        self._conversation = Conversation(exchange.venue)
        self._snapshots = Snapshots()
        self._connections: dict[str, ClientConnection] = {}
        self._wanted: dict[str, _Resync] = {}
        self._want = asyncio.Event()
        self._newest: dict[str, pb.MarketEvent] = {}
        self._last_line_ns = 0
        # Lines are taken and their events published in one order, whichever connection they came from.
        self._order = asyncio.Lock()
        self.events = 0
        """Events published."""
        self.messages = 0
        """Messages received."""
        self.refused = 0
        """Messages that were not what the venue documents."""
        self.connects = 0
        """Connections made."""
        self.losses = 0
        """Connections lost, and attempts that failed."""
        self.doubts = 0
        """Times a book was found not to be the exchange's: a gap, a failed checksum, a crossing."""
        self.requests = 0
        """Snapshots asked for."""
        self.request_failures = 0
        """Those that were not answered with a book that could be used."""
        self.undelivered = 0
        """Events that the brokers refused at once; the publisher counts those they lost later."""
        self.newest_event_ns = 0
        """Event time of the newest event."""

    @property
    def connected(self) -> int:
        """Connections that stand."""
        return len(self._connections)

    @property
    def books(self) -> dict[str, bool]:
        """Whether each instrument's book is known."""
        return {name: self.book(name).valid for name in self._exchange.instruments}

    def book(self, instrument: str) -> OrderBook:
        """An instrument's book as published; an unknown one before its first event."""
        return self._snapshots.books.get(instrument) or OrderBook()

    @property
    def problem(self) -> str | None:
        """Why not all of it flows, for people; None when it does."""
        if self.connected < len(self._exchange.streams):
            return "not connected"
        unknown = [name for name, valid in self.books.items() if not valid]
        return f"book unknown: {', '.join(unknown[:3])}{' …' if len(unknown) > 3 else ''}" if unknown else None

    async def run(self) -> None:
        """Runs until cancelled; then every book is published as closed, and the recording ends."""
        limits = httpx.Limits(max_connections=2)
        try:
            async with (
                httpx.AsyncClient(timeout=self._settings.request_timeout_seconds, limits=limits) as client,
                asyncio.TaskGroup() as tasks,
            ):
                for stream in self._exchange.streams:
                    tasks.create_task(self._follow(stream))
                tasks.create_task(self._resync(client))
        finally:
            if self._recording is not None:
                self._recording.close()
            await self._close()

    async def _follow(self, stream: Stream) -> None:
        """Connects, receives, and begins again, for ever."""
        backoff = Backoff(self._settings.reconnect_min_seconds, self._settings.reconnect_max_seconds)
        while True:
            began = self._monotonic()
            try:
                await self._receive(stream)
            except (OSError, TimeoutError, WebSocketException, FeedError) as error:
                self.losses += 1
                _log.warning("ingest.lost", stream=stream.name, error=str(error) or repr(error))
            if self._monotonic() - began > _STEADY_SECONDS:
                backoff.reset()
            await asyncio.sleep(backoff.next_pause())

    async def _receive(self, stream: Stream) -> None:
        settings = self._settings
        async with connect(
            stream.url,
            open_timeout=settings.connect_timeout_seconds,
            close_timeout=1.0,
            ping_interval=settings.ping_seconds,
            ping_timeout=settings.ping_seconds,
            max_size=_MAX_MESSAGE,
        ) as connection:
            self.connects += 1
            self._connections[stream.name] = connection
            _log.info("ingest.connected", stream=stream.name, url=stream.url)
            try:
                await self._take(stream.name, recorder.CONNECTED, stream.url)
                await self._send(stream, connection, stream.requests)
                if self._exchange.snapshot_at_start:
                    for instrument in self._exchange.instruments:
                        # The subscription first: its messages wait for the snapshot, not the other way about.
                        self._ask_for(instrument, settings.resync_min_seconds)
                loop = asyncio.get_running_loop()
                async with asyncio.timeout(settings.silence_seconds) as silence:
                    while True:
                        message = await connection.recv(decode=False)
                        silence.reschedule(loop.time() + settings.silence_seconds)
                        await self._hear(stream, connection, message)
            finally:
                del self._connections[stream.name]
                # Also when cancelled: the recording must end as what happened did.
                await self._take(stream.name, recorder.LOST, stream.url)

    async def _hear(self, stream: Stream, connection: ClientConnection, message: bytes) -> None:
        self.messages += 1
        try:
            await self._take(stream.name, recorder.RECEIVED, "", message)
        except FeedError as error:
            self.refused += 1
            if self.refused.bit_count() == 1:  # the 1st, 2nd, 4th …: a flood of them must not flood the log
                _log.warning("ingest.refused", count=self.refused, stream=stream.name, error=str(error))
            # An unknown type says nothing of a book; whatever else cannot be read may have.
            if not self._exchange.proves_books and error.field != "type":
                raise
            return
        requests = self._exchange.follow_up(message)
        if requests:
            await self._send(stream, connection, requests)

    async def _send(self, stream: Stream, connection: ClientConnection, requests: tuple[bytes, ...]) -> None:
        for request in requests:
            await self._take(stream.name, recorder.SENT, stream.url, request)
            await connection.send(request, text=True)

    async def _take(self, connection: str, arrow: recorder.Arrow, address: str, message: bytes = b"") -> None:
        """Takes one line in and publishes its events.

        Raises:
            FeedError: The message is not what the venue documents.
        """
        async with self._order:
            # Two lines never have the same time, so that a recording is merged in the order in which they were taken.
            self._last_line_ns = max(self._last_line_ns + 1, self._wall_ns())
            line = Line(connection, self._last_line_ns, arrow, address, message)
            try:
                events = self._conversation.take(line)
            except FeedError:
                if self._recording is not None:
                    self._recording.write(
                        Line(connection, line.receive_time_ns, recorder.REFUSED, address or connection, message)
                    )
                raise
            if self._recording is not None:
                self._recording.write(line)
            for event in events:
                await self._publish(event)

    async def _publish(self, event: pb.MarketEvent) -> None:
        instrument = event.instrument
        if instrument not in self._newest:
            # Update ids may have gone back since this instrument was last published by anybody.
            start = sibling(event)
            start.reset.reason = "start"
            await self._deliver(start)
        book = self._snapshots.books.get(instrument)
        before = book is not None and book.valid
        snapshot = self._snapshots.after(event)
        self._newest[instrument] = event
        self.newest_event_ns = max(self.newest_event_ns, event.event_time_ns)
        await self._deliver(event)
        if snapshot is not None:
            await self._deliver(snapshot)
        if self._snapshots.books[instrument].valid:
            self._wanted.pop(instrument, None)
            return
        kind = event.WhichOneof("event")
        lost = kind == "reset" and event.reset.reason == "reconnect"
        if lost:
            self._wanted.pop(instrument, None)
        elif before:
            self.doubts += 1
            reason = event.reset.reason if kind == "reset" else "gap or crossed book"
            _log.warning("ingest.book_unknown", instrument=instrument, reason=reason)
        if not lost and kind in ("delta", "reset", "snapshot"):
            self._ask_for(instrument)

    async def _deliver(self, event: pb.MarketEvent) -> None:
        try:
            await self._publisher.send(event)
        except KafkaError as error:
            self.undelivered += 1
            if self.undelivered.bit_count() == 1:
                _log.warning("ingest.undelivered", count=self.undelivered, error=repr(error))
        else:
            self.events += 1

    def _ask_for(self, instrument: str, delay_seconds: float = 0.0) -> None:
        if instrument not in self._wanted:
            settings = self._settings
            backoff = Backoff(settings.resync_min_seconds, settings.resync_max_seconds, spread=(0.75, 1.25))
            self._wanted[instrument] = _Resync(self._monotonic() + delay_seconds, backoff)
            self._want.set()

    async def _resync(self, client: httpx.AsyncClient) -> None:
        """Asks for the books that are wanted, one after another, for ever."""
        settings = self._settings
        while True:
            if not self._wanted:
                self._want.clear()
                await self._want.wait()
                continue
            instrument, resync = min(self._wanted.items(), key=lambda item: item[1].due)
            early = resync.due - self._monotonic()
            if early > 0:
                # Another book may be wanted sooner.
                self._want.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(early):
                        await self._want.wait()
                continue
            stream = next(stream for stream in self._exchange.streams if stream.carries_books)
            connection = self._connections.get(stream.name)
            if connection is None:
                self._wanted.pop(instrument, None)
                continue
            resync.attempts += 1
            if resync.attempts > settings.resync_attempts:
                self._wanted.pop(instrument, None)
                _log.warning("ingest.resync_given_up", instrument=instrument, attempts=settings.resync_attempts)
                await connection.close()
                continue
            resync.due = self._monotonic() + resync.backoff.next_pause()
            self.requests += 1
            wait = await self._request(client, stream, connection, instrument)
            resync.due = max(resync.due, self._monotonic() + wait)
            await asyncio.sleep(max(self._exchange.request_interval_seconds, wait))

    async def _request(
        self, client: httpx.AsyncClient, stream: Stream, connection: ClientConnection, instrument: str
    ) -> float:
        """Asks for one book; returns the seconds for which the exchange wants no further request of anything."""
        url = self._exchange.snapshot_url(instrument)
        try:
            if not url:
                await self._send(stream, connection, self._exchange.resubscribe(instrument))
                return 0.0
            answer = await client.get(url)
            if answer.status_code == 200:
                await self._take("rest", recorder.ANSWERED, url, answer.content)
                self.request_failures += instrument in self._wanted
                return 0.0
        except (httpx.HTTPError, WebSocketException, OSError, FeedError) as error:
            self.request_failures += 1
            _log.warning("ingest.request_failed", instrument=instrument, error=str(error) or repr(error))
            return 0.0
        self.request_failures += 1
        wait = _retry_after(answer) if answer.status_code in _TRY_AGAIN else 0.0
        _log.warning(
            "ingest.request_refused", instrument=instrument, status=answer.status_code, wait_seconds=round(wait, 1)
        )
        return wait

    async def _close(self) -> None:
        """Publishes every book as closed, so that the silence is not taken for a failure."""
        for event in self._newest.values():
            closing = sibling(event)
            closing.receive_time_ns = max(event.receive_time_ns, self._wall_ns())
            closing.event_time_ns += closing.receive_time_ns - event.receive_time_ns
            closing.event_time_estimated = True
            closing.reset.reason = CLOSED
            await self._deliver(closing)


class _Resync:
    """A book that is wanted."""

    __slots__ = ("attempts", "backoff", "due")

    def __init__(self, due: float, backoff: Backoff) -> None:
        self.due = due
        self.backoff = backoff
        self.attempts = 0


def _retry_after(answer: httpx.Response) -> float:
    """Seconds that the exchange asks to wait; ten where it does not say."""
    try:
        return min(max(float(answer.headers["Retry-After"]), 1.0), 3600.0)
    except (KeyError, ValueError):
        return 10.0
