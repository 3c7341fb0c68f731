"""Coinbase Exchange messages as market events: the level-2 feed and the full (level-3) feed.

`CoinbaseLevel2` decodes the channels `level2`, `matches`, `ticker` and `heartbeat`. `CoinbaseFull` decodes the channel
`full` with the level-3 snapshot of the REST interface. Each takes what one or several connections send about any number
of products; `BTC-USD` becomes the instrument `BTC-USD.COINBASE`. An instrument uses one of the two feeds, because their
update ids differ.

Prices and sizes are read from their decimal strings into integers of 8 decimals, exactly.

Source: Coinbase Exchange, "WebSocket channels", and the product book of the REST interface.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from feature_cache.feeds import wire
from feature_cache.feeds.wire import FeedError
from pretrade.market.v1 import market_pb2 as pb

VENUE: Final = "COINBASE"
PRICE_DECIMALS: Final = 8
SIZE_DECIMALS: Final = 8
MAX_WAITING: Final = 100_000
"""Messages of one product that wait for its level-3 snapshot; more than these need a newer one anyway."""

_SIDES: Final = ("buy", "sell")
_NO_MARKET_DATA: Final = ("subscriptions", "status", "last_match")


def instrument_of(product: str) -> str:
    """`BTC-USD` → `BTC-USD.COINBASE`."""
    return f"{product}.{VENUE}"


class CoinbaseLevel2:
    """Decodes `level2`, `matches`, `ticker` and `heartbeat`, in the order in which the messages were received.

    Book messages carry no sequence, and the exchange guarantees their delivery while the connection lasts; each counts
    as one update id, beginning at 1, so that a loss on the way from here shows as a gap. `match` is a trade; the last
    one from before the subscription (`last_match`) is none. `ticker` says nothing that the book and the matches do not,
    and cannot be put in order with the book; it is checked, and is no event.
    """

    def __init__(self) -> None:
        self._times = wire.EventTimes()
        self._updates: dict[str, int] = {}
        self._last_trade: dict[str, int] = {}
        self._known: set[str] = set()
        self.missed_trades = 0
        """Trades that were never received: the ids of a product count without holes."""

    def decode(self, message: bytes | str, receive_time_ns: int) -> list[pb.MarketEvent]:
        """Turns one message into market events, with `publish_time_ns` equal to the receive time.

        Args:
            message: JSON as sent by the exchange.
            receive_time_ns: When it was received, nanoseconds since the Unix epoch.

        Returns:
            Empty for a message that is no event, for a snapshot that waits for the feed's lag to be known (it is
            returned with a later message), and for an update of a book without a snapshot.

        Raises:
            FeedError: Not JSON, an unknown type, or a field that is missing or breaks its rule. The state is as before.
        """
        body = wire.json_object(message)
        try:
            kind = body["type"]
            if kind == "l2update":
                return self._update(body, receive_time_ns)
            if kind == "snapshot":
                return self._snapshot(body, receive_time_ns)
            if kind == "match":
                event = _match(body, receive_time_ns)
                self._count_missed(event)
                return self._times.timed([event])
            if kind == "heartbeat":
                return self._times.observe(receive_time_ns, wire.rfc3339_ns(body["time"], "time"))
            if kind == "ticker":
                wire.whole(body, "sequence")
                return []
        except KeyError as error:
            raise FeedError(str(error.args[0]), "is missing") from error
        if kind not in _NO_MARKET_DATA:
            raise FeedError("type", f"{kind!r:.40} is not a message of level2, matches, ticker or heartbeat")
        return []

    def disconnected(self, instruments: Iterable[str], receive_time_ns: int) -> list[pb.MarketEvent]:
        """The connection that sent these books was lost: a `BookReset` for each, until their next snapshots."""
        events = []
        for instrument in sorted(self._known.intersection(instruments)):
            self._known.remove(instrument)
            event = _event(instrument, receive_time_ns)
            event.reset.reason = "reconnect"
            events += self._times.untimed(event)
        return events

    def _snapshot(self, body: dict[str, Any], receive_time_ns: int) -> list[pb.MarketEvent]:
        event = _event(instrument_of(_product(body)), receive_time_ns)
        bids, asks = _levels(body, "bids"), _levels(body, "asks")
        if "time" in body:
            event.event_time_ns = wire.rfc3339_ns(body["time"], "time")
        self._known.add(event.instrument)
        event.snapshot.last_update_id = self._next(event.instrument)
        _write(event.snapshot, bids, asks)
        return self._times.timed([event]) if event.event_time_ns else self._times.untimed(event)

    def _update(self, body: dict[str, Any], receive_time_ns: int) -> list[pb.MarketEvent]:
        event = _event(instrument_of(_product(body)), receive_time_ns)
        event.event_time_ns = wire.rfc3339_ns(body["time"], "time")
        changes = body["changes"]
        if not isinstance(changes, list):
            raise FeedError("changes", "must be a list of [side, price, size]")
        sides: dict[str, list[tuple[int, int]]] = {side: [] for side in _SIDES}
        for change in changes:
            if not isinstance(change, list) or len(change) != 3 or change[0] not in _SIDES:
                raise FeedError("changes", "must be a list of [side, price, size]")
            side, price, size = change
            sides[side].append(_level(price, size, "changes"))
        if event.instrument not in self._known:
            return self._times.observe(receive_time_ns, event.event_time_ns)
        event.delta.first_update_id = event.delta.last_update_id = self._next(event.instrument)
        _write(event.delta, sides["buy"], sides["sell"])
        return self._times.timed([event])

    def _next(self, instrument: str) -> int:
        update = self._updates[instrument] = self._updates.get(instrument, 0) + 1
        return update

    def _count_missed(self, event: pb.MarketEvent) -> None:
        trade_id = event.trade.trade_id
        last = self._last_trade.get(event.instrument, trade_id - 1)
        self.missed_trades += max(0, trade_id - last - 1)
        self._last_trade[event.instrument] = max(last, trade_id)


@dataclass(slots=True)
class _Order:
    """An order that rests on the book."""

    side: str
    ticks: int
    lots: int


@dataclass(slots=True)
class _Message:
    """One checked message of the full channel; the fields that its type has."""

    type: str
    sequence: int
    event: pb.MarketEvent  # with times, and with the trade of a match
    order_id: str = ""
    side: str = ""
    ticks: int = 0  # 0: none
    lots: int = 0


@dataclass(slots=True)
class _Orders:
    """The level-3 book of one product, and what waits for its snapshot."""

    sequence: int = 0
    """The last message taken in; 0 while the book is unknown."""
    told: int = 0
    """The sequence up to which events have been published for the book."""
    orders: dict[str, _Order] = field(default_factory=dict)
    levels: dict[str, dict[int, int]] = field(default_factory=lambda: {side: {} for side in _SIDES})
    waiting: deque[_Message] = field(default_factory=lambda: deque(maxlen=MAX_WAITING))
    fits: bool = True
    """Whether every level's total has fitted in 18 digits."""

    def add(self, order_id: str, order: _Order) -> None:
        self.orders[order_id] = order
        self._change(order.side, order.ticks, order.lots)

    def resize(self, order_id: str, lots: int) -> None:
        """Sets what is left of an order; 0 takes it off the book."""
        order = self.orders[order_id]
        self._change(order.side, order.ticks, lots - order.lots)
        order.lots = lots
        if not lots:
            del self.orders[order_id]

    def forget(self) -> None:
        self.sequence = self.told = 0
        self.fits = True
        self.orders.clear()
        for levels in self.levels.values():
            levels.clear()

    def _change(self, side: str, ticks: int, lots: int) -> None:
        levels = self.levels[side]
        total = levels.get(ticks, 0) + lots
        if total:
            levels[ticks] = total
            self.fits &= total <= wire.MAX_FIXED
        else:
            levels.pop(ticks, None)


