"""Kraken's messages, both protocols, and the recorded v1 session."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_cache.engine.engine import FeatureEngine
from feature_cache.feeds.kraken import KrakenV1, KrakenV2, instrument_of
from feature_cache.feeds.wire import FeedError
from feature_cache.store.codec import BookState
from pretrade.market.v1 import market_pb2 as pb

DATA = Path(__file__).parents[4] / ".." / "shared" / "data" / "kraken_v1"
recorded = pytest.mark.skipif(not DATA.is_dir(), reason="the recorded sessions are not there")

T0 = 1_618_678_140  # seconds
RECEIVED = T0 * 10**9 + 30_000_000
TIME = f"{T0}.000000"

# The v2 guide's own example of a book and its checksum.
GUIDE_ASKS = {
    "45285.2": "0.00100000",
    "45286.4": "1.54571953",
    "45286.6": "1.54571109",
    "45289.6": "1.54560911",
    "45290.2": "0.15890660",
    "45291.8": "1.54553491",
    "45294.7": "0.04454749",
    "45296.1": "0.35380000",
    "45297.5": "0.09945542",
    "45299.5": "0.18772827",
}
GUIDE_BIDS = {
    "45283.5": "0.10000000",
    "45283.4": "1.54582015",
    "45282.1": "0.10000000",
    "45281.0": "0.10000000",
    "45280.3": "1.54592586",
    "45279.0": "0.07990000",
    "45277.6": "0.03310103",
    "45277.5": "0.30000000",
    "45277.3": "1.54602737",
    "45276.6": "0.15445238",
}
GUIDE_CHECKSUM = 3310070434


def levels(book: dict[str, str]) -> list[list[str]]:
    return [[price, size, TIME] for price, size in book.items()]


def checksum(bids: dict[str, str], asks: dict[str, str]) -> int:
    """Word for word as the guides describe it, on the strings of the wire."""
    digits = ""
    for side, descending in ((asks, False), (bids, True)):
        for price in sorted(side, key=Decimal, reverse=descending)[:10]:
            digits += price.replace(".", "").lstrip("0") + side[price].replace(".", "").lstrip("0")
    return zlib.crc32(digits.encode())


def v1_snapshot(bids: dict[str, str], asks: dict[str, str], depth: int = 10) -> list[Any]:
    return [1, {"as": levels(asks), "bs": levels(bids)}, f"book-{depth}", "XBT/USD"]


def v1_update(crc: int, bids: Any = None, asks: Any = None, depth: int = 10) -> list[Any]:
    parts: list[dict[str, Any]] = []
    if asks:
        parts.append({"a": asks})
    if bids:
        parts.append({"b": bids})
    parts[-1]["c"] = str(crc)
    return [1, *parts, f"book-{depth}", "XBT/USD"]


def v1_trade(time: str = TIME, price: str = "45284.0", volume: str = "0.50000000", side: str = "s") -> list[Any]:
    return [1, [[price, volume, time, side, "l", ""]], "trade", "XBT/USD"]


def decode(feed: KrakenV1 | KrakenV2, message: Any, receive_time_ns: int = RECEIVED) -> list[pb.MarketEvent]:
    return feed.decode(orjson.dumps(message), receive_time_ns)


def begun() -> KrakenV1:
    """A v1 feed with the guide's book, whose lag is known."""
    feed = KrakenV1()
    assert decode(feed, v1_snapshot(GUIDE_BIDS, GUIDE_ASKS)) == []
    kinds = [event.WhichOneof("event") for event in decode(feed, v1_trade())]
    assert kinds == ["snapshot", "trade"]
    return feed


def test_the_example_of_the_guide_has_the_checksum_that_the_guide_says() -> None:
    feed = begun()
    (event,) = decode(feed, v1_update(GUIDE_CHECKSUM, bids=[["45276.5", "0.00000000", TIME]]))
    assert event.WhichOneof("event") == "delta"
    assert (feed.checksums, feed.checksum_failures) == (1, 0)


def test_a_v1_trade_keeps_price_size_side_and_time() -> None:
    (event,) = decode(KrakenV1(), v1_trade(f"{T0}.557535", side="b"))
    assert event.instrument == "XBT-USD.KRAKEN"
    assert (event.price_decimals, event.size_decimals) == (1, 8)
    assert (event.trade.price_ticks, event.trade.lots) == (452_840, 50_000_000)
    assert event.trade.taker_side == pb.TAKER_SIDE_BUY
    assert event.event_time_ns == T0 * 10**9 + 557_535_000
    assert not event.event_time_estimated


