"""Coinbase's level-2 and full feeds, synthetic and recorded."""

from __future__ import annotations

import gzip
from collections import defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_cache.engine.engine import FeatureEngine
from feature_cache.feeds.coinbase import CoinbaseFull, CoinbaseLevel2
from feature_cache.feeds.wire import FeedError
from feature_cache.store.codec import BookState
from pretrade.market.v1 import market_pb2 as pb

RECORDING = Path(__file__).parents[4] / ".." / "shared" / "data" / "coinbase_pro" / "COINBASE.ws.28.0.gz"
recorded = pytest.mark.skipif(not RECORDING.is_file(), reason="the recorded sessions are not there")

PRODUCT, INSTRUMENT = "BTC-USD", "BTC-USD.COINBASE"
T0 = 1_618_677_817_000_000_000
TIME = "2021-04-17T16:43:37.000000Z"
RECEIVED = T0 + 40_000_000

SNAPSHOT = {
    "type": "snapshot",
    "product_id": PRODUCT,
    "bids": [["100.5", "1.25"], ["100", "2"]],
    "asks": [["101.00", "0.00000001"]],
}
UPDATE = {
    "type": "l2update",
    "product_id": PRODUCT,
    "changes": [["buy", "100.50", "0"], ["sell", "100.75", "3.5"], ["buy", "100.6", "7"]],
    "time": TIME,
}
MATCH = {
    "type": "match",
    "trade_id": 280232,
    "maker_order_id": "m",
    "taker_order_id": "t",
    "side": "sell",
    "size": "985",
    "price": "0.00001305",
    "product_id": PRODUCT,
    "sequence": 177100030,
    "time": TIME,
}
HEARTBEAT = {"type": "heartbeat", "sequence": 90, "last_trade_id": 20, "product_id": PRODUCT, "time": TIME}


def decode(feed: CoinbaseLevel2 | CoinbaseFull, message: Any, receive_time_ns: int = RECEIVED) -> list[pb.MarketEvent]:
    return feed.decode(orjson.dumps(message), receive_time_ns)