class CoinbaseFull:
    """Decodes the channel `full`, in the order in which the messages were received, and folds its orders to levels.

    Messages of a product that come before its snapshot wait. The snapshot drops those it contains; the ones after it
    are taken in if the first follows on its sequence, or else the book stays unknown until a newer snapshot. From then
    on sequences must follow one another: a hole is a `BookReset`, and the messages after it wait for a new snapshot.

    Update ids are the exchange's sequences. A delta tells of every message since the one before, `first_update_id` to
    `last_update_id`; most messages (an order received, or done that never was on the book) change no level, and give no
    event.
    """

    def __init__(self) -> None:
        self._times = wire.EventTimes()
        self._products: dict[str, _Orders] = {}
        self.gaps = 0
        """Holes in the sequences."""
        self.stale = 0
        """Messages and snapshots older than the book."""

    def decode(self, message: bytes | str, receive_time_ns: int) -> list[pb.MarketEvent]:
        """As `CoinbaseLevel2.decode`."""
        body = wire.json_object(message)
        try:
            kind = body["type"]
            if kind == "heartbeat":
                return self._times.observe(receive_time_ns, wire.rfc3339_ns(body["time"], "time"))
            # `activate` is about stop orders, which are not on the book; it has no sequence.
            if kind in ("activate", "ticker") or kind in _NO_MARKET_DATA:
                return []
            checked = _checked(body, receive_time_ns)
        except KeyError as error:
            raise FeedError(str(error.args[0]), "is missing") from error
        return self._times.timed(self._take(_product(body), checked)) or self._times.observe(
            receive_time_ns, checked.event.event_time_ns
        )

    def snapshot(self, product: str, message: bytes | str, receive_time_ns: int) -> list[pb.MarketEvent]:
        """Takes the level-3 book of one product in, as the REST interface sends it.

        Returns:
            The snapshot and what waited for it; empty when it is older than the book or than the messages that wait.

        Raises:
            FeedError: As for `decode`.
        """
        body = wire.json_object(message)
        try:
            sequence = wire.whole(body, "sequence")
            found = [_orders(body, "bids", "buy"), _orders(body, "asks", "sell")]
        except KeyError as error:
            raise FeedError(str(error.args[0]), "is missing") from error
        book = self._products.setdefault(product, _Orders())
        waiting = book.waiting
        while waiting and waiting[0].sequence <= sequence:
            waiting.popleft()
        if sequence <= book.sequence or (waiting and waiting[0].sequence > sequence + 1):
            self.stale += 1
            return []
        fresh = _Orders(waiting=waiting)
        for side in found:
            for order_id, order in side.items():
                fresh.add(order_id, order)
        if not fresh.fits:
            raise FeedError("message", "holds a level that does not fit in 18 digits")
        book = self._products[product] = fresh
        book.sequence = book.told = sequence
        event = _event(instrument_of(product), receive_time_ns)
        event.snapshot.last_update_id = sequence
        _write(event.snapshot, book.levels["buy"].items(), book.levels["sell"].items())
        pending = list(waiting)
        waiting.clear()
        # Their trades were published when they came in.
        later = [
            event for each in pending for event in self._take(product, each) if event.WhichOneof("event") != "trade"
        ]
        events = self._times.untimed(event)
        return events + later if events else self._times.timed(later)

    def disconnected(self, instruments: Iterable[str], receive_time_ns: int) -> list[pb.MarketEvent]:
        """As `CoinbaseLevel2.disconnected`."""
        wanted = set(instruments)
        events = []
        for product, book in self._products.items():
            if instrument_of(product) in wanted:
                known = bool(book.sequence)
                book.forget()
                book.waiting.clear()
                if known:
                    event = _event(instrument_of(product), receive_time_ns)
                    event.reset.reason = "reconnect"
                    events += self._times.untimed(event)
        return events

    def _take(self, product: str, message: _Message) -> list[pb.MarketEvent]:
        """Takes one message in; returns its events, all with their times."""
        book = self._products.setdefault(product, _Orders())
        trade = [message.event] if message.type == "match" else []
        if not book.sequence:
            book.waiting.append(message)
            return trade
        if message.sequence <= book.sequence:
            # What the snapshot contained already; of the trades only whoever keeps them can tell.
            self.stale += 1
            return trade
        if message.sequence > book.sequence + 1:
            self.gaps += 1
            book.forget()
            book.waiting.append(message)
            reset = _sibling(message.event)
            reset.reset.reason = "gap"
            return [reset, *trade]
        book.sequence = message.sequence
        changed = _apply(book, message)
        if not book.fits:
            book.forget()
            reset = _sibling(message.event)
            reset.reset.reason = "overflow"
            return [reset, *trade]
        if not changed:
            return trade
        delta = _sibling(message.event)
        delta.delta.first_update_id = book.told + 1
        delta.delta.last_update_id = book.told = message.sequence
        for side, ticks in changed:
            _write_level(delta.delta, side, ticks, book.levels[side].get(ticks, 0))
        return [delta, *trade]