def test_trades_of_one_message_are_numbered_in_its_order() -> None:
    feed = KrakenV1()
    message = v1_trade()
    message[1] = [*message[1], ["45285.0", "1.00000000", TIME, "b", "m", ""]]
    assert [event.trade.trade_id for event in decode(feed, message)] == [1, 2]
    assert [event.trade.trade_id for event in decode(feed, v1_trade())] == [3]


def test_trades_from_before_the_subscription_are_no_events() -> None:
    feed = begun()
    message = v1_trade()
    message[1] = [["45285.0", "1.00000000", f"{T0 - age}.000000", "b", "m", ""] for age in (3_600, 11, 9, 0)]
    assert [event.event_time_ns // 10**9 for event in decode(feed, message)] == [T0 - 9, T0]
    assert [event.trade.trade_id for event in decode(feed, v1_trade())] == [6]


def test_a_snapshot_waits_for_the_lag_and_then_gets_an_estimated_time() -> None:
    feed = KrakenV1()
    assert decode(feed, v1_snapshot(GUIDE_BIDS, GUIDE_ASKS), RECEIVED) == []
    snapshot, trade = decode(feed, v1_trade(), RECEIVED + 10_000_000)
    assert snapshot.event_time_estimated
    assert snapshot.event_time_ns == T0 * 10**9 - 10_000_000
    assert trade.event_time_ns == T0 * 10**9


def test_an_update_has_the_time_of_its_newest_level_that_is_no_republication() -> None:
    feed = begun()
    bids = [
        ["45270.0", "1.00000000", f"{T0 + 1}.500000"],
        ["45271.0", "1.00000000", f"{T0 + 1}.250000"],
        ["45269.0", "1.00000000", f"{T0 - 900}.000000", "r"],
    ]
    (event,) = decode(feed, v1_update(GUIDE_CHECKSUM, bids=bids))
    assert event.event_time_ns == (T0 + 1) * 10**9 + 500_000_000
    (event,) = decode(feed, v1_update(GUIDE_CHECKSUM, bids=bids[2:]), RECEIVED + 7)
    assert event.event_time_estimated
    assert event.event_time_ns == (T0 + 1) * 10**9 + 500_000_000 + 7


def test_both_sides_of_an_update_come_in_two_objects() -> None:
    feed = begun()
    bids, asks = dict(GUIDE_BIDS), dict(GUIDE_ASKS)
    bids["45284.0"], asks["45285.0"] = "2.00000000", "3.00000000"
    message = v1_update(
        checksum(bids, asks),
        bids=[["45284.0", "2.00000000", TIME]],
        asks=[["45285.0", "3.00000000", TIME]],
    )
    assert len(message) == 5
    (event,) = decode(feed, message)
    assert event.delta.bid_ticks[0] == 452_840
    assert event.delta.ask_ticks[0] == 452_850


def test_a_level_that_falls_out_of_the_depth_is_removed_by_the_same_event() -> None:
    feed = begun()
    bids = {**GUIDE_BIDS, "45284.0": "2.00000000"}
    (event,) = decode(feed, v1_update(checksum(bids, GUIDE_ASKS), bids=[["45284.0", "2.00000000", TIME]]))
    assert list(zip(event.delta.bid_ticks, event.delta.bid_lots, strict=True)) == [
        (452_840, 200_000_000),
        (452_766, 0),
    ]


def test_a_failed_checksum_makes_the_book_unknown_until_a_fresh_snapshot() -> None:
    feed = begun()
    engine = FeatureEngine("XBT-USD.KRAKEN")
    good = v1_update(GUIDE_CHECKSUM, bids=[["45276.5", "0.00000000", TIME]])
    snapshot = v1_snapshot(GUIDE_BIDS, GUIDE_ASKS)
    states = []
    for message in (snapshot, good, v1_update(1, bids=[["45276.5", "0.00000000", TIME]]), good, good, snapshot, good):
        events = decode(feed, message)
        for event in events:
            engine.on_event(event)
        states.append(([event.WhichOneof("event") for event in events], engine.state))
    assert states == [
        (["snapshot"], BookState.VALID),
        (["delta"], BookState.VALID),
        (["reset"], BookState.UNKNOWN),
        ([], BookState.UNKNOWN),
        ([], BookState.UNKNOWN),
        (["snapshot"], BookState.VALID),
        (["delta"], BookState.VALID),
    ]
    assert (feed.checksums, feed.checksum_failures) == (3, 1)
    assert engine.book.gaps == 0


def test_a_lost_connection_resets_its_known_books_only() -> None:
    feed = begun()
    (event,) = feed.disconnected(["XBT-USD.KRAKEN", "ETH-USD.KRAKEN"], RECEIVED + 1)
    assert (event.instrument, event.reset.reason) == ("XBT-USD.KRAKEN", "reconnect")
    assert event.event_time_ns > 0
    assert feed.disconnected(["XBT-USD.KRAKEN"], RECEIVED + 2) == []


@pytest.mark.parametrize(
    "message",
    [{"event": "heartbeat"}, {"event": "systemStatus", "status": "online"}, {"event": "subscriptionStatus"}],
)
def test_what_says_nothing_about_the_market_is_no_event(message: dict[str, Any]) -> None:
    assert decode(KrakenV1(), message) == []


GOOD_LEVEL = ["45276.5", "0.00000000", TIME]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({}, "event"),
        (7, "message"),
        ([1, {}], "message"),
        ([1, {}, "book-10", None], "pair"),
        ([1, {}, 10, "XBT/USD"], "channelName"),
        ([1, {}, "spread", "XBT/USD"], "channelName"),
        ([1, {}, "book-0", "XBT/USD"], "channelName"),
        ([1, {}, "book-ten", "XBT/USD"], "channelName"),
        ([1, [], "book-10", "XBT/USD"], "book"),
        ([1, {"a": []}, "book-10", "ETH/USD"], "book"),
        ([1, {"a": [GOOD_LEVEL]}, "book-10", "XBT/USD"], "c"),
        ([1, {"a": [GOOD_LEVEL], "c": 12}, "book-10", "XBT/USD"], "c"),
        ([1, {"a": {}, "c": "1"}, "book-10", "XBT/USD"], "a"),
        ([1, {"a": [[1, 2]], "c": "1"}, "book-10", "XBT/USD"], "a"),
        ([1, {"a": [[*GOOD_LEVEL, "x"]], "c": "1"}, "book-10", "XBT/USD"], "a"),
        ([1, {"a": [["45276.55", "1.0", TIME]], "c": "1"}, "book-10", "XBT/USD"], "a"),
        ([1, {"b": [["-1.0", "1.0", TIME]], "c": "1"}, "book-10", "XBT/USD"], "b"),
        ([1, {"b": [["0.0", "1.0", TIME]], "c": "1"}, "book-10", "XBT/USD"], "b"),
        ([1, {"b": [["1.0", "NaN", TIME]], "c": "1"}, "book-10", "XBT/USD"], "b"),
        ([1, {"b": [["1.0", "1.0", "yesterday"]], "c": "1"}, "book-10", "XBT/USD"], "b"),
        ([1, {"b": [["1" * 18, "1.0", TIME]], "c": "1"}, "book-10", "XBT/USD"], "b"),
        ([1, {"bs": None, "as": []}, "book-10", "XBT/USD"], "bs"),
        ([1, {}, "trade", "XBT/USD"], "trade"),
        ([1, [[]], "trade", "XBT/USD"], "trade"),
        (v1_trade(side="x"), "trade.side"),
        (v1_trade(volume="0.0"), "trade.volume"),
        (v1_trade(price="1e3"), "trade.price"),
        (v1_trade(time="9999999999.0"), "trade.time"),
    ],
)
def test_a_broken_v1_message_names_the_field_and_changes_nothing(message: Any, field: str) -> None:
    feed = begun()
    with pytest.raises(FeedError) as caught:
        decode(feed, message)
    assert caught.value.field == field
    assert caught.value.rule in str(caught.value)
    (event,) = decode(feed, v1_update(GUIDE_CHECKSUM, bids=[GOOD_LEVEL]))
    assert (event.delta.first_update_id, event.delta.last_update_id) == (2, 2)