def kinds(events: list[pb.MarketEvent]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


def begun() -> CoinbaseLevel2:
    feed = CoinbaseLevel2()
    assert decode(feed, SNAPSHOT) == []
    assert kinds(decode(feed, HEARTBEAT)) == ["snapshot"]
    return feed


def test_a_snapshot_waits_for_the_lag_and_comes_before_the_message_that_shows_it() -> None:
    feed = CoinbaseLevel2()
    assert decode(feed, SNAPSHOT, RECEIVED) == []
    snapshot, delta = decode(feed, UPDATE, RECEIVED + 5)
    assert snapshot.event_time_estimated
    assert snapshot.event_time_ns == T0 - 5
    assert (snapshot.price_decimals, snapshot.size_decimals) == (8, 8)
    assert list(snapshot.snapshot.bid_ticks) == [10_050_000_000, 10_000_000_000]
    assert list(snapshot.snapshot.bid_lots) == [125_000_000, 200_000_000]
    assert list(snapshot.snapshot.ask_lots) == [1]
    assert (delta.event_time_ns, delta.event_time_estimated) == (T0, False)


def test_updates_count_on_from_the_snapshot() -> None:
    feed = begun()
    (first,), (second,) = decode(feed, UPDATE), decode(feed, UPDATE)
    assert (first.delta.first_update_id, first.delta.last_update_id, second.delta.last_update_id) == (2, 2, 3)
    assert list(zip(first.delta.bid_ticks, first.delta.bid_lots, strict=True)) == [
        (10_050_000_000, 0),
        (10_060_000_000, 700_000_000),
    ]
    assert list(first.delta.ask_ticks) == [10_075_000_000]


def test_a_match_is_a_trade_of_the_side_that_took() -> None:
    (event,) = decode(CoinbaseLevel2(), MATCH)
    assert (event.trade.trade_id, event.trade.price_ticks, event.trade.lots) == (280232, 1_305, 98_500_000_000)
    assert event.trade.taker_side == pb.TAKER_SIDE_BUY, "the seller was the maker"
    assert event.event_time_ns == T0


def test_trades_that_were_never_received_are_counted() -> None:
    feed = CoinbaseLevel2()
    for trade_id in (5, 6, 9, 8, 9, 10):
        decode(feed, {**MATCH, "trade_id": trade_id})
    assert feed.missed_trades == 2


def test_an_update_without_a_snapshot_is_no_event() -> None:
    assert decode(CoinbaseLevel2(), UPDATE) == []


def test_a_lost_connection_makes_its_books_unknown_until_their_next_snapshots() -> None:
    feed = begun()
    (reset,) = feed.disconnected([INSTRUMENT, "ETH-USD.COINBASE"], RECEIVED)
    assert (reset.reset.reason, reset.event_time_ns) == ("reconnect", T0)
    assert feed.disconnected([INSTRUMENT], RECEIVED) == []
    assert decode(feed, UPDATE) == []
    assert kinds(decode(feed, SNAPSHOT)) == ["snapshot"]
    assert kinds(decode(feed, UPDATE)) == ["delta"]


def test_a_reset_does_not_wait_for_the_lag_and_voids_the_snapshot_that_does() -> None:
    feed = CoinbaseLevel2()
    decode(feed, SNAPSHOT)
    (reset,) = feed.disconnected([INSTRUMENT], RECEIVED + 1)
    assert reset.event_time_ns == RECEIVED + 1
    assert decode(feed, HEARTBEAT) == []


@pytest.mark.parametrize(
    "message",
    [
        {"type": "subscriptions", "channels": []},
        {"type": "ticker", "sequence": 7, "product_id": PRODUCT},
        {**MATCH, "type": "last_match"},
    ],
)
def test_what_is_not_new_is_no_event(message: dict[str, Any]) -> None:
    assert decode(begun(), message) == []


def without(message: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != name}


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ([], "message"),
        ({}, "type"),
        ({"type": "error", "message": "rate limit"}, "type"),
        ({"type": ["match"]}, "type"),
        ({"type": "open"}, "type"),
        (without(SNAPSHOT, "bids"), "bids"),
        (without(SNAPSHOT, "product_id"), "product_id"),
        ({**SNAPSHOT, "product_id": 7}, "product_id"),
        ({**SNAPSHOT, "asks": [["1", "2", "3"]]}, "asks"),
        ({**SNAPSHOT, "asks": [["0", "2"]]}, "asks"),
        ({**SNAPSHOT, "time": "0001-01-01T00:00:00Z"}, "time"),
        (without(UPDATE, "changes"), "changes"),
        ({**UPDATE, "changes": [["hold", "1", "1"]]}, "changes"),
        ({**UPDATE, "changes": [["buy", "1.123456789", "1"]]}, "changes"),
        ({**UPDATE, "changes": [["buy", 1.5, "1"]]}, "changes"),
        ({**UPDATE, "changes": "buy"}, "changes"),
        ({**UPDATE, "time": "now"}, "time"),
        (without(MATCH, "side"), "side"),
        ({**MATCH, "side": []}, "side"),
        ({**MATCH, "size": "0.0"}, "size"),
        ({**MATCH, "trade_id": 0}, "trade_id"),
        ({**MATCH, "sequence": "1"}, "sequence"),
        ({"type": "ticker"}, "sequence"),
    ],
)
def test_a_broken_message_names_the_field_and_changes_nothing(message: Any, name: str) -> None:
    feed = begun()
    with pytest.raises(FeedError) as caught:
        decode(feed, message)
    assert caught.value.field == name
    assert caught.value.rule in str(caught.value)
    assert decode(feed, UPDATE)[0].delta.last_update_id == 2
    assert feed.missed_trades == 0


# The full channel


def full(kind: str, sequence: int, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "product_id": PRODUCT, "sequence": sequence, "time": TIME, **fields}


def opened(sequence: int, order_id: str, side: str, price: str, size: str) -> dict[str, Any]:
    return full("open", sequence, order_id=order_id, side=side, price=price, remaining_size=size)


def level3(sequence: int, bids: list[list[str]], asks: list[list[str]]) -> bytes:
    return orjson.dumps({"sequence": sequence, "bids": bids, "asks": asks})


