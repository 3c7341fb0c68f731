"""What is asked of each exchange, and where."""

from __future__ import annotations

import orjson
import pytest

from feature_cache.feeds import binance_streams
from feature_cache.sources.conversation import subscription
from feature_cache.sources.exchanges import Binance, Coinbase, Exchange, Kraken


def requests(exchange: Exchange) -> list[tuple[str, object]]:
    return [(stream.url, orjson.loads(request)) for stream in exchange.streams for request in stream.requests]


def test_binance_spot_asks_for_books_and_trades_on_one_connection() -> None:
    exchange = Binance(binance_streams.SPOT, ["btcusdt", "ETHUSDT.BINANCE"])
    ((url, body),) = requests(exchange)
    assert url == "wss://stream.binance.com:9443/stream"
    assert body == {
        "method": "SUBSCRIBE",
        "params": [f"{s}@{c}" for s in ("btcusdt", "ethusdt") for c in ("depth@100ms", "bookTicker", "aggTrade")],
        "id": 1,
    }
    assert exchange.instruments == ("BTCUSDT.BINANCE", "ETHUSDT.BINANCE")
    assert exchange.snapshot_url("BTCUSDT.BINANCE") == (
        "https://api.binance.com/api/v3/depth?symbol=BTCUSDT&limit=1000"
    )


def test_usd_margined_futures_have_their_trades_at_another_address() -> None:
    exchange = Binance(binance_streams.USD_M, ["BTCUSDT"], url="ws://proxy/", rest_url="http://proxy/fapi/v1/")
    assert [url for url, _ in requests(exchange)] == ["ws://proxy/public/stream", "ws://proxy/market/stream"]
    assert [stream.carries_books for stream in exchange.streams] == [True, False]
    assert exchange.snapshot_url("BTCUSDT.BINANCE-USDM") == "http://proxy/fapi/v1/depth?symbol=BTCUSDT&limit=1000"


@pytest.mark.parametrize(("venue", "most"), [(binance_streams.SPOT, 341), (binance_streams.COIN_M, 66)])
def test_no_more_streams_are_asked_for_than_a_connection_may_carry(venue: str, most: int) -> None:
    assert len(Binance(venue, [f"S{number}" for number in range(most)]).instruments) == most
    with pytest.raises(ValueError, match=f"which is {most} instruments"):
        Binance(venue, [f"S{number}" for number in range(most + 1)])


def test_kraken_v2_subscribes_when_the_decimals_are_known() -> None:
    exchange = Kraken(["BTC-USD", "ETH/USD.KRAKEN"])
    ((url, first),) = requests(exchange)
    assert (url, first) == ("wss://ws.kraken.com/v2", {"method": "subscribe", "params": {"channel": "instrument"}})
    acknowledged = {"method": "subscribe", "result": {"channel": "instrument"}, "success": True}
    assert exchange.follow_up(orjson.dumps(acknowledged)) == ()
    assert exchange.follow_up(b'{"instrument"') == ()
    told = {"channel": "instrument", "type": "snapshot", "data": {"pairs": []}}
    book, trades = (orjson.loads(request)["params"] for request in exchange.follow_up(orjson.dumps(told)))
    assert book == {"channel": "book", "symbol": ["BTC/USD", "ETH/USD"], "depth": 100}
    assert trades == {"channel": "trade", "symbol": ["BTC/USD", "ETH/USD"], "snapshot": False}


def test_the_address_tells_krakens_first_protocol() -> None:
    exchange = Kraken(["XBT-USD"], "wss://ws.kraken.com")
    assert [body for _, body in requests(exchange)] == [
        {"event": "subscribe", "pair": ["XBT/USD"], "subscription": {"name": "book", "depth": 100}},
        {"event": "subscribe", "pair": ["XBT/USD"], "subscription": {"name": "trade"}},
    ]
    again = [orjson.loads(request)["event"] for request in exchange.resubscribe("XBT-USD.KRAKEN")]
    assert again == ["unsubscribe", "subscribe"]


def test_coinbases_full_channel_has_its_books_from_rest_and_the_others_from_the_channel() -> None:
    full, batch = Coinbase(["BTC-USD"], "full"), Coinbase(["BTC-USD"])
    assert full.snapshot_url("BTC-USD.COINBASE") == ("https://api.exchange.coinbase.com/products/BTC-USD/book?level=3")
    assert (full.snapshot_at_start, full.proves_books) == (True, True)
    assert batch.snapshot_url("BTC-USD.COINBASE") == ""
    assert (batch.snapshot_at_start, batch.proves_books) == (False, False)
    assert [body for _, body in requests(batch)] == [
        {"type": "subscribe", "product_ids": ["BTC-USD"], "channels": ["level2_batch", "matches", "heartbeat"]}
    ]


@pytest.mark.parametrize(
    "exchange",
    [
        Binance(binance_streams.SPOT, ["BTCUSDT"]),
        Binance(binance_streams.USD_M, ["BTCUSDT"]),
        Binance(binance_streams.COIN_M, ["BTCUSD_PERP"]),
        Kraken(["XBT-USD"], "wss://ws.kraken.com"),
        Coinbase(["BTC-USD"]),
        Coinbase(["BTC-USD"], "full"),
    ],
)
def test_a_replay_reads_the_instruments_out_of_what_was_asked(exchange: Exchange) -> None:
    for stream in exchange.streams:
        for request in stream.requests:
            assert subscription(exchange.venue, request)[1] == set(exchange.instruments)