def _apply(book: _Orders, message: _Message) -> list[tuple[str, int]]:
    """Brings the orders up to date; returns the levels (side, ticks) that changed."""
    order = book.orders.get(message.order_id)
    if message.type == "open":
        if order is not None or not message.lots:
            return []
        book.add(message.order_id, _Order(message.side, message.ticks, message.lots))
        return [(message.side, message.ticks)]
    if order is None:
        return []
    before = (order.side, order.ticks)
    if message.type == "done":
        book.resize(message.order_id, 0)
    elif message.type == "match":
        book.resize(message.order_id, max(0, order.lots - message.lots))
    elif message.type == "change":
        if message.ticks not in (0, order.ticks):
            book.resize(message.order_id, 0)
            if message.lots:
                book.add(message.order_id, _Order(before[0], message.ticks, message.lots))
            return [before, (before[0], message.ticks)]
        book.resize(message.order_id, message.lots)
    else:
        return []
    return [before]


def _checked(body: dict[str, Any], receive_time_ns: int) -> _Message:
    kind = body["type"]
    event = _event(instrument_of(_product(body)), receive_time_ns)
    event.event_time_ns = wire.rfc3339_ns(body["time"], "time")
    message = _Message(kind, wire.whole(body, "sequence"), event)
    if kind == "received":
        return message
    if kind == "match":
        message.event = _match(body, receive_time_ns)
        message.order_id, message.lots = _text(body, "maker_order_id"), message.event.trade.lots
        return message
    message.order_id = _text(body, "order_id")
    if kind == "open":
        message.side = _side(body)
        message.ticks = wire.positive(body["price"], "price", PRICE_DECIMALS)
        message.lots = wire.fixed(body["remaining_size"], "remaining_size", SIZE_DECIMALS)
    elif kind == "change":
        # Without a size it is about the funds of a market order, which is not on the book.
        if body.get("new_size") is not None:
            message.lots = wire.fixed(body["new_size"], "new_size", SIZE_DECIMALS)
            if body.get("new_price") is not None:
                message.ticks = wire.positive(body["new_price"], "new_price", PRICE_DECIMALS)
        else:
            message.type = "received"
    elif kind != "done":
        raise FeedError("type", f"{kind!r:.40} is not a message of the full channel")
    return message