def full_begun(sequence: int = 10) -> CoinbaseFull:
    feed = CoinbaseFull()
    decode(feed, HEARTBEAT)
    book = level3(sequence, [["100", "1", "a"], ["100", "2", "b"]], [["101", "4", "c"]])
    (event,) = feed.snapshot(PRODUCT, book, RECEIVED)
    assert list(event.snapshot.bid_lots) == [300_000_000], "two orders of one price are one level"
    assert event.snapshot.last_update_id == sequence
    return feed


def only_change(events: list[pb.MarketEvent]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    (event,) = [event for event in events if event.WhichOneof("event") == "delta"]
    delta = event.delta
    return (
        [(t // 10**8, lots // 10**8) for t, lots in zip(delta.bid_ticks, delta.bid_lots, strict=True)],
        [(t // 10**8, lots // 10**8) for t, lots in zip(delta.ask_ticks, delta.ask_lots, strict=True)],
    )


def test_orders_are_folded_to_the_total_of_their_level() -> None:
    feed = full_begun()
    assert only_change(decode(feed, opened(11, "d", "buy", "100", "5"))) == ([(100, 8)], [])
    assert only_change(decode(feed, full("done", 12, order_id="a", reason="canceled"))) == ([(100, 7)], [])
    change = full("change", 13, order_id="d", old_size="5", new_size="4", side="buy", price="100")
    assert only_change(decode(feed, change)) == ([(100, 6)], [])
    moved = full("change", 14, order_id="d", old_size="4", new_size="3", old_price="100", new_price="99", side="buy")
    assert only_change(decode(feed, moved)) == ([(100, 2), (99, 3)], [])
    events = decode(feed, {**MATCH, "sequence": 15, "maker_order_id": "c", "size": "4", "price": "101"})
    assert kinds(events) == ["delta", "trade"]
    assert only_change(events) == ([], [(101, 0)])


def test_messages_that_change_no_level_are_covered_by_the_next_delta() -> None:
    feed = full_begun()
    for message in (
        full("received", 11, order_id="x", order_type="market"),
        full("done", 12, order_id="x", reason="filled"),
        full("change", 13, order_id="y", new_funds="3"),
        {"type": "activate", "product_id": PRODUCT, "order_id": "z"},
    ):
        assert decode(feed, message) == []
    (event,) = decode(feed, opened(14, "d", "sell", "102", "1"))
    assert (event.delta.first_update_id, event.delta.last_update_id) == (11, 14)


def test_a_hole_in_the_sequence_makes_the_book_unknown_until_a_snapshot_that_joins() -> None:
    feed = full_begun()
    engine = FeatureEngine(INSTRUMENT)
    (reset,) = decode(feed, opened(12, "d", "buy", "100", "5"))
    assert (reset.reset.reason, feed.gaps) == ("gap", 1)
    assert decode(feed, opened(13, "e", "sell", "105", "5")) == []
    assert feed.snapshot(PRODUCT, level3(10, [], []), RECEIVED) == [], "12 does not follow on 10"
    for event in feed.snapshot(PRODUCT, level3(12, [["100", "5", "d"]], [["101", "4", "c"]]), RECEIVED):
        engine.on_event(event)
    assert engine.state is BookState.VALID
    assert engine.book.last_update_id == 13
    assert engine.book.asks.sizes == {101 * 10**8: 4 * 10**8, 105 * 10**8: 5 * 10**8}


def test_old_messages_and_snapshots_are_dropped() -> None:
    feed = full_begun()
    assert decode(feed, opened(10, "d", "buy", "100", "5")) == []
    assert feed.snapshot(PRODUCT, level3(9, [], []), RECEIVED) == []
    assert feed.stale == 2
    assert only_change(decode(feed, opened(11, "d", "buy", "100", "5"))) == ([(100, 8)], [])


def test_a_trade_is_told_once_and_at_once_even_while_the_book_is_unknown() -> None:
    feed = CoinbaseFull()
    assert kinds(decode(feed, {**MATCH, "sequence": 11})) == ["trade"]
    assert kinds(feed.snapshot(PRODUCT, level3(10, [["1", "1", "m"]], []), RECEIVED)) == ["snapshot", "delta"]


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (full("funny", 11, order_id="a"), "type"),
        (without(full("received", 11), "time"), "time"),
        (full("received", 0), "sequence"),
        (full("done", 11), "order_id"),
        (full("done", 11, order_id=""), "order_id"),
        (opened(11, "d", "both", "1", "1"), "side"),
        (opened(11, "d", "buy", "0", "1"), "price"),
        (opened(11, "d", "buy", "1", "-1"), "remaining_size"),
        (full("change", 11, order_id="a", new_size="x"), "new_size"),
        (full("change", 11, order_id="a", new_size="1", new_price="0"), "new_price"),
        (without({**MATCH, "sequence": 11}, "maker_order_id"), "maker_order_id"),
    ],
)
def test_a_broken_message_of_the_full_channel_names_the_field_and_changes_nothing(
    message: dict[str, Any], name: str
) -> None:
    feed = full_begun()
    with pytest.raises(FeedError) as caught:
        decode(feed, message)
    assert caught.value.field == name
    assert only_change(decode(feed, opened(11, "d", "buy", "100", "5"))) == ([(100, 8)], [])


@pytest.mark.parametrize("book", [b"[]", b"{}", b'{"sequence":1,"bids":[["1","1"]],"asks":[]}', b'{"sequence":-1}'])
def test_a_broken_level_3_snapshot_changes_nothing(book: bytes) -> None:
    feed = full_begun()
    with pytest.raises(FeedError):
        feed.snapshot(PRODUCT, book, RECEIVED)
    assert only_change(decode(feed, opened(11, "d", "buy", "100", "5"))) == ([(100, 8)], [])


def test_a_level_that_does_not_fit_makes_the_book_unknown() -> None:
    feed = full_begun()
    assert kinds(decode(feed, opened(11, "d", "buy", "100", "9999999990"))) == ["delta"]
    (reset,) = decode(feed, opened(12, "e", "buy", "100", "9999999990"))
    assert reset.reset.reason == "overflow"
    rows = [["100", "9999999990", "d"], ["100", "9999999990", "e"]]
    with pytest.raises(FeedError):
        feed.snapshot(PRODUCT, level3(12, rows, []), RECEIVED)
    assert kinds(feed.snapshot(PRODUCT, level3(12, rows[:1], []), RECEIVED)) == ["snapshot"]


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(), st.lists))
def test_any_value_in_any_field_gives_events_or_the_typed_error(value: Any) -> None:
    templates: list[dict[str, Any]] = [SNAPSHOT, UPDATE, MATCH, HEARTBEAT]
    orders = [opened(11, "d", "buy", "1", "1"), full("done", 11, order_id="a"), {**MATCH, "sequence": 11}]
    orders.append(full("change", 11, order_id="a", new_size="1", new_price="2"))
    messages: list[tuple[CoinbaseLevel2 | CoinbaseFull, dict[str, Any]]] = [
        (begun(), {**template, name: value}) for template in templates for name in template
    ]
    messages += [(full_begun(), {**template, name: value}) for template in orders for name in template]
    messages.append((begun(), {**UPDATE, "changes": [["buy", "1", value]]}))
    for feed, message in messages:
        try:
            encoded = orjson.dumps(message)
        except TypeError:  # text that is no Unicode
            return
        try:
            events = feed.decode(encoded, RECEIVED)
        except FeedError:
            continue
        assert all(event.event_time_ns > 0 and event.WhichOneof("event") for event in events)


@dataclass
class NaiveMarket:
    """All orders in one dictionary; levels are sums over it, made afresh every time."""

    sequence: int = 100
    orders: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    trades: int = 0

    def act(self, action: str, pick: int, side: str, ticks: int, lots: int) -> dict[str, Any]:
        """Does something to the market; returns the message that tells of it. Bids stay below 50, asks above."""
        self.sequence += 1
        price = ticks if side == "buy" else ticks + 50
        ids = sorted(self.orders)
        if action == "open" or not ids:
            name = f"o{self.sequence}"
            self.orders[name] = (side, price, lots)
            return opened(self.sequence, name, side, str(price), str(lots))
        name = ids[pick % len(ids)]
        own_side, own_price, own_lots = self.orders[name]
        if action == "received":
            return full("received", self.sequence, order_id="r", order_type="limit")
        if action == "done":
            del self.orders[name]
            return full("done", self.sequence, order_id=name, reason="canceled", remaining_size=str(own_lots))
        if action == "match":
            taken = min(lots, own_lots)
            self.orders[name] = (own_side, own_price, own_lots - taken)
            if taken == own_lots:
                del self.orders[name]
            self.trades += 1
            more = {"trade_id": self.trades, "maker_order_id": name, "size": str(taken), "price": str(own_price)}
            return full("match", self.sequence, side=own_side, **more)
        new_price = ticks if own_side == "buy" else ticks + 50
        if action == "resize":
            self.orders[name] = (own_side, own_price, lots)
            return full("change", self.sequence, order_id=name, side=own_side, new_size=str(lots))
        self.orders[name] = (own_side, new_price, lots)
        return full("change", self.sequence, order_id=name, side=own_side, new_size=str(lots), new_price=str(new_price))

    def level3(self) -> bytes:
        rows: dict[str, list[list[str]]] = {"buy": [], "sell": []}
        for name, (side, price, lots) in self.orders.items():
            rows[side].append([str(price), str(lots), name])
        return level3(self.sequence, rows["buy"], rows["sell"])

    def levels(self, side: str) -> dict[int, int]:
        totals: dict[int, int] = defaultdict(int)
        for own_side, price, lots in self.orders.values():
            if own_side == side:
                totals[price * 10**8] += lots * 10**8
        return dict(totals)


ACTIONS = st.tuples(
    st.sampled_from(["open", "open", "open", "received", "done", "match", "resize", "move"]),
    st.integers(0, 100),
    st.sampled_from(["buy", "sell"]),
    st.integers(1, 12),
    st.integers(1, 4),
)


@given(st.lists(ACTIONS, max_size=20), st.lists(ACTIONS, max_size=6), st.lists(ACTIONS, max_size=40), st.data())
def test_folded_orders_equal_a_naive_book_at_every_message(
    before: list[Any], between: list[Any], after: list[Any], data: st.DataObject
) -> None:
    market, feed, engine = NaiveMarket(), CoinbaseFull(), FeatureEngine(INSTRUMENT)
    decode(feed, HEARTBEAT)

    def send(message: dict[str, Any]) -> None:
        for event in decode(feed, message):
            engine.on_event(event)

    def recover(missed: list[Any]) -> None:
        """A snapshot is asked for, and messages come in before it does."""
        snapshot = market.level3()
        for action in missed:
            send(market.act(*action))
        for event in feed.snapshot(PRODUCT, snapshot, RECEIVED):
            engine.on_event(event)

    def check() -> None:
        assert engine.book.valid
        assert engine.book.bids.sizes == market.levels("buy")
        assert engine.book.asks.sizes == market.levels("sell")

    for action in before:
        send(market.act(*action))
    recover(between)
    check()
    lost = data.draw(st.integers(0, max(0, len(after) - 1)))
    for index, action in enumerate(after):
        message = market.act(*action)
        if index == lost:
            continue
        send(message)
        send(message)  # a duplicate changes nothing
        if index == lost + 1:
            assert engine.state is BookState.UNKNOWN
            recover(between)
        check()
    assert feed.gaps == (1 if lost + 1 < len(after) else 0)
    assert engine.book.gaps == 0, "every hole was told as a reset"


# The recorded session


@recorded
def test_the_recorded_books_never_cross_and_miss_nothing() -> None:
    feed = CoinbaseLevel2()
    engines: dict[str, FeatureEngine] = {}
    counts: dict[str | None, int] = defaultdict(int)
    with gzip.open(RECORDING) as lines:
        for line in lines:
            if not line[:1].isdigit():
                continue
            time, _, message = line.partition(b": ")
            for event in feed.decode(message, int(Decimal(time.decode()) * 10**9)):
                counts[event.WhichOneof("event")] += 1
                engines.setdefault(event.instrument, FeatureEngine(event.instrument)).on_event(event)
    assert dict(counts) == {"snapshot": 10, "delta": 9_719, "trade": 97}
    assert feed.missed_trades == 0
    assert len(engines) == 10
    for engine in engines.values():
        assert engine.state is BookState.VALID
        assert (engine.book.crossings, engine.book.gaps, engine.stale, engine.future) == (0, 0, 0, 0)
