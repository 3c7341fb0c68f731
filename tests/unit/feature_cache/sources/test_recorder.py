"""Recordings in the recorder's format: connections merged on one clock, reconnections, broken lines."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import pytest

from feature_cache.engine.engine import FeatureEngine
from feature_cache.sources.publisher import with_resets, with_snapshots
from feature_cache.sources.session import SessionError, instruments, read_session, session_files
from feature_cache.store.codec import BookState
from pretrade.market.v1 import market_pb2 as pb

DATA = Path(__file__).parents[4] / ".." / "shared" / "data"
FOLDERS = [DATA / "kraken_v1", DATA / "coinbase_pro"]
recorded = pytest.mark.skipif(
    not all(folder.is_dir() for folder in FOLDERS), reason="the recorded sessions are not there"
)

KRAKEN = "wss://ws.kraken.com"
COINBASE = "wss://ws-feed.exchange.coinbase.com"
T0 = 1_618_678_132


def connected(second: float, address: str) -> str:
    return f"{address} <-> {T0 + second}"


def sent(second: float, address: str, message: object) -> str:
    return f"{address} <- {T0 + second}: {orjson.dumps(message).decode()}"


def received(second: float, message: object) -> str:
    return f"{T0 + second}: {orjson.dumps(message).decode()}"


def recording(path: Path, *lines: str) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(f"{line}\n" for line in lines)
    return path


def kinds(events: Iterable[pb.MarketEvent]) -> list[str | None]:
    return [event.WhichOneof("event") for event in events]


BOOK = {"event": "subscribe", "pair": ["ETH/USD"], "subscription": {"name": "book", "depth": 10}}
TRADES = {"event": "subscribe", "pair": ["ETH/USD"], "subscription": {"name": "trade"}}


def snapshot(second: int) -> list[object]:
    level = ["2000.0", "1.00000000", f"{T0 + second}.000000"]
    return [1, {"as": [level], "bs": []}, "book-10", "ETH/USD"]


def trade(second: int) -> list[object]:
    return [2, [["2000.0", "1.00000000", f"{T0 + second}.000000", "b", "l", ""]], "trade", "ETH/USD"]


def test_connections_of_a_venue_are_read_by_one_feed_on_one_clock(tmp_path: Path) -> None:
    recording(
        tmp_path / "KRAKEN.ws.1.0.gz",
        connected(0, KRAKEN),
        sent(0.5, KRAKEN, TRADES),
        received(1.25, trade(1)),
        received(3.5, trade(3)),
    )
    recording(
        tmp_path / "KRAKEN.ws.2.0.gz",
        connected(0, KRAKEN),
        sent(0.5, KRAKEN, BOOK),
        received(0.75, {"event": "heartbeat"}),
        received(2.5, snapshot(2)),
        "",
    )
    files = session_files([tmp_path])
    assert instruments(files) == ["ETH-USD.KRAKEN"]
    events = list(read_session(files))
    assert kinds(events) == ["trade", "snapshot", "trade"]
    assert [event.receive_time_ns - T0 * 10**9 for event in events] == [1_250_000_000, 2_500_000_000, 3_500_000_000]
    assert events[1].event_time_ns == T0 * 10**9 + 2_250_000_000, "estimated with the lag that the trade showed"


def test_a_connection_made_anew_resets_the_books_it_carried(tmp_path: Path) -> None:
    recording(
        tmp_path / "KRAKEN.ws.1.0.gz",
        connected(0, KRAKEN),
        sent(0.5, KRAKEN, TRADES),
        received(1.25, trade(1)),
        connected(5, KRAKEN),
        sent(5.5, KRAKEN, TRADES),
        received(6.25, trade(6)),
    )
    recording(
        tmp_path / "KRAKEN.ws.2.0.gz",
        connected(0, KRAKEN),
        sent(0.5, KRAKEN, BOOK),
        received(2.5, snapshot(2)),
        connected(7, KRAKEN),
        sent(7.5, KRAKEN, BOOK),
        received(8.5, snapshot(8)),
    )
    events = list(read_session(session_files([tmp_path])))
    assert kinds(events) == ["trade", "snapshot", "trade", "reset", "snapshot"]
    assert events[3].reset.reason == "reconnect"


def test_the_address_tells_the_second_protocol(tmp_path: Path) -> None:
    pair = {"symbol": "ETH/USD", "price_precision": 2, "qty_precision": 8}
    entry = {
        "symbol": "ETH/USD",
        "side": "buy",
        "price": 2000.5,
        "qty": 1.5,
        "trade_id": 7,
        "timestamp": "2021-04-17T16:48:53.000000Z",
    }
    path = recording(
        tmp_path / "KRAKEN.ws.1.0.gz",
        connected(0, f"{KRAKEN}/v2"),
        sent(0.5, f"{KRAKEN}/v2", {"method": "subscribe", "params": {"channel": "instrument"}}),
        sent(0.5, f"{KRAKEN}/v2", {"method": "subscribe", "params": {"channel": "trade", "symbol": ["ETH/USD"]}}),
        received(0.75, {"channel": "instrument", "type": "snapshot", "data": {"pairs": [pair]}}),
        received(1.5, {"channel": "trade", "type": "update", "data": [entry]}),
    )
    assert instruments([path]) == ["ETH-USD.KRAKEN"]
    (event,) = read_session([path])
    assert event.trade.price_ticks == 200_050


def test_the_full_channel_begins_at_the_level_3_book_of_the_rest_interface(tmp_path: Path) -> None:
    time = "2021-04-17T16:48:53.000000Z"
    opened = {
        "type": "open",
        "product_id": "ETH-USD",
        "time": time,
        "order_id": "b",
        "side": "buy",
        "price": "5",
        "remaining_size": "2",
    }
    rest = "https://api.exchange.coinbase.com/products/ETH-USD/book?level=3"
    book = orjson.dumps({"sequence": 8, "bids": [["5", "1", "a"]], "asks": []}).decode()
    recording(tmp_path / "COINBASE.0.gz", "configuration: {}", f"{rest} -> {T0 + 2.5}: {book}")
    request = {"type": "subscribe", "channels": [{"name": "full", "product_ids": ["ETH-USD"]}]}
    recording(
        tmp_path / "COINBASE.ws.1.0.gz",
        connected(0, COINBASE),
        sent(0.5, COINBASE, request),
        received(1.5, {**opened, "sequence": 8, "order_id": "a"}),
        received(2, {**opened, "sequence": 9}),
        received(3, {**opened, "sequence": 10, "order_id": "c"}),
    )
    files = session_files([tmp_path])
    assert instruments(files) == ["ETH-USD.COINBASE"]
    engine = FeatureEngine("ETH-USD.COINBASE")
    events = list(read_session(files))
    assert kinds(events) == ["snapshot", "delta", "delta"]
    for event in events:
        engine.on_event(event)
    assert engine.book.bids.sizes == {5 * 10**8: 5 * 10**8}


START = (connected(0, KRAKEN), sent(0.5, KRAKEN, BOOK))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (received(1, trade(1))[:-30], "line 3: message: is not JSON"),
        (received(1, [1, {}, "spread", "ETH/USD"]), "line 3: channelName"),
        ("yesterday: {}", "line 3: time"),
        (f"{KRAKEN} >> {T0}: {{}}", "line 3: is not a line"),
        (f"{KRAKEN} <- {T0}: subscribe!", "line 3: message: is not a request"),
        (sent(1, KRAKEN, {"event": "subscribe"}), "line 3: message: is not a request"),
        (sent(1, KRAKEN, []), "line 3: message: is not a request"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = recording(tmp_path / "KRAKEN.ws.1.0.gz", *START, line)
    with pytest.raises(SessionError, match=message) as caught:
        list(read_session([path]))
    assert str(path) in str(caught.value)


def test_messages_without_a_connection_are_an_error(tmp_path: Path) -> None:
    path = recording(tmp_path / "KRAKEN.ws.1.0.gz", received(1, trade(1)))
    with pytest.raises(SessionError, match="line 1: message: comes before"):
        list(read_session([path]))


def test_a_damaged_recording_is_named(tmp_path: Path) -> None:
    path = recording(tmp_path / "KRAKEN.ws.1.0.gz", *START, received(1, trade(1)))
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(SessionError, match="damaged"):
        list(read_session([path]))
    with pytest.raises(SessionError, match="damaged"):
        instruments([path])


def test_a_recording_without_a_subscription_is_of_no_instrument(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="no instrument"):
        instruments([recording(tmp_path / "KRAKEN.0.gz", "configuration: {}")])


@recorded
def test_both_venues_replay_as_the_worker_would_see_them() -> None:
    files = session_files(FOLDERS)
    names = instruments(files)
    assert len(names) == 20
    engines = {name: FeatureEngine(name) for name in names}
    counts: Counter[tuple[str, str | None]] = Counter()
    times = []
    for event in with_snapshots(with_resets(read_session(files), "replay")):
        engines[event.instrument].on_event(event)
        counts[event.instrument.partition(".")[2], event.WhichOneof("event")] += 1
        times.append(event.receive_time_ns)
    assert all(earlier <= later for earlier, later in pairwise(times))
    assert counts["KRAKEN", "delta"] == 4_269
    assert counts["COINBASE", "delta"] == 9_719
    assert (counts["KRAKEN", "reset"], counts["COINBASE", "reset"]) == (10, 10), "the replay's own, one an instrument"
    for engine in engines.values():
        assert engine.state is BookState.VALID
        assert (engine.book.gaps, engine.book.crossings, engine.time_restarts, engine.future) == (0, 0, 0, 0)
        assert np.isfinite(engine.snapshot().values[:5]).all()


@recorded
def test_one_instrument_can_be_had_alone_and_is_the_same() -> None:
    name = "XMR-USD.KRAKEN"
    alone = [event.SerializeToString() for event in read_session(session_files(FOLDERS), [name])]
    among = [event.SerializeToString() for event in read_session(session_files(FOLDERS)) if event.instrument == name]
    assert len(alone) > 100
    assert alone == among
