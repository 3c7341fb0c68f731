"""How to ask each exchange for its market data: addresses, subscriptions, and the way to a fresh snapshot.

The adapters in `feature_cache.feeds` decode the answers; nothing here parses prices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import quote

import orjson

from feature_cache.feeds import binance_streams, coinbase, kraken

BINANCE_STREAMS_LIMIT: Final = {
    binance_streams.SPOT: 1024,
    binance_streams.USD_M: 1024,
    binance_streams.COIN_M: 200,
}
"""Streams that the exchange allows on one connection."""

_BINANCE: Final = {
    binance_streams.SPOT: ("wss://stream.binance.com:9443", "https://api.binance.com/api/v3"),
    binance_streams.USD_M: ("wss://fstream.binance.com", "https://fapi.binance.com/fapi/v1"),
    binance_streams.COIN_M: ("wss://dstream.binance.com", "https://dapi.binance.com/dapi/v1"),
}
_KRAKEN: Final = "wss://ws.kraken.com/v2"
_COINBASE: Final = ("wss://ws-feed.exchange.coinbase.com", "https://api.exchange.coinbase.com")
_KRAKEN_DEPTH: Final = 100
_BINANCE_DEPTH: Final = 1000


@dataclass(frozen=True, slots=True)
class Stream:
    """One connection and what is sent on it first."""

    name: str
    url: str
    requests: tuple[bytes, ...]
    carries_books: bool = True


class Exchange(Protocol):
    """What `feature_cache.sources.ingest.Ingest` needs to know of an exchange."""

    venue: str
    instruments: tuple[str, ...]
    streams: tuple[Stream, ...]
    request_interval_seconds: float
    """Least pause between two requests for a snapshot, so that the exchange's limits hold."""
    snapshot_at_start: bool
    """Whether a snapshot must be asked for as soon as a connection stands; otherwise the need shows in the events."""
    proves_books: bool
    """Whether ids or checksums show that a message was lost; otherwise one that cannot be read puts the books in
    doubt."""

    def follow_up(self, message: bytes) -> tuple[bytes, ...]:
        """What is to be sent after a message was received; mostly nothing."""

    def snapshot_url(self, instrument: str) -> str:
        """Where the book is fetched; empty where it comes with a subscription."""

    def resubscribe(self, instrument: str) -> tuple[bytes, ...]:
        """The messages that request a fresh snapshot if there is no `snapshot_url`."""


class Binance:
    """Spot, USD-M and COIN-M: diffs, best bid and ask, and aggregate trades; the book by the snapshot procedure.

    USD-M serves books and trades at two addresses.

    Args:
        venue: One of `binance_streams.VENUES`.
        symbols: For example `BTCUSDT`; an instrument's name will do.
        url: Base of the WebSocket addresses, instead of the exchange's.
        rest_url: Base of the REST addresses, with path, instead of the exchange's.

    Raises:
        ValueError: More symbols than one connection may carry.
    """

    request_interval_seconds = 0.5  # 1000 levels cost 20 to 50 of 2400 to 6000 a minute
    snapshot_at_start = False
    proves_books = True

    def __init__(self, venue: str, symbols: Iterable[str], url: str | None = None, rest_url: str | None = None) -> None:
        names = [_without_venue(symbol, venue).upper() for symbol in symbols]
        self.venue = venue
        self.instruments = tuple(f"{name}.{venue}" for name in names)
        default_url, default_rest_url = _BINANCE[venue]
        base = (url or default_url).rstrip("/")
        self._rest_url = (rest_url or default_rest_url).rstrip("/")
        books = ["depth@100ms", "bookTicker"]
        if venue == binance_streams.USD_M:
            self.streams: tuple[Stream, ...] = (
                Stream("books", f"{base}/public/stream", (_binance_subscribe(names, books),)),
                Stream("trades", f"{base}/market/stream", (_binance_subscribe(names, ["aggTrade"]),), False),
            )
        else:
            self.streams = (Stream("market", f"{base}/stream", (_binance_subscribe(names, [*books, "aggTrade"]),)),)
        most = BINANCE_STREAMS_LIMIT[venue]
        if 3 * len(names) > most:
            raise ValueError(f"{venue} allows {most} streams a connection, which is {most // 3} instruments")

    def follow_up(self, message: bytes) -> tuple[bytes, ...]:
        """Nothing."""
        return ()

    def snapshot_url(self, instrument: str) -> str:
        """The REST snapshot of the book."""
        symbol = quote(_without_venue(instrument, self.venue))
        return f"{self._rest_url}/depth?symbol={symbol}&limit={_BINANCE_DEPTH}"

    def resubscribe(self, instrument: str) -> tuple[bytes, ...]:
        """Nothing: there is a `snapshot_url`."""
        return ()


