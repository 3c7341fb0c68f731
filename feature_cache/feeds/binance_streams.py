"""The combined streams of one Binance market as market events: many instruments over one connection."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from feature_cache.feeds import wire
from feature_cache.feeds.binance import BinanceSpot
from feature_cache.feeds.binance_futures import BinanceFutures
from feature_cache.feeds.wire import FeedError
from pretrade.market.v1 import market_pb2 as pb

SPOT: Final = "BINANCE"
USD_M: Final = "BINANCE-USDM"
COIN_M: Final = "BINANCE-COINM"
VENUES: Final = (SPOT, USD_M, COIN_M)

_FEEDS: Final[dict[str, Callable[[str], BinanceSpot | BinanceFutures]]] = {
    SPOT: BinanceSpot,
    USD_M: BinanceFutures,
    COIN_M: BinanceFutures,
}


class BinanceStreams:
    """Decodes what the combined streams of one market send about any number of symbols.

    Args:
        venue: One of `VENUES`; `BTCUSDT` becomes the instrument `BTCUSDT.<venue>`.
        only: The one symbol that all messages are about, where that is known: the REST snapshots that come with them
            do not name it. A message of another is then an error.
    """

    def __init__(self, venue: str, only: str | None = None) -> None:
        self._venue = venue
        self._only = only
        self._new_feed = _FEEDS[venue]
        self._symbols: dict[str, BinanceSpot | BinanceFutures] = {}
        self._told: set[str] = set()  # instruments of whose book something was said since the last reset

    def decode(self, message: bytes | str, receive_time_ns: int) -> list[pb.MarketEvent]:
        """Turns one message into market events, with `publish_time_ns` equal to the receive time.

        Returns:
            Empty for the answer to a request, and for a message whose time cannot be estimated yet.

        Raises:
            FeedError: As for `BinanceSpot.decode`; also when the exchange refuses a request. The state is as before.
        """
        parsed = wire.json_object(message)
        if "stream" not in parsed:
            if parsed.get("error") is not None or "code" in parsed:
                raise FeedError("error", f"the exchange refuses: {message!r:.200}")
            if "result" in parsed:
                return []
        body = parsed.get("data", parsed)
        if not isinstance(body, dict):
            raise FeedError("data", "must be a JSON object")
        symbol = self._only if self._only is not None and "lastUpdateId" in body else body.get("s")
        if self._only not in (None, symbol):
            raise FeedError("s", f"is {symbol!r:.40}, expected {self._only!r}")
        if type(symbol) is not str or not symbol:
            raise FeedError("s", f"{symbol!r:.40} is not a symbol")
        return self._take(symbol, body, receive_time_ns)

    def snapshot(self, symbol: str, message: bytes | str, receive_time_ns: int) -> list[pb.MarketEvent]:
        """Takes the book of one symbol in, as the REST interface sends it.

        Raises:
            FeedError: As for `decode`.
        """
        body = wire.json_object(message)
        if "lastUpdateId" not in body:
            raise FeedError("lastUpdateId", "is missing")
        return self._take(symbol, body, receive_time_ns)

    def disconnected(self, instruments: Iterable[str], receive_time_ns: int) -> list[pb.MarketEvent]:
        """The connection that sent these books was lost: a `BookReset` for each, until their next snapshots."""
        lost = sorted(self._told.intersection(instruments))
        self._told.difference_update(lost)
        return [self._symbols[name.partition(".")[0]].reset("reconnect", receive_time_ns) for name in lost]

    def _take(self, symbol: str, body: dict[str, object], receive_time_ns: int) -> list[pb.MarketEvent]:
        feed = self._symbols.get(symbol) or self._new_feed(f"{symbol}.{self._venue}")
        event = feed.event(body, receive_time_ns)
        self._symbols[symbol] = feed
        if event is None:
            return []
        if not event.HasField("trade"):
            self._told.add(event.instrument)
        return [event]
