"""Recordings in the format of cryptofeed's recorder, as market events.

A recording of a venue is several gzip files, one a connection, named `VENUE.0.gz` (REST) and `VENUE.ws.N.0.gz`
(WebSocket). Their lines::

    configuration: {…}                     what was asked of the recorder
    wss://… <-> 1618678132.368463          connected
    wss://… <- 1618678132.83097: {…}       sent
    https://… -> 1618678132.358447: {…}    received in answer to a request
    1618678132.831468: {…}                 received

Times are local, in seconds since the Unix epoch. The connections of a venue are merged on that clock and read by one
feed. A connection that is made anew resets the books that it carried.
"""

from __future__ import annotations

import gzip
import heapq
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import orjson

from feature_cache.feeds import coinbase, kraken, wire
from feature_cache.feeds.wire import FeedError
from pretrade.market.v1 import market_pb2 as pb

VENUES: Final = (coinbase.VENUE, kraken.VENUE)

_BOOK_CHANNELS: Final = frozenset({"book", "level2", "level2_batch", "full"})
_LEVEL_3: Final = re.compile(r"/products/([^/?]+)/book\?(?:.*&)?level=3\b")

_Feed = kraken.KrakenV1 | kraken.KrakenV2 | coinbase.CoinbaseLevel2 | coinbase.CoinbaseFull


class SessionError(ValueError):
    """A recording that cannot be read; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class _Line:
    path: Path
    number: int
    receive_time_ns: int
    arrow: str
    """`<->` connected, `<-` sent, `->` answered, empty for a message received."""
    address: str
    message: bytes


@dataclass(slots=True)
class _Connection:
    """What is known of the connection that one file holds."""

    feed: _Feed
    books: set[str] = field(default_factory=set)


def venue_of(path: Path) -> str | None:
    """The venue whose recording a file belongs to; None for a file that is not this recorder's."""
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
        for line in _lines(path):
            if line.arrow == "<-":
                found |= _subscription(venue, line)[1]
    return found


def read_recording(files: Iterable[Path]) -> Iterator[pb.MarketEvent]:
    """The events of one venue in the order in which they were received; `publish_time_ns` is that time.

    A snapshot whose event time could not be estimated at once comes with the first message that makes it possible.

    Raises:
        SessionError: While iterating, at a line that is not as described, or at a damaged file.
    """
    files = list(files)
    # One feed of a kind for all connections: books and trades of one instrument may come over two of them.
    feeds: dict[type[_Feed], _Feed] = {}
    connections: dict[Path, _Connection] = {}
    for line in heapq.merge(*(_lines(path) for path in files), key=attrgetter("receive_time_ns")):
        venue = venue_of(line.path)
        assert venue is not None
        connection = connections.get(line.path)
        try:
            if line.arrow == "<->":
                if connection is not None:
                    yield from connection.feed.disconnected(connection.books, line.receive_time_ns)
                connections[line.path] = _Connection(_feed(feeds, _kind(venue, line.address)))
            elif line.arrow == "<-":
                if connection is not None:
                    channels, names = _subscription(venue, line)
                    if "full" in channels:
                        connection.feed = _feed(feeds, coinbase.CoinbaseFull)
                    if channels & _BOOK_CHANNELS:
                        connection.books |= names
            elif line.arrow == "->":
                product = _LEVEL_3.search(line.address)
                if product:
                    full = _feed(feeds, coinbase.CoinbaseFull)
                    assert isinstance(full, coinbase.CoinbaseFull)
                    yield from full.snapshot(product[1], line.message, line.receive_time_ns)
            elif connection is None:
                raise FeedError("message", "comes before the line that tells of the connection")
            else:
                yield from connection.feed.decode(line.message, line.receive_time_ns)
        except FeedError as error:
            raise SessionError(f"{line.path}, line {line.number}: {error}") from error


def _kind(venue: str, address: str) -> type[_Feed]:
    if venue == coinbase.VENUE:
        return coinbase.CoinbaseLevel2
    return kraken.KrakenV2 if address.rstrip("/").endswith("/v2") else kraken.KrakenV1


def _feed(feeds: dict[type[_Feed], _Feed], kind: type[_Feed]) -> _Feed:
    if kind not in feeds:
        feeds[kind] = kind()
    return feeds[kind]


def _lines(path: Path) -> Iterator[_Line]:
    number = 0
    try:
        with gzip.open(path) as lines:
            for number, text in enumerate(lines, start=1):
                head, _, message = text.rstrip(b"\n").partition(b": ")
                if not head or head == b"configuration":
                    continue
                words = head.decode().split(" ")
                try:
                    receive_time_ns = wire.epoch_seconds_ns(words[-1], "time")
                except FeedError as error:
                    raise SessionError(f"{path}, line {number}: {error}") from error
                if len(words) == 1:
                    yield _Line(path, number, receive_time_ns, "", "", message)
                elif len(words) == 3 and words[1] in ("<->", "<-", "->"):
                    yield _Line(path, number, receive_time_ns, words[1], words[0], message)
                else:
                    raise SessionError(f"{path}, line {number}: is not a line of the recorder")
    except (OSError, EOFError, zlib.error) as error:
        raise SessionError(f"{path}: damaged after line {number}: {error}") from error
    except UnicodeDecodeError as error:
        raise SessionError(f"{path}, line {number}: is not a line of the recorder") from error


def _subscription(venue: str, line: _Line) -> tuple[set[str], set[str]]:
    """The channels and instruments of a request to subscribe; empty sets for any other."""
    try:
        body = orjson.loads(line.message)
        if venue == coinbase.VENUE:
            return _coinbase_subscription(body)
        if body.get("method") == "subscribe":
            params = body["params"]
            return {params["channel"]}, {kraken.instrument_of(name) for name in params.get("symbol", [])}
        if body.get("event") == "subscribe":
            return {body["subscription"]["name"]}, {kraken.instrument_of(name) for name in body["pair"]}
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise SessionError(f"{line.path}, line {line.number}: is not a request of {venue}: {error}") from error
    return set(), set()


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
