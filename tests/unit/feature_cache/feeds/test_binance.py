from __future__ import annotations

from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_cache.feeds.binance import BinanceSpot
from feature_cache.feeds.wire import FeedError
from pretrade.market.v1 import market_pb2 as pb

RECEIVED = 1_723_161_254_000_000_000
EVENT_MS = 1_723_161_255_270

TRADE = {
    "e": "trade",
    "E": EVENT_MS,
    "s": "BTCUSDT",
    "t": 3735683259,
    "p": "61837.63000000",
    "q": "0.02000000",
    "T": EVENT_MS - 1,
    "m": True,
    "M": True,
}
DEPTH = {
    "e": "depthUpdate",
    "E": EVENT_MS,
    "s": "BTCUSDT",
    "U": 101,
    "u": 105,
    "b": [["61837.63000000", "1.50000000"], ["61000.00000000", "0.00000000"]],
    "a": [["61837.64000000", "0.00000001"]],
}
TICKER = {
    "u": 107,
    "s": "BTCUSDT",
    "b": "61837.63000000",
    "B": "3.78826000",
    "a": "61837.64000000",
    "A": "1.54698000",
}
SNAPSHOT = {"lastUpdateId": 104, "bids": [["2.00000000", "1.00000000"]], "asks": []}


def decode(message: dict[str, Any], feed: BinanceSpot | None = None, receive_time_ns: int = RECEIVED) -> pb.MarketEvent:
    feed = feed or BinanceSpot("BTCUSDT.BINANCE")
    event = feed.decode(orjson.dumps(message), receive_time_ns)
    assert event is not None
    return event


def test_a_trade_keeps_its_price_size_side_and_event_time() -> None:
    event = decode(TRADE)
    assert event.instrument == "BTCUSDT.BINANCE"
    assert (event.event_time_ns, event.receive_time_ns) == (EVENT_MS * 1_000_000, RECEIVED)
    assert (event.trade.price_ticks, event.trade.lots) == (6_183_763_000_000, 2_000_000)
    assert (event.price_decimals, event.size_decimals) == (8, 8)
    assert event.trade.taker_side == pb.TAKER_SIDE_SELL, "the buyer was the maker"
    assert not event.event_time_estimated
    assert decode({**TRADE, "m": False}).trade.taker_side == pb.TAKER_SIDE_BUY


def test_an_aggregate_trade_has_the_id_of_its_last_trade() -> None:
    message = {key: value for key, value in TRADE.items() if key != "t"} | {"e": "aggTrade", "a": 9, "f": 5, "l": 7}
    event = decode(message)
    assert (event.trade.trade_id, event.trade.lots) == (7, 2_000_000)


def test_a_depth_update_keeps_its_ids_and_removed_levels() -> None:
    delta = decode({"stream": "btcusdt@depth@100ms", "data": DEPTH}).delta
    assert (delta.first_update_id, delta.last_update_id, delta.previous_update_id) == (101, 105, 0)
    assert list(delta.bid_ticks) == [6_183_763_000_000, 6_100_000_000_000]
    assert list(delta.bid_lots) == [150_000_000, 0]
    assert (list(delta.ask_ticks), list(delta.ask_lots)) == ([6_183_764_000_000], [1])


def test_a_message_without_a_time_waits_for_the_lag_of_the_feed() -> None:
    feed = BinanceSpot("BTCUSDT.BINANCE")
    assert feed.decode(orjson.dumps(TICKER), RECEIVED) is None
    assert feed.decode(orjson.dumps(SNAPSHOT), RECEIVED) is None
    decode(TRADE, feed)
    lag = RECEIVED - EVENT_MS * 1_000_000
    for message, later in ((TICKER, 5_000_000), (SNAPSHOT, 9_000_000)):
        event = decode(message, feed, RECEIVED + later)
        assert event.event_time_estimated
        assert event.event_time_ns == RECEIVED + later - lag


def test_estimated_times_follow_the_fastest_recent_message() -> None:
    feed = BinanceSpot("BTCUSDT.BINANCE")
    decode(TRADE, feed, RECEIVED)
    decode({**TRADE, "t": 2}, feed, RECEIVED + 40_000_000)  # 40 ms slower: no better idea of the clocks
    assert decode(TICKER, feed, RECEIVED).event_time_ns == EVENT_MS * 1_000_000
    decode({**TRADE, "t": 3}, feed, RECEIVED - 3_000_000)
    assert decode({**TICKER, "u": 108}, feed, RECEIVED).event_time_ns == EVENT_MS * 1_000_000 + 3_000_000


