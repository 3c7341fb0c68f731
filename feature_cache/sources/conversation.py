"""What was sent and received on one venue's connections, live or recorded, as market events.

Every connection, request, answer and message is a `Line`. `Conversation.take` is the only way from lines to events, so
a replayed recording gives the events that were published live. The lines of all connections are merged on their one
clock and read by one feed. A connection that is lost or reopened resets the books that it carried.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import orjson

from feature_cache.feeds import binance_streams, coinbase, kraken
from feature_cache.feeds.wire import FeedError
from feature_cache.sources import recorder
from feature_cache.sources.files import Progress, SessionError
from feature_cache.sources.recorder import Line
from pretrade.market.v1 import market_pb2 as pb

VENUES: Final = (coinbase.VENUE, kraken.VENUE, *binance_streams.VENUES)

_BOOK_CHANNELS: Final = frozenset({"book", "level2", "level2_batch", "full", "depth", "bookTicker"})
_LEVEL_3: Final = re.compile(r"/products/([^/?]+)/book\?(?:.*&)?level=3\b")
_DEPTH: Final = re.compile(r"/depth\?(?:.*&)?symbol=([^&]+)")

_Feed = (
    kraken.KrakenV1 | kraken.KrakenV2 | coinbase.CoinbaseLevel2 | coinbase.CoinbaseFull | binance_streams.BinanceStreams
)


@dataclass(slots=True)
class _Connection:
    """What is known of one connection."""

    feed: _Feed
    books: set[str] = field(default_factory=set)


class Conversation:
    """Turns the lines of one venue's connections into events, in the order in which they happened.

    Args:
        venue: One of `VENUES`.
    """

    def __init__(self, venue: str) -> None:
        self._venue = venue
        # One feed of a kind for all connections: books and trades of one instrument may come over two of them.
        self._feeds: dict[str, _Feed] = {}
        self._connections: dict[str, _Connection] = {}

    def take(self, line: Line) -> list[pb.MarketEvent]:
        """The events of one line; `publish_time_ns` is its receive time.

        A snapshot whose event time could not be estimated at once comes with the first message that makes it possible.

        Raises:
            FeedError: What was received is not what the venue documents; the state is as before.
        """
        connection = self._connections.get(line.connection)
        if line.arrow == recorder.CONNECTED:
            events = self._lost(line)
            self._connections[line.connection] = _Connection(self._feed(_protocol(self._venue, line.address)))
            return events
        if line.arrow == recorder.LOST:
            return self._lost(line)
        if line.arrow == recorder.SENT:
            if connection is not None:
                channels, names = subscription(self._venue, line.message)
                if "full" in channels:
                    connection.feed = self._feed("full")
                if channels & _BOOK_CHANNELS:
                    connection.books |= names
            return []
        if line.arrow == recorder.ANSWERED:
            return self._answered(line)
        if line.arrow == recorder.REFUSED:
            return []
        if connection is None:
            raise FeedError("message", "comes before the line that tells of the connection")
        return connection.feed.decode(line.message, line.receive_time_ns)

    def _lost(self, line: Line) -> list[pb.MarketEvent]:
        connection = self._connections.get(line.connection)
        return [] if connection is None else connection.feed.disconnected(connection.books, line.receive_time_ns)

    def _answered(self, line: Line) -> list[pb.MarketEvent]:
        """The snapshots that are asked for; whatever else was is of no interest."""
        if self._venue == coinbase.VENUE and (product := _LEVEL_3.search(line.address)):
            full = self._feed("full")
            assert isinstance(full, coinbase.CoinbaseFull)
            return full.snapshot(product[1], line.message, line.receive_time_ns)
        if self._venue in binance_streams.VENUES and (symbol := _DEPTH.search(line.address)):
            streams = self._feed("streams")
            assert isinstance(streams, binance_streams.BinanceStreams)
            return streams.snapshot(symbol[1], line.message, line.receive_time_ns)
        return []

    def _feed(self, protocol: str) -> _Feed:
        if protocol not in self._feeds:
            self._feeds[protocol] = self._new_feed(protocol)
        return self._feeds[protocol]

    def _new_feed(self, protocol: str) -> _Feed:
        if protocol == "streams":
            return binance_streams.BinanceStreams(self._venue)
        if protocol == "full":
            return coinbase.CoinbaseFull()
        if protocol == "level2":
            return coinbase.CoinbaseLevel2()
        return kraken.KrakenV2() if protocol == "v2" else kraken.KrakenV1()


def _protocol(venue: str, address: str) -> str:
    if venue in binance_streams.VENUES:
        return "streams"
    if venue == coinbase.VENUE:
        return "level2"
    return "v2" if address.rstrip("/").endswith("/v2") else "v1"


def venue_of(path: Path) -> str | None:
    """The venue whose recording a file belongs to; None for a file that is not in the recorder's format."""
    venue = path.name.partition(".")[0]
    return venue if venue in VENUES else None


def instruments(files: Iterable[Path]) -> set[str]:
    """The instruments that were subscribed to.

    Raises:
        SessionError: A line is not as described, or a file is damaged.
    """
    found: set[str] = set()
    for path in files:
        venue = venue_of(path)
        assert venue is not None
        for line in recorder.read_lines(path):
            if line.arrow == recorder.SENT:
                try:
                    found |= subscription(venue, line.message)[1]
                except FeedError as error:
                    raise SessionError(f"{path}, line {line.number}: {error}") from error
    return found


def read_recording(venue: str, files: Iterable[Path], progress: Progress | None = None) -> Iterator[pb.MarketEvent]:
    """The events of one venue in the order in which they were received; `publish_time_ns` is that time.

    Raises:
        SessionError: While iterating, at a line that is not as described, or at a damaged file.
    """
    conversation = Conversation(venue)
    lines = (recorder.read_lines(path, progress) for path in files)
    for line in heapq.merge(*lines, key=attrgetter("receive_time_ns")):
        try:
            yield from conversation.take(line)
        except FeedError as error:
            raise SessionError(f"{line.connection}, line {line.number}: {error}") from error


def subscription(venue: str, message: bytes) -> tuple[set[str], set[str]]:
    """The channels and instruments of a request to subscribe; empty sets for any other.

    Raises:
        FeedError: It is no request of the venue.
    """
    try:
        body = orjson.loads(message)
        if venue in binance_streams.VENUES:
            return _binance_subscription(venue, body)
        if venue == coinbase.VENUE:
            return _coinbase_subscription(body)
        if body.get("method") == "subscribe":
            params = body["params"]
            return {params["channel"]}, {kraken.instrument_of(name) for name in params.get("symbol", [])}
        if body.get("event") == "subscribe":
            return {body["subscription"]["name"]}, {kraken.instrument_of(name) for name in body["pair"]}
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise FeedError("message", f"is not a request of {venue}: {error}") from error
    return set(), set()


def _binance_subscription(venue: str, body: dict[str, Any]) -> tuple[set[str], set[str]]:
    if body.get("method") != "SUBSCRIBE":
        return set(), set()
    streams = [name.split("@") for name in body["params"]]
    return {stream[1] for stream in streams if len(stream) > 1}, {f"{stream[0].upper()}.{venue}" for stream in streams}


def _coinbase_subscription(body: dict[str, Any]) -> tuple[set[str], set[str]]:
    if body.get("type") != "subscribe":
        return set(), set()
    channels, products = set(), set(body.get("product_ids", []))
    for channel in body["channels"]:
        if isinstance(channel, dict):
            channels.add(channel["name"])
            products.update(channel.get("product_ids", []))
        else:
            channels.add(channel)
    return channels, {coinbase.instrument_of(product) for product in products}