class Kraken:
    """Spot, protocol v2, or v1 at an address that does not end in `/v2`: books with checksums, and trades.

    v2's decimals come from its `instrument` channel, so books and trades are asked for when that has answered.

    Args:
        pairs: For example `BTC-USD` or `BTC/USD` (v1: `XBT-USD`); an instrument's name will do.
        url: Instead of the exchange's.
    """

    venue = kraken.VENUE
    request_interval_seconds = 0.2
    snapshot_at_start = False
    proves_books = True

    def __init__(self, pairs: Iterable[str], url: str | None = None) -> None:
        self._pairs = [_without_venue(pair, self.venue).upper().replace("-", "/") for pair in pairs]
        self.instruments = tuple(kraken.instrument_of(pair) for pair in self._pairs)
        address = url or _KRAKEN
        self._v2 = address.rstrip("/").endswith("/v2")
        first = (_kraken_v2("instrument", None),) if self._v2 else self._subscriptions()
        self.streams: tuple[Stream, ...] = (Stream("market", address, first),)

    def follow_up(self, message: bytes) -> tuple[bytes, ...]:
        """The subscriptions, after v2's decimals."""
        if not self._v2 or b'"instrument"' not in message:
            return ()
        try:
            body = orjson.loads(message)
        except orjson.JSONDecodeError:
            return ()
        told = isinstance(body, dict) and body.get("channel") == "instrument" and body.get("type") == "snapshot"
        return self._subscriptions() if told else ()

    def snapshot_url(self, instrument: str) -> str:
        """None: the book comes with the subscription."""
        return ""

    def resubscribe(self, instrument: str) -> tuple[bytes, ...]:
        """Leaves the pair's book and comes back."""
        pair = instrument.partition(".")[0].replace("-", "/")
        if self._v2:
            return _kraken_v2("book", [pair], method="unsubscribe"), _kraken_v2("book", [pair])
        return _kraken_v1("book", [pair], event="unsubscribe"), _kraken_v1("book", [pair])

    def _subscriptions(self) -> tuple[bytes, ...]:
        request = _kraken_v2 if self._v2 else _kraken_v1
        return request("book", self._pairs), request("trade", self._pairs)


class Coinbase:
    """Coinbase Exchange: `level2_batch` for everybody; `level2` and `full` where the address authenticates us.

    `full` takes its books from the REST interface. Books are not numbered in the level-2 channels, so that a message
    which cannot be read puts the book in doubt.

    Args:
        products: For example `BTC-USD`; an instrument's name will do.
        channel: `level2_batch`, `level2` or `full`.
        url: Instead of the exchange's.
        rest_url: Instead of the exchange's.
    """

    venue = coinbase.VENUE
    request_interval_seconds = 1.0

    def __init__(
        self,
        products: Iterable[str],
        channel: str = "level2_batch",
        url: str | None = None,
        rest_url: str | None = None,
    ) -> None:
        names = [_without_venue(product, self.venue).upper() for product in products]
        self.instruments = tuple(coinbase.instrument_of(name) for name in names)
        self._channel = channel
        full = channel == "full"
        self.snapshot_at_start = full
        self.proves_books = full
        self._rest_url = (rest_url or _COINBASE[1]).rstrip("/") if full else ""
        # `full` has the trades in it.
        channels = [channel, "heartbeat"] if full else [channel, "matches", "heartbeat"]
        request = _coinbase("subscribe", names, channels)
        self.streams: tuple[Stream, ...] = (Stream("market", url or _COINBASE[0], (request,)),)

    def follow_up(self, message: bytes) -> tuple[bytes, ...]:
        """Nothing."""
        return ()

    def snapshot_url(self, instrument: str) -> str:
        """The REST interface's level-3 book, of the channel `full`."""
        product = quote(_without_venue(instrument, self.venue))
        return f"{self._rest_url}/products/{product}/book?level=3" if self._rest_url else ""

    def resubscribe(self, instrument: str) -> tuple[bytes, ...]:
        """Leaves the product's book and comes back."""
        product = [_without_venue(instrument, self.venue)]
        return _coinbase("unsubscribe", product, [self._channel]), _coinbase("subscribe", product, [self._channel])


def _without_venue(name: str, venue: str) -> str:
    return name.removesuffix(f".{venue}")


def _binance_subscribe(symbols: Iterable[str], streams: Iterable[str]) -> bytes:
    names = list(streams)
    params = [f"{symbol.lower()}@{name}" for symbol in symbols for name in names]
    return orjson.dumps({"method": "SUBSCRIBE", "params": params, "id": 1})


def _kraken_v2(channel: str, pairs: list[str] | None, method: str = "subscribe") -> bytes:
    params: dict[str, object] = {"channel": channel}
    if pairs is not None:
        params["symbol"] = pairs
    if channel == "book":
        params["depth"] = _KRAKEN_DEPTH
    if channel == "trade":
        params["snapshot"] = False
    return orjson.dumps({"method": method, "params": params})


def _kraken_v1(channel: str, pairs: list[str], event: str = "subscribe") -> bytes:
    channel_options: dict[str, object] = {"name": channel} | ({"depth": _KRAKEN_DEPTH} if channel == "book" else {})
    return orjson.dumps({"event": event, "pair": pairs, "subscription": channel_options})


def _coinbase(kind: str, products: list[str], channels: list[str]) -> bytes:
    return orjson.dumps({"type": kind, "product_ids": products, "channels": channels})