def _match(body: dict[str, Any], receive_time_ns: int) -> pb.MarketEvent:
    event = _event(instrument_of(_product(body)), receive_time_ns)
    event.event_time_ns = wire.rfc3339_ns(body["time"], "time")
    wire.whole(body, "sequence")
    event.trade.trade_id = wire.whole(body, "trade_id")
    event.trade.price_ticks = wire.positive(body["price"], "price", PRICE_DECIMALS)
    event.trade.lots = wire.positive(body["size"], "size", SIZE_DECIMALS)
    # `side` is the maker's.
    event.trade.taker_side = pb.TAKER_SIDE_SELL if _side(body) == "buy" else pb.TAKER_SIDE_BUY
    return event


def _event(instrument: str, receive_time_ns: int) -> pb.MarketEvent:
    return wire.new_event(instrument, PRICE_DECIMALS, SIZE_DECIMALS, receive_time_ns)


def _sibling(event: pb.MarketEvent) -> pb.MarketEvent:
    """An event of the same instrument and times, without a body."""
    sibling = _event(event.instrument, event.receive_time_ns)
    sibling.event_time_ns = event.event_time_ns
    return sibling


def _product(body: dict[str, Any]) -> str:
    return _text(body, "product_id")


def _text(body: dict[str, Any], name: str) -> str:
    value = body[name]
    if type(value) is not str or not value:
        raise FeedError(name, f"{value!r:.40} is not text")
    return value


def _side(body: dict[str, Any]) -> str:
    side = body["side"]
    if side not in _SIDES:
        raise FeedError("side", f"{side!r:.40} is neither buy nor sell")
    return str(side)


def _level(price: Any, size: Any, name: str) -> tuple[int, int]:
    return wire.positive(price, name, PRICE_DECIMALS), wire.fixed(size, name, SIZE_DECIMALS)


def _levels(body: dict[str, Any], name: str) -> list[tuple[int, int]]:
    levels = body[name]
    if not isinstance(levels, list) or not all(isinstance(level, list) and len(level) == 2 for level in levels):
        raise FeedError(name, "must be a list of [price, size]")
    return [_level(price, size, name) for price, size in levels]


def _orders(body: dict[str, Any], name: str, side: str) -> dict[str, _Order]:
    orders = body[name]
    if not isinstance(orders, list) or not all(isinstance(order, list) and len(order) == 3 for order in orders):
        raise FeedError(name, "must be a list of [price, size, order_id]")
    found = {}
    for price, size, order_id in orders:
        if type(order_id) is not str or not order_id:
            raise FeedError(name, f"{order_id!r:.40} is not an order id")
        ticks, lots = _level(price, size, name)
        if lots:
            found[order_id] = _Order(side, ticks, lots)
    return found


def _write(
    body: pb.BookSnapshot | pb.BookDelta, bids: Iterable[tuple[int, int]], asks: Iterable[tuple[int, int]]
) -> None:
    for side, levels in (("buy", bids), ("sell", asks)):
        for ticks, lots in levels:
            _write_level(body, side, ticks, lots)


def _write_level(body: pb.BookSnapshot | pb.BookDelta, side: str, ticks: int, lots: int) -> None:
    if side == "buy":
        body.bid_ticks.append(ticks)
        body.bid_lots.append(lots)
    else:
        body.ask_ticks.append(ticks)
        body.ask_lots.append(lots)
