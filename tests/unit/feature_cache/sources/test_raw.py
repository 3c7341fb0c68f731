"""Raw lines of every venue: what they are, in which order they are read, and what is said of those that are wrong."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest

from feature_cache.engine.book import OrderBook
from feature_cache.sources import recorder
from feature_cache.sources.session import Format, Kind, SessionError, instruments, kind_of, read_session, session_files
from pretrade.market.v1 import market_pb2 as pb

DATA = Path(__file__).parents[4] / ".." / "shared" / "data"
MS = 1_723_161_255_343
T0 = MS * 1_000_000

SPOT_SNAPSHOT = {"lastUpdateId": 10, "bids": [["99.0", "1.0"]], "asks": [["101.0", "2.0"]]}
SPOT_DELTA = {"e": "depthUpdate", "E": MS, "s": "BTCUSDT", "U": 11, "u": 12, "b": [["99.5", "3.0"]], "a": []}
SPOT_TRADE = {"e": "trade", "E": MS, "s": "BTCUSDT", "t": 7, "p": "99.5", "q": "1.0", "T": MS, "m": True, "M": True}
FUTURES_SNAPSHOT = {**SPOT_SNAPSHOT, "E": MS, "T": MS}
FUTURES_DELTA = {**SPOT_DELTA, "T": MS, "pu": 10}
FUTURES_TRADE = {"e": "trade", "E": MS, "T": MS, "s": "BTCUSDT", "t": 7, "p": "1", "q": "1", "X": "MARKET", "m": True}
FUTURES_FUND = {**FUTURES_TRADE, "t": 8, "X": "INSURANCE_FUND"}
FUTURES_AGGREGATE = {"e": "aggTrade", "E": MS, "s": "BTCUSDT", "a": 3, "p": "1", "q": "1", "f": 8, "l": 9, "m": True}
COIN_M = {"s": "BTCUSD_PERP", "ps": "BTCUSD"}
KRAKEN_V1 = (
    [1, {"as": [["101.0", "2.0", "1723161255.3"]], "bs": [["99.0", "1.0", "1723161255.3"]]}, "book-10", "XBT/USD"],
    [2, [["99.5", "1.0", "1723161255.3", "s", "l", ""]], "trade", "XBT/USD"],
)
PAIR = {"symbol": "BTC/USD", "price_precision": 1, "qty_precision": 8}
V2_TIME = "2024-08-08T23:54:15.343Z"
V2_BOOK = {"symbol": "BTC/USD", "bids": [{"price": 99.0, "qty": 1.0}], "asks": [], "checksum": 0}
V2_TRADE = {"symbol": "BTC/USD", "side": "buy", "price": 99.5, "qty": 1.0, "trade_id": 3, "timestamp": V2_TIME}
KRAKEN_V2 = (
    {"method": "subscribe", "success": True, "result": {"channel": "instrument"}},
    {"channel": "instrument", "type": "snapshot", "data": {"assets": [], "pairs": [PAIR]}},
    {"channel": "trade", "type": "update", "data": [V2_TRADE]},
)
LEVEL_2 = (
    {"type": "subscriptions", "channels": []},
    {"type": "snapshot", "product_id": "BTC-USD", "bids": [["99.0", "1.0"]], "asks": [["101.0", "2.0"]]},
    {"type": "l2update", "product_id": "BTC-USD", "time": V2_TIME, "changes": [["buy", "99.5", "3.0"]]},
)
FULL = (
    {"sequence": 5, "bids": [["99.0", "1.0", "a"]], "asks": [["101.0", "2.0", "b"]]},
    {
        "type": "open",
        "product_id": "BTC-USD",
        "sequence": 6,
        "time": V2_TIME,
        "order_id": "c",
        "side": "buy",
        "price": "99.5",
        "remaining_size": "3.0",
    },
)

VENUES: list[tuple[str, str, Iterable[Any], str, list[str]]] = [
    ("btcusdt_1.gz", "BINANCE", (SPOT_TRADE, SPOT_SNAPSHOT, SPOT_DELTA), "BTCUSDT", ["trade", "snapshot", "delta"]),
    (
        "btcusdt_240808.gz",
        "BINANCE-USDM",
        (FUTURES_SNAPSHOT, FUTURES_DELTA, FUTURES_TRADE, FUTURES_FUND, FUTURES_AGGREGATE),
        "BTCUSDT",
        ["snapshot", "delta", "trade", "trade"],
    ),
    (
        "btcusd_perp_20240808.gz",
        "BINANCE-COINM",
        ({**FUTURES_SNAPSHOT, "symbol": "BTCUSD_PERP"}, FUTURES_DELTA | COIN_M, FUTURES_TRADE | COIN_M),
        "BTCUSD_PERP",
        ["snapshot", "delta", "trade"],
    ),
    ("monday.gz", "KRAKEN", KRAKEN_V1, "XBT-USD", ["snapshot", "trade"]),
    ("monday.gz", "KRAKEN", KRAKEN_V2, "BTC-USD", ["trade"]),
    ("monday.gz", "COINBASE", LEVEL_2, "BTC-USD", ["snapshot", "delta"]),
    ("btc-usd_monday.gz", "COINBASE", FULL, "BTC-USD", ["snapshot", "delta"]),
]


def raw(path: Path, messages: Iterable[Any], first_ns: int = T0, step_ns: int = 1_000_000) -> Path:
    times = (first_ns + number * step_ns for number in range(1_000_000))
    lines = (b"%d %s\n" % (time, orjson.dumps(message)) for time, message in zip(times, messages, strict=False))
    with gzip.open(path, "wb") as file:
        file.writelines(lines)
    return path


def kinds(events: Iterable[pb.MarketEvent]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


@pytest.mark.parametrize(("name", "venue", "messages", "symbol", "expected"), VENUES)
@pytest.mark.parametrize("told", [True, False])
def test_the_messages_of_every_venue_are_known_by_what_they_say(
    tmp_path: Path, name: str, venue: str, messages: Iterable[Any], symbol: str, expected: list[str], told: bool
) -> None:
    path = raw(tmp_path / name, messages)
    kind = Kind(Format.RAW, venue)
    assert kind_of(path) == kind
    assert instruments([path], kind if told else None) == [f"{symbol}.{venue}"]
    events = list(read_session([path], told=kind if told else None))
    assert kinds(events) == expected
    assert {event.instrument for event in events} == {f"{symbol}.{venue}"}


def test_a_futures_contract_that_ends_on_a_day_is_told_from_a_day_of_a_perpetual(tmp_path: Path) -> None:
    perpetual = raw(tmp_path / "btcusdt_240927.gz", [FUTURES_DELTA])
    delivery = raw(tmp_path / "btcusdt_240927_20240808.gz", [{**FUTURES_DELTA, "s": "BTCUSDT_240927"}])
    assert instruments([perpetual]) == ["BTCUSDT.BINANCE-USDM"]
    assert instruments([delivery]) == ["BTCUSDT_240927.BINANCE-USDM"]


def test_books_and_trades_in_files_of_their_own_are_merged_whatever_they_are_called(tmp_path: Path) -> None:
    """A book file a day, and one of trades over both, none in the order of its name."""
    deltas = [{**FUTURES_DELTA, "U": 11 + n, "u": 11 + n, "pu": 10 + n} for n in range(20)]
    trades = [{**FUTURES_TRADE, "t": 1 + n} for n in range(20)]
    files = [
        raw(tmp_path / "btcusdt_z.gz", [FUTURES_SNAPSHOT, *deltas[:10]], T0),
        raw(tmp_path / "btcusdt_a.gz", deltas[10:], T0 + 11_000_000),
        raw(tmp_path / "btcusdt_m.gz", trades, T0 + 500_000),
    ]
    wanted: list[pb.MarketEvent] | None = None
    for _ in range(4):
        random.Random(7).shuffle(files)
        events = list(read_session(files))
        assert kinds(events) == ["snapshot", "trade"] + ["delta", "trade"] * 19 + ["delta"]
        assert wanted in (None, events)
        wanted = events
    book = OrderBook()
    book.apply_snapshot(events[0].snapshot)
    assert all(book.apply_delta(event.delta) for event in events if event.HasField("delta"))
    assert (book.valid, book.last_update_id) == (True, 30)


def test_only_the_chosen_instruments_are_read(tmp_path: Path) -> None:
    files = [
        raw(tmp_path / "btcusdt_1.gz", [SPOT_TRADE]),
        raw(tmp_path / "ethusdt_1.gz", [{**SPOT_TRADE, "s": "ETHUSDT"}]),
        raw(tmp_path / "kraken.gz", KRAKEN_V1),
    ]
    assert instruments(files) == ["BTCUSDT.BINANCE", "ETHUSDT.BINANCE", "XBT-USD.KRAKEN"]
    found = {event.instrument for event in read_session(files, {"ETHUSDT.BINANCE", "XBT-USD.KRAKEN"})}
    assert found == {"ETHUSDT.BINANCE", "XBT-USD.KRAKEN"}


@pytest.mark.parametrize(
    ("venue", "messages", "said"),
    [
        (
            "BINANCE",
            [{**SPOT_TRADE, "s": "ETHUSDT"}],
            "s: is 'ETHUSDT', expected 'BTCUSDT', with which the file's name",
        ),
        ("BINANCE", KRAKEN_V1, "line 1: message: must be a JSON object"),
        ("BINANCE", [LEVEL_2[2]], "line 1: s: .* it looks like a message of COINBASE, and was read as one of BINANCE"),
        ("BINANCE-USDM", [SPOT_DELTA], "line 1: pu: is missing; it looks like a message of BINANCE, and was"),
        ("KRAKEN", [SPOT_DELTA], "line 1: event: is missing; it looks like a message of BINANCE"),
        ("COINBASE", [SPOT_DELTA], "line 1: type: is missing"),
    ],
)
def test_a_line_of_another_venue_is_named_with_what_is_wrong(
    tmp_path: Path, venue: str, messages: Iterable[Any], said: str
) -> None:
    path = raw(tmp_path / "btcusdt_1.gz", messages)
    with pytest.raises(SessionError, match=said) as caught:
        list(read_session([path], told=Kind(Format.RAW, venue)))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("folder", ["kraken_v1", "coinbase_pro"])
def test_the_raw_lines_of_a_recorded_session_give_the_events_of_the_recording(tmp_path: Path, folder: str) -> None:
    recorded = DATA / folder
    if not recorded.is_dir():
        pytest.skip("the recorded sessions are not there")
    for path in session_files([recorded]):
        lines = [line for line in recorder.read_lines(path) if line.arrow == recorder.RECEIVED]
        if lines:
            text = b"".join(b"%d %s\n" % (line.receive_time_ns, line.message) for line in lines)
            (tmp_path / f"part-{path.name}.jsonl").write_bytes(text)
    files = session_files([tmp_path])
    wanted = list(read_session(session_files([recorded])))
    assert list(read_session(files)) == wanted
    assert set(instruments(files)) == {event.instrument for event in wanted}


def test_a_book_of_coinbase_that_says_no_product_is_refused_where_the_files_name_says_another(tmp_path: Path) -> None:
    path = raw(tmp_path / "monday.gz", FULL)
    with pytest.raises(SessionError, match=r"monday\.gz, line 1: .*must begin with it, as BTC-USD_… does"):
        list(read_session([path]))