@pytest.mark.parametrize("message", [b"", b"{", b"nul", b"\xff\xfe", b'[1, NaN, "a", "b"]', b"[" * 100_000])
@pytest.mark.parametrize("feed", [KrakenV1, KrakenV2])
def test_what_is_no_json_is_an_error(message: bytes, feed: type[KrakenV1 | KrakenV2]) -> None:
    with pytest.raises(FeedError):
        feed().decode(message, RECEIVED)


# v2


def v2_instrument(price_precision: Any = 1, qty_precision: Any = 8) -> dict[str, Any]:
    pair = {"symbol": "BTC/USD", "price_precision": price_precision, "qty_precision": qty_precision}
    return {"channel": "instrument", "type": "snapshot", "data": {"assets": [], "pairs": [pair]}}


def v2_book(kind: str, bids: dict[str, str], asks: dict[str, str], crc: Any, **more: Any) -> bytes:
    """A message with numbers exactly as written, trailing zeros included."""

    def side(book: dict[str, str]) -> str:
        return "[" + ",".join(f'{{"price":{price},"qty":{size}}}' for price, size in book.items()) + "]"

    extra = "".join(f",{json.dumps(key)}:{json.dumps(value)}" for key, value in more.items())
    return (
        f'{{"channel":"book","type":"{kind}","data":[{{"symbol":"BTC/USD","bids":{side(bids)},"asks":{side(asks)},'
        f'"checksum":{json.dumps(crc)}{extra}}}]}}'
    ).encode()


