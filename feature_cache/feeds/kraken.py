"""Kraken spot messages as market events: the v1 and the v2 WebSocket protocol, channels `book` and `trade`.

One `KrakenV1` or `KrakenV2` decodes what one or several connections send about any number of pairs. `XBT/USD` becomes
the instrument `XBT-USD.KRAKEN`, `BTC/USD` (v2's name of it) `BTC-USD.KRAKEN`.

Kraken does not number messages, nor trades in v1. Instead it sends a CRC32 of the ten best levels of both sides, so the
feed maintains the books itself. Every book message counts as one update id, beginning at 1: a loss on the way *from*
here shows as a gap. A loss on the way *to* here shows as a failed checksum and becomes a `BookReset`, after which the
pair's updates are dropped until its next snapshot. The feed emits events that remove the levels which fall out of the
subscribed depth, since Kraken does not send that.

The checksum is over the digits of price and size as Kraken sends them, ten asks and then ten bids, best first, without
points and leading zeros. These are the integers in ticks and lots when both have the decimals of the wire. v1's strings
show these decimals (they are not `pair_decimals` of AssetPairs). For v2's numbers the `instrument` channel gives them.

Source: Kraken, "Book checksum" guides for WebSocket v1 and v2, and the references of `book`, `trade`, `instrument`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import orjson

from feature_cache.engine.book import Levels
from feature_cache.feeds import wire
from feature_cache.feeds.wire import FeedError
from pretrade.market.v1 import market_pb2 as pb

VENUE: Final = "KRAKEN"

_CHECKED_LEVELS: Final = 10
_DEFAULT_DEPTH: Final = 10
_MAX_DECIMALS: Final = 18
_TAKER_SIDES: Final[dict[str, pb.TakerSide.ValueType]] = {
    "b": pb.TAKER_SIDE_BUY,
    "s": pb.TAKER_SIDE_SELL,
    "buy": pb.TAKER_SIDE_BUY,
    "sell": pb.TAKER_SIDE_SELL,
}

_Side = list[tuple[int, int]]  # (ticks, lots) in the order of the message


def instrument_of(pair: str) -> str:
    """`XBT/USD` → `XBT-USD.KRAKEN`."""
    return f"{pair.replace('/', '-')}.{VENUE}"


@dataclass(frozen=True, slots=True)
class Decimals:
    """How many decimals prices and sizes have on the wire."""

    price: int
    size: int


class _Pair:
    """The book of one pair, as far as the checksums and the truncation to the depth need it."""

    def __init__(self, name: str, decimals: Decimals) -> None:
        self.name = name
        self.instrument = instrument_of(name)
        self.decimals = decimals
        self.valid = False
        self.updates = 0
        self.trades = 0
        self._bids = Levels(1)
        self._asks = Levels(-1)

    def event(self, receive_time_ns: int) -> pb.MarketEvent:
        """An event of this pair, without a body or an event time."""
        return wire.new_event(self.instrument, self.decimals.price, self.decimals.size, receive_time_ns)

    def replace(self, bids: _Side, asks: _Side, depth: int) -> None:
        """Takes a snapshot in."""
        self._bids.replace(bids)
        self._asks.replace(asks)
        _truncate(self._bids, depth)
        _truncate(self._asks, depth)
        self.valid = True
        self.updates += 1

    def change(self, bids: _Side, asks: _Side, depth: int) -> tuple[_Side, _Side]:
        """Takes an update in; returns it with the removal of the levels that fell out of the depth."""
        self.updates += 1
        for levels, changes in ((self._bids, bids), (self._asks, asks)):
            for ticks, lots in changes:
                levels.set(ticks, lots)
        return bids + _truncate(self._bids, depth), asks + _truncate(self._asks, depth)

    def forget(self) -> None:
        """The book is unknown until the next snapshot."""
        self.valid = False
        self._bids.clear()
        self._asks.clear()

    def checksum(self) -> int:
        digits = "".join(
            f"{ticks}{lots}" for side in (self._asks, self._bids) for ticks, lots in side.top(_CHECKED_LEVELS)
        )
        return zlib.crc32(digits.encode())

    def write_snapshot(self, event: pb.MarketEvent) -> None:
        event.snapshot.last_update_id = self.updates
        _write(event.snapshot, self._bids.top(len(self._bids)), self._asks.top(len(self._asks)))


class _Books:
    """What both protocols share: pairs by name, counts, and the events of a book message."""

    def __init__(self) -> None:
        self.pairs: dict[str, _Pair] = {}
        self.times = wire.EventTimes()
        self.checksums = 0
        self.checksum_failures = 0

    def snapshot(
        self, pair: _Pair, bids: _Side, asks: _Side, depth: int, checksum: int | None, receive_time_ns: int
    ) -> pb.MarketEvent:
        pair.replace(bids, asks, depth)
        event = pair.event(receive_time_ns)
        if self._agrees(pair, checksum):
            pair.write_snapshot(event)
        else:
            event.reset.reason = "checksum"
        return event

    def update(
        self, pair: _Pair, bids: _Side, asks: _Side, depth: int, checksum: int, receive_time_ns: int
    ) -> pb.MarketEvent | None:
        if not pair.valid:
            return None
        bids, asks = pair.change(bids, asks, depth)
        event = pair.event(receive_time_ns)
        if self._agrees(pair, checksum):
            event.delta.first_update_id = event.delta.last_update_id = pair.updates
            _write(event.delta, bids, asks)
        else:
            event.reset.reason = "checksum"
        return event

    def disconnected(self, instruments: Iterable[str], receive_time_ns: int) -> list[pb.MarketEvent]:
        wanted = set(instruments)
        events = []
        for pair in self.pairs.values():
            if pair.valid and pair.instrument in wanted:
                pair.forget()
                event = pair.event(receive_time_ns)
                event.reset.reason = "reconnect"
                events += self.times.untimed(event)
        return events

    def _agrees(self, pair: _Pair, checksum: int | None) -> bool:
        if checksum is None:
            return True
        self.checksums += 1
        if pair.checksum() == checksum:
            return True
        self.checksum_failures += 1
        pair.forget()
        return False


class KrakenV1:
    """Decodes the messages of Kraken's v1 WebSocket protocol, in the order in which they were received.

    A pair's decimals are those of its first book or trade message. An update's event time is that of its newest level
    that is no republication; snapshots carry no time of their own, and theirs is estimated. A subscription to trades
    may begin with past ones, unmarked; those that are over ten seconds old are no events.
    """

    def __init__(self) -> None:
        self._books = _Books()

    @property
    def checksums(self) -> int:
        """Checksums compared."""
        return self._books.checksums

    @property
    def checksum_failures(self) -> int:
        """Those that did not match."""
        return self._books.checksum_failures

    def decode(self, message: bytes | str, receive_time_ns: int) -> list[pb.MarketEvent]:
        """Turns one message into market events, with `publish_time_ns` equal to the receive time.

        Args:
            message: JSON as sent by the exchange.
            receive_time_ns: When it was received, nanoseconds since the Unix epoch.

        Returns:
            Empty for heartbeats and the like, for a snapshot that waits for the feed's lag to be known (it is returned
            with a later message), and for an update of a book that is unknown.

        Raises:
            FeedError: Not JSON, an unknown channel, or a field that is missing or breaks its rule. The state is as
                before.
        """
        try:
            body = orjson.loads(message)
        except orjson.JSONDecodeError as error:
            raise FeedError("message", f"is not JSON: {error}") from error
        if isinstance(body, dict):
            if type(body.get("event")) is not str:
                raise FeedError("event", "is missing")
            if body.get("status") == "error" or body["event"] == "error":
                raise FeedError("errorMessage", f"the exchange refuses: {body.get('errorMessage')!r:.100}")
            return []
        if not isinstance(body, list) or len(body) < 4:
            raise FeedError("message", "must be [channelID, payload, …, channelName, pair] or an object with an event")
        *payloads, channel, name = body[1:]
        if type(name) is not str or not name:
            raise FeedError("pair", f"{name!r:.40} is not the name of a pair")
        if type(channel) is not str:
            raise FeedError("channelName", f"{channel!r:.40} is not text")
        if channel == "trade":
            return self._trades(name, payloads, receive_time_ns)
        kind, _, depth = channel.partition("-")
        if kind != "book" or not (depth.isascii() and depth.isdigit() and 0 < int(depth[:9]) <= 10_000):
            raise FeedError("channelName", f"{channel!r:.40} is not trade or book-<depth>")
        return self._book(name, payloads, int(depth), receive_time_ns)

    def disconnected(self, instruments: Iterable[str], receive_time_ns: int) -> list[pb.MarketEvent]:
        """The connection that sent these books was lost: a `BookReset` for each, until their next snapshots."""
        return self._books.disconnected(instruments, receive_time_ns)

    def _book(self, name: str, payloads: list[Any], depth: int, receive_time_ns: int) -> list[pb.MarketEvent]:
        body: dict[str, Any] = {}
        for payload in payloads:
            if not isinstance(payload, dict):
                raise FeedError("book", "must be an object")
            body |= payload
        snapshot = "as" in body or "bs" in body
        bid_field, ask_field = ("bs", "as") if snapshot else ("b", "a")
        bid_entries, ask_entries = _entries(body, bid_field), _entries(body, ask_field)
        pair = self._pair(name, bid_entries or ask_entries, bid_field if bid_entries else ask_field)
        if pair is None:
            raise FeedError("book", "holds no level")
        bids, newest_bid = _v1_levels(bid_entries, bid_field, pair.decimals)
        asks, newest_ask = _v1_levels(ask_entries, ask_field, pair.decimals)
        if snapshot:
            self._books.pairs[name] = pair
            return self._books.times.untimed(self._books.snapshot(pair, bids, asks, depth, None, receive_time_ns))
        if "c" not in body:
            raise FeedError("c", "is missing")
        checksum = wire.fixed(body["c"], "c", 0)
        self._books.pairs[name] = pair
        event = self._books.update(pair, bids, asks, depth, checksum, receive_time_ns)
        if event is None:
            return []
        event.event_time_ns = max(newest_bid, newest_ask)
        return self._books.times.timed([event]) if event.event_time_ns else self._books.times.untimed(event)

    def _trades(self, name: str, payloads: list[Any], receive_time_ns: int) -> list[pb.MarketEvent]:
        if len(payloads) != 1 or not isinstance(payloads[0], list):
            raise FeedError("trade", "must be a list of trades")
        for trade in payloads[0]:
            if not isinstance(trade, list) or len(trade) < 4:
                raise FeedError("trade", "must be [price, volume, time, side, orderType, misc]")
        pair = self._pair(name, payloads[0], "trade")
        if pair is None:
            return []
        events = []
        for number, (price, volume, time, side, *_) in enumerate(payloads[0], start=pair.trades + 1):
            event = pair.event(receive_time_ns)
            event.event_time_ns = wire.epoch_seconds_ns(time, "trade.time")
            event.trade.trade_id = number
            event.trade.price_ticks = wire.positive(price, "trade.price", pair.decimals.price)
            event.trade.lots = wire.positive(volume, "trade.volume", pair.decimals.size)
            event.trade.taker_side = _taker_side(side, "trade.side")
            events.append(event)
        events = [event for event in events if not self._books.times.is_past(receive_time_ns, event.event_time_ns)]
        pair.trades += len(payloads[0])
        self._books.pairs[name] = pair
        return self._books.times.timed(events)

    def _pair(self, name: str, entries: list[Any], field: str) -> _Pair | None:
        """The pair as known, or as its first price and size show it; None when there is nothing to see."""
        pair = self._books.pairs.get(name)
        if pair is not None or not entries:
            return pair
        price, size, *_ = entries[0]
        return _Pair(name, Decimals(wire.decimals_of(price, field), wire.decimals_of(size, field)))


@dataclass(frozen=True, slots=True)
class _V2Book:
    """One checked element of a v2 book message."""

    pair: _Pair
    bids: _Side
    asks: _Side
    checksum: int
    time_ns: int  # 0 where Kraken sends none


class KrakenV2:
    """Decodes the messages of Kraken's v2 WebSocket protocol, in the order in which they were received.

    Prices and sizes are JSON numbers and are read without rounding. A pair's decimals come from the `instrument`
    channel, which must be subscribed to before `book` and `trade`; its depth from the acknowledgement of the
    subscription, and is Kraken's default of 10 without one. The snapshot of past trades is no event.
    """

    def __init__(self) -> None:
        self._books = _Books()
        self._depths: dict[str, int] = {}

    @property
    def checksums(self) -> int:
        """Checksums compared."""
        return self._books.checksums

    @property
    def checksum_failures(self) -> int:
        """Those that did not match."""
        return self._books.checksum_failures

    def decode(self, message: bytes | str, receive_time_ns: int) -> list[pb.MarketEvent]:
        """As `KrakenV1.decode`."""
        try:
            body = json.loads(message, parse_float=Decimal)
        except (ValueError, RecursionError) as error:
            raise FeedError("message", f"is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise FeedError("message", "must be a JSON object")
        try:
            if "method" in body:
                self._acknowledged(body)
                return []
            channel = body["channel"]
            if channel == "book":
                return self._book(body, receive_time_ns)
            if channel == "trade":
                return self._trades(body, receive_time_ns)
            if channel == "instrument":
                return self._instruments(body, receive_time_ns)
        except KeyError as error:
            raise FeedError(str(error.args[0]), "is missing") from error
        if channel not in ("heartbeat", "status"):
            raise FeedError("channel", f"{channel!r:.40} is not book, trade, instrument, heartbeat or status")
        return []

    def disconnected(self, instruments: Iterable[str], receive_time_ns: int) -> list[pb.MarketEvent]:
        """As `KrakenV1.disconnected`."""
        return self._books.disconnected(instruments, receive_time_ns)

    def _acknowledged(self, body: dict[str, Any]) -> None:
        if body.get("success") is False:
            raise FeedError("error", f"the exchange refuses: {body.get('error')!r:.100}")
        result = body.get("result")
        if not isinstance(result, dict) or result.get("channel") != "book" or body["method"] != "subscribe":
            return
        depth, symbol = result.get("depth", _DEFAULT_DEPTH), result["symbol"]
        if type(depth) is not int or not 0 < depth <= 10_000:
            raise FeedError("result.depth", f"{depth!r:.40} is not a number of levels")
        if type(symbol) is not str:
            raise FeedError("result.symbol", f"{symbol!r:.40} is not the name of a pair")
        self._depths[symbol] = depth

    def _instruments(self, body: dict[str, Any], receive_time_ns: int) -> list[pb.MarketEvent]:
        payload = body["data"]
        if not isinstance(payload, dict) or not isinstance(payload.get("pairs", []), list):
            raise FeedError("data.pairs", "must be a list of pairs")
        decimals = {}
        for entry in payload.get("pairs", []):
            if not isinstance(entry, dict):
                raise FeedError("data.pairs", "must be a list of pairs")
            decimals[_name(entry)] = Decimals(_precision(entry, "price_precision"), _precision(entry, "qty_precision"))
        events: list[pb.MarketEvent] = []
        for name, value in decimals.items():
            pair = self._books.pairs.get(name)
            if pair is None:
                self._books.pairs[name] = _Pair(name, value)
            elif pair.decimals != value:
                known = pair.valid
                pair.forget()
                pair.decimals = value
                if known:
                    event = pair.event(receive_time_ns)
                    event.reset.reason = "decimals"
                    events += self._books.times.untimed(event)
        return events

    def _book(self, body: dict[str, Any], receive_time_ns: int) -> list[pb.MarketEvent]:
        snapshot = body["type"] == "snapshot"
        if not snapshot and body["type"] != "update":
            raise FeedError("type", f"{body['type']!r:.40} is not snapshot or update")
        events: list[pb.MarketEvent] = []
        for book in [self._checked(entry) for entry in _elements(body)]:
            depth = self._depths.get(book.pair.name, _DEFAULT_DEPTH)
            take = self._books.snapshot if snapshot else self._books.update
            event = take(book.pair, book.bids, book.asks, depth, book.checksum, receive_time_ns)
            if event is None:
                continue
            if book.time_ns:
                event.event_time_ns = book.time_ns
                events += self._books.times.timed([event])
            else:
                events += self._books.times.untimed(event)
        return events

    def _checked(self, entry: dict[str, Any]) -> _V2Book:
        pair = self._pair(entry)
        checksum = entry["checksum"]
        if type(checksum) is not int or not 0 <= checksum < 2**32:
            raise FeedError("checksum", f"{checksum!r:.40} is not an unsigned integer of 32 bits")
        return _V2Book(
            pair=pair,
            bids=_v2_levels(entry, "bids", pair.decimals),
            asks=_v2_levels(entry, "asks", pair.decimals),
            checksum=checksum,
            time_ns=wire.rfc3339_ns(entry["timestamp"], "timestamp") if "timestamp" in entry else 0,
        )

    def _trades(self, body: dict[str, Any], receive_time_ns: int) -> list[pb.MarketEvent]:
        if body["type"] == "snapshot":
            return []
        if body["type"] != "update":
            raise FeedError("type", f"{body['type']!r:.40} is not snapshot or update")
        events = []
        for entry in _elements(body):
            pair = self._pair(entry)
            event = pair.event(receive_time_ns)
            event.event_time_ns = wire.rfc3339_ns(entry["timestamp"], "timestamp")
            event.trade.trade_id = wire.whole(entry, "trade_id")
            event.trade.price_ticks = _positive(entry, "price", pair.decimals.price)
            event.trade.lots = _positive(entry, "qty", pair.decimals.size)
            event.trade.taker_side = _taker_side(entry["side"], "side")
            events.append(event)
        return self._books.times.timed(events)

    def _pair(self, entry: dict[str, Any]) -> _Pair:
        name = _name(entry)
        pair = self._books.pairs.get(name)
        if pair is None:
            raise FeedError("symbol", f"the instrument channel has not sent the decimals of {name!r:.40}")
        return pair


def _name(entry: dict[str, Any]) -> str:
    name = entry["symbol"]
    if type(name) is not str or not name:
        raise FeedError("symbol", f"{name!r:.40} is not the name of a pair")
    return name


def _precision(entry: dict[str, Any], field: str) -> int:
    value = entry[field]
    if type(value) is not int or not 0 <= value <= _MAX_DECIMALS:
        raise FeedError(field, f"{value!r:.40} is not a number of decimals up to {_MAX_DECIMALS}")
    return value


def _elements(body: dict[str, Any]) -> list[dict[str, Any]]:
    elements = body["data"]
    if not isinstance(elements, list) or not all(isinstance(entry, dict) for entry in elements):
        raise FeedError("data", "must be a list of objects")
    return elements


def _v2_levels(entry: dict[str, Any], field: str, decimals: Decimals) -> _Side:
    levels = entry.get(field, [])
    if not isinstance(levels, list) or not all(isinstance(level, dict) for level in levels):
        raise FeedError(field, 'must be a list of {"price", "qty"}')
    return [
        (_positive(level, "price", decimals.price), wire.number(level["qty"], "qty", decimals.size)) for level in levels
    ]


def _positive(entry: dict[str, Any], field: str, decimals: int) -> int:
    value = wire.number(entry[field], field, decimals)
    if not value:
        raise FeedError(field, "must be above 0")
    return value


def _entries(body: dict[str, Any], field: str) -> list[Any]:
    entries = body.get(field, [])
    if not isinstance(entries, list):
        raise FeedError(field, "must be a list of [price, volume, timestamp]")
    for entry in entries:
        if not isinstance(entry, list) or len(entry) not in (3, 4) or (len(entry) == 4 and entry[3] != "r"):
            raise FeedError(field, 'must be a list of [price, volume, timestamp], perhaps with "r" for a republication')
    return entries


def _v1_levels(entries: list[Any], field: str, decimals: Decimals) -> tuple[_Side, int]:
    """The levels, and the time of the newest that is no republication: 0 when there is none."""
    levels, newest = [], 0
    for price, volume, time, *republished in entries:
        levels.append((wire.positive(price, field, decimals.price), wire.fixed(volume, field, decimals.size)))
        time_ns = wire.epoch_seconds_ns(time, field)
        if not republished and time_ns > newest:
            newest = time_ns
    return levels, newest


def _taker_side(side: Any, field: str) -> pb.TakerSide.ValueType:
    taker = _TAKER_SIDES.get(side) if type(side) is str else None
    if taker is None:
        raise FeedError(field, f"{side!r:.40} is neither buy nor sell")
    return taker


def _truncate(levels: Levels, depth: int) -> _Side:
    removed = []
    while len(levels) > depth:
        worst = levels.worst()
        assert worst is not None
        levels.set(worst, 0)
        removed.append((worst, 0))
    return removed


def _write(body: pb.BookSnapshot | pb.BookDelta, bids: _Side, asks: _Side) -> None:
    body.bid_ticks.extend([ticks for ticks, _ in bids])
    body.bid_lots.extend([lots for _, lots in bids])
    body.ask_ticks.extend([ticks for ticks, _ in asks])
    body.ask_lots.extend([lots for _, lots in asks])