def test_a_jump_of_the_local_clock_is_forgotten_within_two_minutes() -> None:
    feed = BinanceSpot("BTCUSDT.BINANCE")
    decode(TRADE, feed, RECEIVED)
    jump, minutes = 3_600_000_000_000, 180_000
    decode({**TRADE, "E": EVENT_MS + minutes, "t": 2}, feed, RECEIVED + jump + minutes * 1_000_000)
    ticker = decode(TICKER, feed, RECEIVED + jump + minutes * 1_000_000)
    assert ticker.event_time_ns == (EVENT_MS + minutes) * 1_000_000


@given(st.decimals(min_value=0, max_value=Decimal("9999999999.99999999"), places=8))
def test_decimal_strings_become_integers_exactly(price: Decimal) -> None:
    text = format(price, "f")
    event = decode({**TICKER, "b": text}, _timed())
    assert event.quote.bid_ticks == int(price * 10**8)


@given(st.integers(0, 10**10 - 1), st.integers(0, 8))
def test_fewer_decimals_mean_the_same_number(value: int, places: int) -> None:
    text = format(Decimal(value).scaleb(-places), "f")
    assert decode({**TICKER, "b": text}, _timed()).quote.bid_ticks == value * 10 ** (8 - places)


def _timed() -> BinanceSpot:
    feed = BinanceSpot("BTCUSDT.BINANCE")
    decode(TRADE, feed)
    return feed


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({**TRADE, "p": "-1.0"}, "p"),
        ({**TRADE, "p": "1e5"}, "p"),
        ({**TRADE, "p": "1_000.0"}, "p"),
        ({**TRADE, "p": " 1.0"}, "p"),
        ({**TRADE, "p": "١.0"}, "p"),
        ({**TRADE, "p": "."}, "p"),
        ({**TRADE, "p": "NaN"}, "p"),
        ({**TRADE, "p": "1.2.3"}, "p"),
        ({**TRADE, "p": 61837.63}, "p"),
        ({**TRADE, "q": "0.000000001"}, "q"),
        ({**TRADE, "q": "1" * 12}, "q"),
        ({**TRADE, "m": "true"}, "m"),
        ({**TRADE, "t": True}, "t"),
        ({**TRADE, "t": -1}, "t"),
        ({**TRADE, "E": "1723161255270"}, "E"),
        ({**TRADE, "E": EVENT_MS * 1_000_000}, "E"),
        ({**TRADE, "s": "ETHUSDT"}, "s"),
        ({**TRADE, "e": "kline"}, "e"),
        ({key: value for key, value in TRADE.items() if key != "q"}, "q"),
        ({**DEPTH, "u": 100}, "u"),
        ({**DEPTH, "b": [["1.0"]]}, "b"),
        ({**DEPTH, "b": [["1.0", "1.0", "1.0"]]}, "b"),
        ({**DEPTH, "b": [7]}, "b"),
        ({**DEPTH, "a": {"1.0": "1.0"}}, "a"),
        ({**SNAPSHOT, "asks": None}, "asks"),
        ({"data": []}, "data"),
        ({}, "s"),
    ],
)
def test_a_broken_message_names_the_field_and_changes_nothing(message: dict[str, Any], field: str) -> None:
    feed = _timed()
    with pytest.raises(FeedError) as caught:
        feed.decode(orjson.dumps(message), RECEIVED + 1)
    assert caught.value.field == field
    assert caught.value.rule in str(caught.value)
    assert decode(TICKER, feed).event_time_ns == EVENT_MS * 1_000_000


@pytest.mark.parametrize("message", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b'{"a": NaN}'])
def test_what_is_no_json_object_is_an_error(message: bytes) -> None:
    with pytest.raises(FeedError, match="message"):
        BinanceSpot("BTCUSDT.BINANCE").decode(message, RECEIVED)


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(), st.lists, max_leaves=4))
def test_any_value_in_any_field_gives_an_event_or_the_typed_error(value: Any) -> None:
    for template in (TRADE, DEPTH, TICKER, SNAPSHOT):
        for field in template:
            try:
                message = orjson.dumps({**template, field: value})
            except TypeError:  # text that is no Unicode
                return
            try:
                event = _timed().decode(message, RECEIVED)
            except FeedError:
                continue
            assert event is not None
            assert event.WhichOneof("event") is not None