NOW = "2021-04-17T16:49:00.557535Z"


def v2_begun() -> KrakenV2:
    feed = KrakenV2()
    decode(feed, v2_instrument())
    assert feed.decode(v2_book("snapshot", GUIDE_BIDS, GUIDE_ASKS, GUIDE_CHECKSUM), RECEIVED) == []
    events = feed.decode(v2_book("update", {"45276.5": "0"}, {}, GUIDE_CHECKSUM, timestamp=NOW), RECEIVED)
    assert [event.WhichOneof("event") for event in events] == ["snapshot", "delta"]
    return feed


def test_v2_checksums_hold_for_snapshots_and_updates() -> None:
    feed = v2_begun()
    assert (feed.checksums, feed.checksum_failures) == (2, 0)


def test_v2_numbers_need_no_trailing_zeros() -> None:
    def short(book: dict[str, str]) -> dict[str, str]:
        return {price: format(Decimal(size).normalize(), "f") for price, size in book.items()}

    feed = KrakenV2()
    decode(feed, v2_instrument())
    feed.decode(v2_book("snapshot", short(GUIDE_BIDS), short(GUIDE_ASKS), GUIDE_CHECKSUM), RECEIVED)
    assert (feed.checksums, feed.checksum_failures) == (1, 0)


def test_v2_numbers_are_read_without_rounding() -> None:
    feed = KrakenV2()
    decode(feed, v2_instrument(price_precision=8))
    book = {"1234567890.12345678": "9876543210.98765432"}
    (event,) = feed.decode(v2_book("snapshot", book, {}, checksum(book, {}), timestamp=NOW), RECEIVED)
    assert list(event.snapshot.bid_ticks) == [123_456_789_012_345_678], "a float would have lost the last digits"
    assert list(event.snapshot.bid_lots) == [987_654_321_098_765_432]


def test_a_v2_snapshot_whose_checksum_fails_is_a_reset() -> None:
    feed = KrakenV2()
    decode(feed, v2_instrument())
    (event,) = feed.decode(v2_book("snapshot", GUIDE_BIDS, GUIDE_ASKS, 1, timestamp=NOW), RECEIVED)
    assert event.reset.reason == "checksum"
    assert feed.decode(v2_book("update", {"45276.5": "0"}, {}, GUIDE_CHECKSUM, timestamp=NOW), RECEIVED) == []


def test_the_depth_comes_from_the_acknowledgement() -> None:
    feed = KrakenV2()
    decode(feed, v2_instrument())
    result = {"channel": "book", "depth": 25, "snapshot": True, "symbol": "BTC/USD"}
    assert decode(feed, {"method": "subscribe", "result": result, "success": True}) == []
    feed.decode(v2_book("snapshot", GUIDE_BIDS, GUIDE_ASKS, GUIDE_CHECKSUM, timestamp=NOW), RECEIVED)
    bids = {**GUIDE_BIDS, "45284.0": "2.00000000"}
    message = v2_book("update", {"45284.0": "2.00000000"}, {}, checksum(bids, GUIDE_ASKS), timestamp=NOW)
    (event,) = feed.decode(message, RECEIVED)
    assert list(event.delta.bid_ticks) == [452_840], "eleven levels fit in 25"


