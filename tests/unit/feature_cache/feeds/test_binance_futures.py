"""USD-M and COIN-M futures: the documented messages, and a book chained by `pu`."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_cache.engine.book import OrderBook
from feature_cache.engine.engine import FeatureEngine
from feature_cache.feeds.binance_futures import BinanceFutures
from feature_cache.feeds.wire import FeedError
from pretrade.market.v1 import market_pb2 as pb

EVENT_MS = 1_571_889_248_277
RECEIVED = EVENT_MS * 1_000_000 + 4_000_000

# The shapes of the documentation, with prices of today.
DEPTH = {
    "e": "depthUpdate",
    "E": EVENT_MS,
    "T": EVENT_MS - 1,
    "s": "BTCUSDT",
    "U": 157,
    "u": 160,
    "pu": 149,
    "b": [["61837.60", "1.500"], ["61837.50", "0.000"]],
    "a": [["61837.70", "0.001"]],
}
TICKER = {
    "e": "bookTicker",
    "u": 400900217,
    "E": EVENT_MS,
    "T": EVENT_MS - 6,
    "s": "BTCUSDT",
    "b": "61837.60",
    "B": "31.210",
    "a": "61837.70",
    "A": "40.660",
}
TRADE = {
    "e": "aggTrade",
    "E": EVENT_MS,
    "s": "BTCUSDT",
    "a": 5933014,
    "p": "61837.60",
    "q": "0.100",
    "f": 100,
    "l": 105,
    "T": EVENT_MS - 15,
    "m": True,
}
SINGLE_TRADE = {
    "e": "trade",
    "E": EVENT_MS,
    "T": EVENT_MS - 4,
    "s": "BTCUSDT",
    "t": 105,
    "p": "61837.60",
    "q": "0.014",
    "X": "MARKET",
    "m": True,
}
SNAPSHOT = {
    "lastUpdateId": 155,
    "E": EVENT_MS,
    "T": EVENT_MS - 14,
    "bids": [["61837.50", "431.000"]],
    "asks": [["61837.70", "12.000"]],
}
COIN_M_DEPTH = {
    "e": "depthUpdate",
    "E": EVENT_MS,
    "T": EVENT_MS - 1,
    "s": "BTCUSD_PERP",
    "ps": "BTCUSD",
    "U": 17285681,
    "u": 17285702,
    "pu": 17285675,
    "b": [["61517.6", "10"]],
    "a": [["61517.7", "7"]],
}
COIN_M_TRADE = {**TRADE, "s": "BTCUSD_PERP", "p": "61517.6", "q": "17"}
COIN_M_SNAPSHOT = {**SNAPSHOT, "symbol": "BTCUSD_PERP", "pair": "BTCUSD"}


def decode(message: dict[str, Any], instrument: str = "BTCUSDT.BINANCE-USDM") -> pb.MarketEvent:
    event = BinanceFutures(instrument).decode(orjson.dumps(message), RECEIVED)
    assert event is not None
    return event


def test_every_message_has_the_exchanges_own_time() -> None:
    for message in (DEPTH, TICKER, TRADE, SNAPSHOT):
        event = decode(message)
        assert event.event_time_ns == EVENT_MS * 1_000_000
        assert not event.event_time_estimated
        assert event.receive_time_ns == RECEIVED


def test_a_depth_update_keeps_the_id_of_the_one_before() -> None:
    delta = decode({"stream": "btcusdt@depth@100ms", "data": DEPTH}).delta
    assert (delta.first_update_id, delta.last_update_id, delta.previous_update_id) == (157, 160, 149)
    assert (list(delta.bid_ticks), list(delta.bid_lots)) == ([6_183_760_000_000, 6_183_750_000_000], [150_000_000, 0])


def test_an_aggregate_trade_has_the_id_of_its_last_trade() -> None:
    trade = decode(TRADE).trade
    assert (trade.trade_id, trade.price_ticks, trade.lots) == (105, 6_183_760_000_000, 10_000_000)
    assert trade.taker_side == pb.TAKER_SIDE_SELL


def test_a_single_trade_has_its_own_id_and_one_of_the_insurance_fund_is_no_event() -> None:
    trade = decode(SINGLE_TRADE).trade
    assert (trade.trade_id, trade.lots, trade.taker_side) == (105, 1_400_000, pb.TAKER_SIDE_SELL)
    feed = BinanceFutures("BTCUSDT.BINANCE-USDM")
    assert feed.decode(orjson.dumps({**SINGLE_TRADE, "X": "INSURANCE_FUND", "p": "70000.00"}), RECEIVED) is None


def test_the_best_bid_and_ask_are_a_quote() -> None:
    quote = decode(TICKER).quote
    assert (quote.update_id, quote.bid_lots, quote.ask_lots) == (400900217, 3_121_000_000, 4_066_000_000)


def test_coin_margined_messages_have_the_same_shape_with_contracts_as_sizes() -> None:
    instrument = "BTCUSD_PERP.BINANCE-COINM"
    assert list(decode(COIN_M_DEPTH, instrument).delta.bid_lots) == [1_000_000_000]
    assert decode(COIN_M_TRADE, instrument).trade.lots == 1_700_000_000
    assert decode(COIN_M_SNAPSHOT, instrument).snapshot.last_update_id == 155
    with pytest.raises(FeedError, match="expected 'ETHUSD_PERP'"):
        decode(COIN_M_SNAPSHOT, "ETHUSD_PERP.BINANCE-COINM")


def test_the_book_is_chained_by_the_id_of_the_update_before_although_ids_have_holes() -> None:
    engine = FeatureEngine("BTCUSDT.BINANCE-USDM")
    feed = BinanceFutures("BTCUSDT.BINANCE-USDM")

    def take(**changes: Any) -> None:
        engine.on_event(decoded({**DEPTH, **changes}))

    def decoded(message: dict[str, Any]) -> pb.MarketEvent:
        event = feed.decode(orjson.dumps(message), RECEIVED)
        assert event is not None
        return event

    take(U=140, u=149, pu=131)  # before the snapshot: dropped
    take()  # 157 to 160 after 149: the one with which the snapshot at 155 goes on
    engine.on_event(decoded(SNAPSHOT))
    assert engine.book.valid
    assert engine.book.bids.best() == (6_183_760_000_000, 150_000_000)
    take(U=170, u=175, pu=160)
    assert (engine.book.valid, engine.book.last_update_id) == (True, 175)
    take(U=180, u=182, pu=178)
    assert (engine.book.valid, engine.book.gaps) == (False, 1)


def test_a_snapshot_older_than_the_buffered_updates_is_refused() -> None:
    book = OrderBook()
    book.apply_delta(decode({**DEPTH, "U": 170, "u": 175, "pu": 160}).delta)
    assert not book.apply_snapshot(decode(SNAPSHOT).snapshot)
    assert not book.valid
    assert book.apply_snapshot(decode({**SNAPSHOT, "lastUpdateId": 172}).snapshot)
    assert (book.valid, book.last_update_id) == (True, 175)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({**DEPTH, "s": "ETHUSDT"}, "s"),
        ({**DEPTH, "pu": 160}, "pu"),
        ({**DEPTH, "u": 156}, "u"),
        ({key: value for key, value in DEPTH.items() if key != "pu"}, "pu"),
        ({key: value for key, value in SNAPSHOT.items() if key != "E"}, "E"),
        ({**TICKER, "b": 61837.6}, "b"),
        ({**TRADE, "m": 1}, "m"),
        ({**TRADE, "l": 0}, "l"),
        ({**TRADE, "e": "markPriceUpdate"}, "e"),
        ({"data": 7}, "data"),
        ({}, "s"),
    ],
)
def test_a_broken_message_names_the_field(message: dict[str, Any], field: str) -> None:
    with pytest.raises(FeedError) as caught:
        decode(message)
    assert caught.value.field == field


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(), st.lists, max_leaves=4))
def test_any_value_in_any_field_gives_an_event_or_the_typed_error(value: Any) -> None:
    for template in (DEPTH, TICKER, TRADE, SINGLE_TRADE, SNAPSHOT):
        for field in template:
            try:
                message = orjson.dumps({**template, field: value})
            except TypeError:  # text that is no Unicode
                return
            try:
                event = BinanceFutures("BTCUSDT.BINANCE-USDM").decode(message, RECEIVED)
            except FeedError:
                continue
            if event is None:
                assert (template, field) == (SINGLE_TRADE, "X")
            else:
                assert event.WhichOneof("event") is not None
