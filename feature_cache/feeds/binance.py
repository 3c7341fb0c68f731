"""Binance spot messages as market events.

One `BinanceSpot` decodes the messages of one instrument: `depthUpdate`, `bookTicker`, `trade` and `aggTrade` of the
WebSocket streams (bare, or in the combined-stream wrapper `{"stream", "data"}`) and the REST snapshot of the book.

Prices and sizes are read from their decimal strings into integers of 8 decimals, exactly. The event time is the
exchange's `E` (milliseconds). `bookTicker` and the REST snapshot have no such field. Their time is estimated as receive
time minus the feed's current smallest lag, and they give no event before the first timed message has shown that lag.

An aggregate trade has the id of the last trade in it. If both `trade` and `aggTrade` are subscribed, the message that
arrives second is therefore dropped, and nothing is counted twice.

Source: Binance, "WebSocket Streams" and "Market Data endpoints" of the spot API.
"""

from __future__ import annotations

from typing import Any, Final

from feature_cache.engine.lag import MinimumLag
from feature_cache.feeds import wire
from feature_cache.feeds.wire import FeedError
from pretrade.market.v1 import market_pb2 as pb

PRICE_DECIMALS: Final = 8
SIZE_DECIMALS: Final = 8


class BinanceSpot:
    """Decodes the messages of one Binance spot instrument, in the order in which they were received.

    Args:
        instrument: `SYMBOL.VENUE`; a message of another symbol is an error.
    """

    def __init__(self, instrument: str) -> None:
        self.instrument = instrument
        self._symbol = instrument.partition(".")[0]
        self._lag = MinimumLag()

    def decode(self, message: bytes | str, receive_time_ns: int) -> pb.MarketEvent | None:
        """Turns one message into a market event, with `publish_time_ns` equal to the receive time.

        Args:
            message: JSON as sent by the exchange.
            receive_time_ns: When it was received, nanoseconds since the Unix epoch.

        Returns:
            None for a message without an event time as long as the feed's lag is unknown.

        Raises:
            FeedError: Not JSON, an unknown kind of message, or a field that is missing or breaks its rule. The state
                is as before.
        """
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
        """A `BookReset`; its time is estimated, or the receive time as long as the feed's lag is unknown."""
        event = new_event(self.instrument, receive_time_ns)
        event.reset.reason = reason
        event.event_time_ns = receive_time_ns - (self._lag.at(receive_time_ns) or 0)
        event.event_time_estimated = True
        return event

    def _event(self, body: dict[str, Any], receive_time_ns: int) -> pb.MarketEvent | None:
        kind = body.get("e")
        event = new_event(self.instrument, receive_time_ns)
        if "lastUpdateId" in body:
            write_snapshot(event.snapshot, body)
            return self._with_estimated_time(event)
        if body["s"] != self._symbol:
            raise FeedError("s", f"is {body['s']!r:.40}, expected {self._symbol!r}")
        if kind is None:
            write_quote(event.quote, body)
            return self._with_estimated_time(event)
        if kind == "depthUpdate":
            write_delta(event.delta, body)
        elif kind == "trade":
            write_trade(event.trade, body, wire.whole(body, "t"))
        elif kind == "aggTrade":
            write_trade(event.trade, body, wire.whole(body, "l"))
        else:
            raise FeedError("e", f"{kind!r:.40} is not depthUpdate, bookTicker, trade or aggTrade")
        event.event_time_ns = wire.epoch_ms_ns(body, "E")
        self._lag.observe(receive_time_ns, event.event_time_ns)
        return event

    def _with_estimated_time(self, event: pb.MarketEvent) -> pb.MarketEvent | None:
        lag = self._lag.at(event.receive_time_ns)
        if lag is None:
            return None
        event.event_time_ns = event.receive_time_ns - lag
        event.event_time_estimated = True
        return event


def new_event(instrument: str, receive_time_ns: int) -> pb.MarketEvent:
    """An event with Binance's decimals, without a body or an event time."""
    return wire.new_event(instrument, PRICE_DECIMALS, SIZE_DECIMALS, receive_time_ns)


def write_snapshot(snapshot: pb.BookSnapshot, body: dict[str, Any]) -> None:
    """The REST snapshot of the book; raises KeyError or FeedError."""
    bid_ticks, bid_lots = wire.levels(body, "bids", PRICE_DECIMALS)
    ask_ticks, ask_lots = wire.levels(body, "asks", PRICE_DECIMALS)
    snapshot.last_update_id = wire.whole(body, "lastUpdateId")
    snapshot.bid_ticks.extend(bid_ticks)
    snapshot.bid_lots.extend(bid_lots)
    snapshot.ask_ticks.extend(ask_ticks)
    snapshot.ask_lots.extend(ask_lots)


def write_delta(delta: pb.BookDelta, body: dict[str, Any]) -> None:
    """A `depthUpdate`; raises KeyError or FeedError."""
    bid_ticks, bid_lots = wire.levels(body, "b", PRICE_DECIMALS)
    ask_ticks, ask_lots = wire.levels(body, "a", PRICE_DECIMALS)
    first, last = wire.whole(body, "U"), wire.whole(body, "u")
    if last < first:
        raise FeedError("u", "must not be below U")
    delta.first_update_id = first
    delta.last_update_id = last
    delta.bid_ticks.extend(bid_ticks)
    delta.bid_lots.extend(bid_lots)
    delta.ask_ticks.extend(ask_ticks)
    delta.ask_lots.extend(ask_lots)


def write_quote(quote: pb.Quote, body: dict[str, Any]) -> None:
    """A `bookTicker`; raises KeyError or FeedError."""
    quote.update_id = wire.whole(body, "u")
    quote.bid_ticks = wire.fixed(body["b"], "b", PRICE_DECIMALS)
    quote.bid_lots = wire.fixed(body["B"], "B", SIZE_DECIMALS)
    quote.ask_ticks = wire.fixed(body["a"], "a", PRICE_DECIMALS)
    quote.ask_lots = wire.fixed(body["A"], "A", SIZE_DECIMALS)


def write_trade(trade: pb.Trade, body: dict[str, Any], trade_id: int) -> None:
    """A `trade` or an `aggTrade`; raises KeyError or FeedError."""
    maker = body["m"]
    if not isinstance(maker, bool):
        raise FeedError("m", "must be true or false")
    trade.trade_id = trade_id
    trade.price_ticks = wire.fixed(body["p"], "p", PRICE_DECIMALS)
    trade.lots = wire.fixed(body["q"], "q", SIZE_DECIMALS)
    # `m`: the buyer was the maker, so the seller took.
    trade.taker_side = pb.TAKER_SIDE_SELL if maker else pb.TAKER_SIDE_BUY