def test_new_decimals_reset_a_book() -> None:
    feed = v2_begun()
    assert decode(feed, v2_instrument()) == []
    (event,) = decode(feed, v2_instrument(price_precision=2))
    assert (event.reset.reason, event.price_decimals) == ("decimals", 2)


V2_TRADE = {
    "symbol": "BTC/USD",
    "side": "sell",
    "price": 45284.5,
    "qty": 40.0,
    "ord_type": "market",
    "trade_id": 4665906,
    "timestamp": NOW,
}


def v2_trade(kind: str = "update", **changes: Any) -> dict[str, Any]:
    return {"channel": "trade", "type": kind, "data": [{**V2_TRADE, **changes}]}


def test_a_v2_trade_keeps_its_id_price_size_side_and_time() -> None:
    (event,) = decode(v2_begun(), v2_trade())
    trade = event.trade
    assert event.instrument == "BTC-USD.KRAKEN"
    assert (trade.trade_id, trade.price_ticks, trade.lots) == (4665906, 452_845, 4_000_000_000)
    assert trade.taker_side == pb.TAKER_SIDE_SELL
    assert event.event_time_ns == T0 * 10**9 + 557_535_000


def test_past_trades_are_no_events() -> None:
    assert decode(v2_begun(), v2_trade("snapshot")) == []


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({}, "channel"),
        ([], "message"),
        ({"channel": "ohlc"}, "channel"),
        ({"channel": "book"}, "type"),
        ({"channel": "book", "type": "delta"}, "type"),
        ({"channel": "book", "type": "update"}, "data"),
        ({"channel": "book", "type": "update", "data": {}}, "data"),
        ({"channel": "book", "type": "update", "data": [{}]}, "symbol"),
        ({"channel": "book", "type": "update", "data": [{"symbol": "ETH/USD"}]}, "symbol"),
        ({"channel": "book", "type": "update", "data": [{"symbol": "BTC/USD"}]}, "checksum"),
        ({"channel": "book", "type": "update", "data": [{"symbol": "BTC/USD", "checksum": -1}]}, "checksum"),
        ({"channel": "book", "type": "update", "data": [{"symbol": "BTC/USD", "checksum": 1, "bids": 1}]}, "bids"),
        (
            {"channel": "book", "type": "update", "data": [{"symbol": "BTC/USD", "checksum": 1, "bids": [{}]}]},
            "price",
        ),
        (v2_trade(side="b!"), "side"),
        (v2_trade(price=1.23), "price"),
        (v2_trade(price="1.2"), "price"),
        (v2_trade(price=0), "price"),
        (v2_trade(price=-1), "price"),
        (v2_trade(qty=True), "qty"),
        (v2_trade(qty=1e30), "qty"),
        (v2_trade(trade_id="7"), "trade_id"),
        (v2_trade(timestamp="2021-13-17T16:49:00Z"), "timestamp"),
        (v2_trade(timestamp="2021-04-17 16:49:00"), "timestamp"),
        (v2_trade(timestamp="0001-01-01T00:00:00Z"), "timestamp"),
        (v2_instrument(price_precision=99), "price_precision"),
        (v2_instrument(qty_precision=None), "qty_precision"),
        ({"channel": "instrument", "data": []}, "data.pairs"),
        ({"method": "subscribe", "result": {"channel": "book", "depth": 0, "symbol": "A"}}, "result.depth"),
    ],
)
def test_a_broken_v2_message_names_the_field_and_changes_nothing(message: Any, field: str) -> None:
    feed = v2_begun()
    with pytest.raises(FeedError) as caught:
        decode(feed, message)
    assert caught.value.field == field
    message = v2_book("update", {"45276.5": "0"}, {}, GUIDE_CHECKSUM, timestamp=NOW)
    (event,) = feed.decode(message, RECEIVED)
    assert event.delta.last_update_id == 3


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(), st.lists))
def test_any_value_in_any_place_gives_events_or_the_typed_error(value: Any) -> None:
    feed = v2_begun()
    templates: list[tuple[KrakenV1 | KrakenV2, Any]] = [(feed, v2_trade(**{key: value})) for key in V2_TRADE]
    templates += [(begun(), [*v1_trade()[:place], value, *v1_trade()[place + 1 :]]) for place in range(4)]
    templates.append((begun(), v1_update(1, bids=[["45276.5", value, TIME]])))
    for target, message in templates:
        try:
            encoded = orjson.dumps(message)
        except TypeError:  # text that is no Unicode
            return
        try:
            events = target.decode(encoded, RECEIVED)
        except FeedError:
            continue
        assert all(event.event_time_ns > 0 for event in events)


