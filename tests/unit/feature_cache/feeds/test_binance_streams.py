"""Many symbols of one Binance market over one connection."""

from __future__ import annotations

import orjson
import pytest

from feature_cache.feeds.binance_streams import COIN_M, SPOT, USD_M, BinanceStreams
from feature_cache.feeds.wire import FeedError

MS = 1_723_161_255_270
RECEIVED = MS * 1_000_000 + 5_000_000


def trade(symbol: str, number: int = 7) -> bytes:
    data = {
        "e": "aggTrade",
        "E": MS,
        "s": symbol,
        "a": 1,
        "p": "2.5",
        "q": "1",
        "f": 5,
        "l": number,
        "T": MS,
        "m": True,
    }
    return orjson.dumps({"stream": f"{symbol.lower()}@aggTrade", "data": data})


def depth(symbol: str) -> bytes:
    data = {"e": "depthUpdate", "E": MS, "s": symbol, "U": 5, "u": 6, "pu": 4, "b": [["2.5", "1"]], "a": []}
    return orjson.dumps({"stream": f"{symbol.lower()}@depth@100ms", "data": data})


@pytest.mark.parametrize("venue", [SPOT, USD_M, COIN_M])
def test_each_symbol_is_an_instrument_of_the_venue(venue: str) -> None:
    streams = BinanceStreams(venue)
    events = [event for symbol in ("ONE", "TWO") for event in streams.decode(trade(symbol), RECEIVED)]
    assert [event.instrument for event in events] == [f"ONE.{venue}", f"TWO.{venue}"]


def test_a_lost_connection_resets_the_books_it_told_of_once() -> None:
    streams = BinanceStreams(SPOT)
    for message in (trade("ONE"), depth("TWO")):
        streams.decode(message, RECEIVED)
    names = ["ONE.BINANCE", "TWO.BINANCE", "THREE.BINANCE"]
    events = streams.disconnected(names, RECEIVED + 1_000_000)
    assert [(event.instrument, event.reset.reason) for event in events] == [("TWO.BINANCE", "reconnect")]
    assert events[0].event_time_ns == MS * 1_000_000 + 1_000_000
    assert streams.disconnected(names, RECEIVED + 2_000_000) == []


def test_a_snapshot_of_spot_waits_for_the_lag_and_is_of_the_symbol_that_was_asked_for() -> None:
    streams = BinanceStreams(SPOT)
    snapshot = orjson.dumps({"lastUpdateId": 6, "bids": [["2.5", "1"]], "asks": []})
    assert streams.snapshot("ONE", snapshot, RECEIVED) == []
    streams.decode(trade("ONE"), RECEIVED)
    (event,) = streams.snapshot("ONE", snapshot, RECEIVED)
    assert (event.instrument, event.snapshot.last_update_id) == ("ONE.BINANCE", 6)
    with pytest.raises(FeedError, match="lastUpdateId: is missing"):
        streams.snapshot("ONE", b'{"code":-1121,"msg":"Invalid symbol."}', RECEIVED)


def test_answers_to_requests_are_no_events_and_refusals_are_errors() -> None:
    streams = BinanceStreams(SPOT)
    assert streams.decode(b'{"result":null,"id":1}', RECEIVED) == []
    for refusal in (b'{"error":{"code":2,"msg":"Invalid request"},"id":1}', b'{"code":-1,"msg":"no"}'):
        with pytest.raises(FeedError, match="the exchange refuses"):
            streams.decode(refusal, RECEIVED)


@pytest.mark.parametrize("message", [b"{}", b'{"stream":"x","data":[]}', b'{"stream":"x","data":{"s":7}}', b"[]", b"x"])
def test_what_is_of_no_symbol_is_an_error(message: bytes) -> None:
    with pytest.raises(FeedError):
        BinanceStreams(SPOT).decode(message, RECEIVED)
