"""Binance futures messages as market events: USD-M and COIN-M, which share their message formats.

One `BinanceFutures` decodes the messages of one instrument: `depthUpdate`, `bookTicker`, `trade` and `aggTrade` of the
WebSocket streams and the REST snapshot of the book. They differ from spot in two things. First, every message has the
exchange's time `E`, the snapshot too. Second, a `depthUpdate` names the last update of the one before it, `pu`, because
ids are shared by all symbols and those of one symbol have gaps. An update follows on when its `pu` is the last id that
was applied.

Sizes are those of the venue: base currency for USD-M, contracts for COIN-M. An aggregate trade has the id of the last
trade in it, as for spot.

The stream `trade` is not documented, but served, and often recorded. It tells of what the insurance fund takes over,
too (`X` is not `MARKET`), at prices that nobody traded at on the book: those are no events. `aggTrade` leaves them out
by itself.

Source: Binance, "WebSocket Market Streams" and "How to manage a local order book correctly" of USDⓈ-M and COIN-M
futures.
"""

from __future__ import annotations

from typing import Any

from feature_cache.engine.lag import MinimumLag
from feature_cache.feeds import binance, wire
from feature_cache.feeds.wire import FeedError
from pretrade.market.v1 import market_pb2 as pb


class BinanceFutures:
    """Decodes the messages of one Binance futures instrument, in the order in which they were received.

    Args:
        instrument: `SYMBOL.VENUE`; a message of another symbol is an error.
    """

    def __init__(self, instrument: str) -> None:
        self.instrument = instrument
        self._symbol = instrument.partition(".")[0]
        self._lag = MinimumLag()

    def decode(self, message: bytes | str, receive_time_ns: int) -> pb.MarketEvent | None:
        """As `BinanceSpot.decode`, except that None stands for a trade that was not made on the book."""
        parsed = wire.json_object(message)
        body = parsed.get("data", parsed)
        if not isinstance(body, dict):
            raise FeedError("data", "must be a JSON object")
        return self.event(body, receive_time_ns)

    def event(self, body: dict[str, Any], receive_time_ns: int) -> pb.MarketEvent | None:
        """As `decode`, of a message that was parsed already and is without its wrapper."""
        try:
            return self._event(body, receive_time_ns)
        except KeyError as error:
            raise FeedError(str(error.args[0]), "is missing") from error

    def reset(self, reason: str, receive_time_ns: int) -> pb.MarketEvent:
        """As `BinanceSpot.reset`."""
        event = binance.new_event(self.instrument, receive_time_ns)
        event.reset.reason = reason
        event.event_time_ns = receive_time_ns - (self._lag.at(receive_time_ns) or 0)
        event.event_time_estimated = True
        return event

    def _event(self, body: dict[str, Any], receive_time_ns: int) -> pb.MarketEvent | None:
        event = binance.new_event(self.instrument, receive_time_ns)
        snapshot = "lastUpdateId" in body
        # The snapshot names its symbol for COIN-M only.
        symbol = body.get("symbol", self._symbol) if snapshot else body["s"]
        if symbol != self._symbol:
            raise FeedError("symbol" if snapshot else "s", f"is {symbol!r:.40}, expected {self._symbol!r}")
        kind = body.get("e")
        if snapshot:
            binance.write_snapshot(event.snapshot, body)
        elif kind == "depthUpdate":
            binance.write_delta(event.delta, body)
            event.delta.previous_update_id = wire.whole(body, "pu")
            if event.delta.previous_update_id >= event.delta.last_update_id:
                raise FeedError("pu", "must be below u")
        elif kind == "bookTicker":
            binance.write_quote(event.quote, body)
        elif kind == "trade":
            binance.write_trade(event.trade, body, wire.whole(body, "t"))
        elif kind == "aggTrade":
            binance.write_trade(event.trade, body, wire.whole(body, "l"))
        else:
            raise FeedError("e", f"{kind!r:.40} is not depthUpdate, bookTicker, trade or aggTrade")
        event.event_time_ns = wire.epoch_ms_ns(body, "E")
        self._lag.observe(receive_time_ns, event.event_time_ns)
        return event if body.get("X", "MARKET") == "MARKET" else None