_PRICES = st.integers(1, 40).map(lambda ticks: f"{ticks / 10:.1f}")
_SIZES = st.integers(0, 3).map(lambda lots: f"{lots}.00000000")
_CHANGE = st.tuples(st.booleans(), _PRICES, _SIZES)


@given(st.lists(st.lists(_CHANGE, min_size=1, max_size=5), max_size=30), st.integers(1, 12))
def test_books_downstream_stay_equal_to_a_naive_one_cut_to_the_depth(
    messages: list[list[tuple[bool, str, str]]], depth: int
) -> None:
    naive: dict[bool, dict[str, str]] = {True: {"0.1": "1.00000000"}, False: {"9.0": "1.00000000"}}
    feed, engine = KrakenV1(), FeatureEngine("XBT-USD.KRAKEN")
    decode(feed, v1_snapshot(naive[True], naive[False], depth))
    for event in decode(feed, v1_trade()):
        if event.WhichOneof("event") == "snapshot":
            engine.on_event(event)
    for changes in messages:
        for is_bid, price, size in changes:
            # Asks are kept above the bids, so that the book never crosses.
            shown = price if is_bid else f"{float(price) + 5:.1f}"
            naive[is_bid].pop(shown, None)
            if Decimal(size):
                naive[is_bid][shown] = size
        for is_bid in naive:
            best = sorted(naive[is_bid], key=Decimal, reverse=is_bid)[:depth]
            naive[is_bid] = {price: naive[is_bid][price] for price in best}
        message = v1_update(
            checksum(naive[True], naive[False]),
            bids=[[price, size, TIME] for is_bid, price, size in changes if is_bid],
            asks=[[f"{float(price) + 5:.1f}", size, TIME] for is_bid, price, size in changes if not is_bid],
            depth=depth,
        )
        for event in decode(feed, message):
            engine.on_event(event)
        for is_bid, side in ((True, engine.book.bids), (False, engine.book.asks)):
            expected = {int(Decimal(price) * 10): int(Decimal(size) * 10**8) for price, size in naive[is_bid].items()}
            assert side.sizes == expected
    assert feed.checksum_failures == 0
    assert feed.checksums == len(messages)


def _recorded() -> Iterator[tuple[int, bytes]]:
    """Receive time and message of the book connection."""
    with gzip.open(DATA / "KRAKEN.ws.50.0.gz") as lines:
        for line in lines:
            if line[:1].isdigit():
                time, _, message = line.partition(b": ")
                yield int(Decimal(time.decode()) * 10**9), message


@recorded
def test_every_recorded_checksum_matches() -> None:
    feed = KrakenV1()
    engines: dict[str, FeatureEngine] = {}
    for receive_time_ns, message in _recorded():
        for event in feed.decode(message, receive_time_ns):
            engine = engines.setdefault(event.instrument, FeatureEngine(event.instrument))
            engine.on_event(event)
    assert (feed.checksums, feed.checksum_failures) == (4_269, 0)
    assert len(engines) == 10
    assert {engine.state for engine in engines.values()} == {BookState.VALID}
    assert sum(engine.book.gaps + engine.book.crossings for engine in engines.values()) == 0
    assert all(len(engine.book.bids) <= 1_000 for engine in engines.values())


@recorded
def test_a_lost_message_is_caught_by_a_checksum_and_the_book_stays_unknown() -> None:
    feed = KrakenV1()
    name = "XMR/USD"
    engine = FeatureEngine(instrument_of(name))
    updates = 0
    for receive_time_ns, message in _recorded():
        if not message.rstrip().endswith(f'"{name}"]'.encode()):
            continue
        updates += b'"c"' in message
        if updates == 20 and b'"c"' in message:
            continue
        for event in feed.decode(message, receive_time_ns):
            engine.on_event(event)
    assert feed.checksum_failures == 1
    assert (engine.resets, engine.state) == (1, BookState.UNKNOWN)
