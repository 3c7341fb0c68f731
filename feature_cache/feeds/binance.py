"""Binance spot messages as market events.

One `BinanceSpot` decodes the messages of one instrument: `depthUpdate`, `bookTicker` and `trade` of the WebSocket
streams (bare, or in the combined-stream wrapper `{"stream", "data"}`) and the REST snapshot of the book.

Prices and sizes are read from their decimal strings into integers of 8 decimals, exactly. The event time is the
exchange's `E` (milliseconds). `bookTicker` and the REST snapshot carry none: theirs is estimated as receive time minus
the feed's current smallest lag, and nothing is said about them before the first timed message has shown that lag.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from feature_cache.lag import MinimumLag
from pretrade.market.v1 import market_pb2 as pb

PRICE_DECIMALS: Final = 8
SIZE_DECIMALS: Final = 8
_DECIMALS: Final = 8
_MAX_DIGITS: Final = 18  # what always fits in int64
_LATEST_MS: Final = 9 * 10**12  # the year 2255; its nanoseconds still fit in int64


class FeedError(ValueError):
    """A message that is not what the venue documents.

    Attributes:
        field: The field at fault, for example `data.b`; `message` when the whole is.
        rule: The rule it breaks.
    """

    def __init__(self, field: str, rule: str) -> None:
        super().__init__(f"{field}: {rule}")
        self.field = field
        self.rule = rule


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
        try:
            parsed = orjson.loads(message)
        except orjson.JSONDecodeError as error:
            raise FeedError("message", f"is not JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise FeedError("message", "must be a JSON object")
        body = parsed.get("data", parsed)
        if not isinstance(body, dict):
            raise FeedError("data", "must be a JSON object")
        try:
            return self._event(body, receive_time_ns)
        except KeyError as error:
            raise FeedError(str(error.args[0]), "is missing") from error

    def _event(self, body: dict[str, Any], receive_time_ns: int) -> pb.MarketEvent | None:
        kind = body.get("e")
        event = pb.MarketEvent(
            instrument=self.instrument,
            price_decimals=PRICE_DECIMALS,
            size_decimals=SIZE_DECIMALS,
            receive_time_ns=receive_time_ns,
            publish_time_ns=receive_time_ns,
        )
        if "lastUpdateId" in body:
            bid_ticks, bid_lots = _levels(body, "bids")
            ask_ticks, ask_lots = _levels(body, "asks")
            event.snapshot.last_update_id = _integer(body, "lastUpdateId")
            event.snapshot.bid_ticks.extend(bid_ticks)
            event.snapshot.bid_lots.extend(bid_lots)
            event.snapshot.ask_ticks.extend(ask_ticks)
            event.snapshot.ask_lots.extend(ask_lots)
            return self._with_estimated_time(event)
        if body["s"] != self._symbol:
            raise FeedError("s", f"is {body['s']!r}, expected {self._symbol!r}")
        if kind is None:
            event.quote.update_id = _integer(body, "u")
            event.quote.bid_ticks = _fixed(body["b"], "b")
            event.quote.bid_lots = _fixed(body["B"], "B")
            event.quote.ask_ticks = _fixed(body["a"], "a")
            event.quote.ask_lots = _fixed(body["A"], "A")
            return self._with_estimated_time(event)
        if kind == "depthUpdate":
            bid_ticks, bid_lots = _levels(body, "b")
            ask_ticks, ask_lots = _levels(body, "a")
            first, last = _integer(body, "U"), _integer(body, "u")
            if last < first:
                raise FeedError("u", "must not be below U")
            event.delta.first_update_id = first
            event.delta.last_update_id = last
            event.delta.bid_ticks.extend(bid_ticks)
            event.delta.bid_lots.extend(bid_lots)
            event.delta.ask_ticks.extend(ask_ticks)
            event.delta.ask_lots.extend(ask_lots)
        elif kind == "trade":
            if not isinstance(body["m"], bool):
                raise FeedError("m", "must be true or false")
            event.trade.trade_id = _integer(body, "t")
            event.trade.price_ticks = _fixed(body["p"], "p")
            event.trade.lots = _fixed(body["q"], "q")
            # `m`: the buyer was the maker, so the seller took.
            event.trade.taker_side = pb.TAKER_SIDE_SELL if body["m"] else pb.TAKER_SIDE_BUY
        else:
            raise FeedError("e", f"{kind!r} is not depthUpdate, bookTicker or trade")
        event.event_time_ns = _integer(body, "E") * 1_000_000
        self._lag.observe(receive_time_ns, event.event_time_ns)
        return event

    def _with_estimated_time(self, event: pb.MarketEvent) -> pb.MarketEvent | None:
        lag = self._lag.at(event.receive_time_ns)
        if lag is None:
            return None
        event.event_time_ns = event.receive_time_ns - lag
        event.event_time_estimated = True
        return event


def _integer(body: dict[str, Any], field: str) -> int:
    value = body[field]
    if type(value) is not int or not 0 < value < 10**_MAX_DIGITS:
        raise FeedError(field, f"{value!r} is not a positive integer of at most {_MAX_DIGITS} digits")
    if field == "E" and value > _LATEST_MS:
        raise FeedError(field, f"{value} is not a time in milliseconds")
    return value


def _fixed(text: Any, field: str) -> int:
    """The decimal string times 10^8, exactly."""
    if type(text) is not str:
        raise FeedError(field, f"{text!r} is not a decimal string")
    whole, _, fraction = text.partition(".")
    digits = whole + fraction
    if not (digits.isascii() and digits.isdigit() and whole):
        raise FeedError(field, f"{text!r} is not a decimal string")
    if len(fraction) > _DECIMALS:
        if fraction[_DECIMALS:].strip("0"):
            raise FeedError(field, f"{text!r} has more than {_DECIMALS} decimals")
        digits = whole + fraction[:_DECIMALS]
    elif len(fraction) < _DECIMALS:
        digits += "0" * (_DECIMALS - len(fraction))
    if len(digits) > _MAX_DIGITS:
        raise FeedError(field, f"{text!r} does not fit in 64 bits")
    return int(digits)


def _levels(body: dict[str, Any], field: str) -> tuple[list[int], list[int]]:
    levels = body[field]
    if type(levels) is not list:
        raise FeedError(field, "must be a list of [price, size]")
    try:
        return [_fixed(price, field) for price, _ in levels], [_fixed(size, field) for _, size in levels]
    except (TypeError, ValueError) as error:
        if isinstance(error, FeedError):
            raise
        raise FeedError(field, "must be a list of [price, size]") from error
