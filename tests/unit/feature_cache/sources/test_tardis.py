"""Tardis.dev's CSV files, written here as documented: no original file was at hand.

The writer and the reconstruction of the book are independent of the reader: one formats events, the other follows the
documented procedure on rows as text.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from feature_cache.engine.book import OrderBook
from feature_cache.engine.engine import FeatureEngine
from feature_cache.sources.publisher import with_resets, with_snapshots
from feature_cache.sources.session import Format, Kind, SessionError, instruments, kind_of, read_session, session_files
from feature_cache.sources.simulator import simulate
from feature_cache.store.codec import BookState
from pretrade.market.v1 import market_pb2 as pb

DATA = Path(__file__).parents[4] / ".." / "shared" / "data" / "binance_spot"
BOOK = "exchange,symbol,timestamp,local_timestamp,is_snapshot,side,price,amount\n"
TRADES = "exchange,symbol,timestamp,local_timestamp,id,side,price,amount\n"
T0 = 1_723_161_255_343_000


def snapshot(at: int = T0) -> str:
    head = f"binance,BTCUSDT,{at},{at + 5},true"
    return f"{head},bid,99.5,1.5\n{head},bid,99,2\n{head},ask,100.25,3e-7\n"


SNAPSHOT = snapshot()

_Side = dict[str, str]


def number(ticks: int, decimals: int) -> str:
    """As JavaScript shows numbers."""
    value = Decimal(ticks).scaleb(-decimals).normalize()
    return f"{value:e}" if 0 < value < Decimal("1e-6") else f"{value:f}"


def rows_of(event: pb.MarketEvent, exchange: str) -> Iterator[str]:
    symbol = event.instrument.partition(".")[0]
    head = f"{exchange},{symbol},{event.event_time_ns // 1000},{event.receive_time_ns // 1000}"
    kind = event.WhichOneof("event")
    if kind == "trade":
        side = {0: "unknown", 1: "buy", 2: "sell"}[event.trade.taker_side]
        price, size = (
            number(event.trade.price_ticks, event.price_decimals),
            number(event.trade.lots, event.size_decimals),
        )
        yield f"{head},{event.trade.trade_id},{side},{price},{size}\n"
    elif kind in ("snapshot", "delta"):
        body = getattr(event, kind)
        for side in ("bid", "ask"):
            for ticks, lots in zip(getattr(body, f"{side}_ticks"), getattr(body, f"{side}_lots"), strict=True):
                flag = "true" if kind == "snapshot" else "false"
                price, size = number(ticks, event.price_decimals), number(lots, event.size_decimals)
                yield f"{head},{flag},{side},{price},{size}\n"


def write(folder: Path, events: Iterable[pb.MarketEvent], exchange: str) -> list[Path]:
    """A pair of files for each symbol, as Tardis's client calls them."""
    texts: dict[str, list[str]] = {}
    for event in events:
        rows = list(rows_of(event, exchange))
        if rows:
            kind = "trades" if event.HasField("trade") else "incremental_book_L2"
            name = f"{exchange}_{kind}_2024-08-08_{event.instrument.partition('.')[0]}.csv.gz"
            texts.setdefault(name, [TRADES if kind == "trades" else BOOK]).extend(rows)
    for name, lines in texts.items():
        (folder / name).write_bytes(gzip.compress("".join(lines).encode(), 1))
    return session_files([folder])


def reconstructed(path: Path) -> dict[int, tuple[_Side, _Side]]:
    """The book after every `local_timestamp`, by the documented procedure."""
    book: dict[str, _Side] = {"bid": {}, "ask": {}}
    states: dict[int, tuple[_Side, _Side]] = {}
    was_snapshot, begun = False, False
    for line in gzip.decompress(path.read_bytes()).decode().splitlines()[1:]:
        _, _, _, local, flag, side, price, amount = line.split(",")
        if flag == "true" and not was_snapshot:
            book = {"bid": {}, "ask": {}}
            begun = True
        was_snapshot = flag == "true"
        if Decimal(amount) == 0:
            book[side].pop(price, None)
        else:
            book[side][price] = amount
        if begun:
            states[int(local)] = (dict(book["bid"]), dict(book["ask"]))
    return states


def shown(book: OrderBook) -> tuple[_Side, _Side]:
    bids, asks = ({number(p, 8): number(s, 8) for p, s in side.sizes.items()} for side in (book.bids, book.asks))
    return bids, asks


def assert_books_equal(files: list[Path], every: int) -> int:
    """Holds our books against the reconstruction after each `every`-th message; returns how often."""
    compared = 0
    for path in files:
        if "incremental_book" not in path.name:
            continue
        book, states = OrderBook(), reconstructed(path)
        times = []
        for event in read_session([path]):
            kind = event.WhichOneof("event")
            if kind == "reset":
                book.reset()
                continue
            assert (book.apply_snapshot if kind == "snapshot" else book.apply_delta)(getattr(event, str(kind)))
            assert book.valid
            times.append(event.receive_time_ns // 1000)
            if len(times) % every == 1:
                compared += 1
                assert shown(book) == states[times[-1]]
        assert set(times) == set(states)
    return compared


def test_books_and_trades_of_a_simulated_market_are_what_was_written(tmp_path: Path) -> None:
    events = list(simulate(3, duration_seconds=20))
    files = write(tmp_path, events, "deribit")
    assert {kind_of(path) for path in files} == {Kind(Format.TARDIS)}
    assert instruments(files) == ["BTCUSDT.DERIBIT", "ETHUSDT.DERIBIT"]
    assert assert_books_equal(files, 3) > 100
    trades = [event for event in read_session(files) if event.HasField("trade")]
    wanted = [event for event in events if event.HasField("trade")]
    assert len(trades) == len(wanted) > 20
    for one, other in zip(trades, wanted, strict=True):
        assert one.instrument.partition(".")[0] == other.instrument.partition(".")[0]
        assert (one.trade.trade_id, one.trade.taker_side) == (other.trade.trade_id, other.trade.taker_side)
        assert one.trade.price_ticks == other.trade.price_ticks * 10 ** (8 - other.price_decimals)
        assert one.trade.lots == other.trade.lots * 10 ** (8 - other.size_decimals)
        assert one.event_time_ns == other.event_time_ns // 1000 * 1000
        assert one.receive_time_ns == other.receive_time_ns // 1000 * 1000


def whole_from_the_begin(events: Iterable[pb.MarketEvent]) -> Iterator[pb.MarketEvent]:
    """The snapshot that was recorded joins updates that came before it: here one stands for all of them."""
    book = OrderBook()
    for event in events:
        if event.HasField("delta"):
            known = book.valid
            book.apply_delta(event.delta)
            if known:
                yield event
        elif event.HasField("snapshot"):
            book.apply_snapshot(event.snapshot)
            event.snapshot.CopyFrom(book.to_snapshot())
            yield event
        elif event.HasField("trade"):
            yield event


@pytest.mark.skipif(not DATA.is_dir(), reason="the recorded sessions are not there")
def test_a_recorded_session_that_went_through_csv_has_the_same_books(tmp_path: Path) -> None:
    recorded = read_session(session_files([DATA]), {"BTCUSDT.BINANCE"})
    events = list(whole_from_the_begin(itertools.islice(recorded, 6_000)))
    files = write(tmp_path, events, "binance")
    assert instruments(files) == ["BTCUSDT.BINANCE"]
    assert assert_books_equal(files, 50) > 1
    engines = [FeatureEngine("BTCUSDT.BINANCE") for _ in range(2)]
    for engine, source in zip(engines, (events, read_session(files)), strict=True):
        for event in with_snapshots(with_resets(source, "replay")):
            engine.on_event(event)
    assert shown(engines[0].book) == shown(engines[1].book)
    assert engines[1].state is BookState.VALID


def test_rows_before_the_first_snapshot_are_left_out_and_a_message_is_one_event(tmp_path: Path) -> None:
    path = tmp_path / "any.csv"
    early = f"binance,BTCUSDT,{T0},{T0 + 1},false,bid,98,1\n"
    later = f"binance,BTCUSDT,{T0},{T0 + 9},false,bid,99.5,0\nbinance,BTCUSDT,{T0},{T0 + 9},false,ask,100.25,2\n"
    path.write_text(BOOK + early + SNAPSHOT + later)
    snapshot, delta = read_session([path])
    assert (list(snapshot.snapshot.bid_ticks), list(snapshot.snapshot.ask_lots)) == (
        [9_950_000_000, 9_900_000_000],
        [30],
    )
    assert (list(delta.delta.bid_lots), list(delta.delta.ask_lots)) == ([0], [200_000_000])
    assert (delta.event_time_ns, delta.receive_time_ns) == (T0 * 1000, (T0 + 9) * 1000)
    assert not delta.event_time_estimated


def test_a_snapshot_in_the_middle_of_a_file_resets_the_book_and_one_at_the_begin_of_a_day_does_not(
    tmp_path: Path,
) -> None:
    delta = f"binance,BTCUSDT,{T0},{T0 + 7},false,bid,97,1\n"
    again = snapshot(T0 + 100)
    (tmp_path / "one.csv").write_text(BOOK + SNAPSHOT + delta + again)
    (tmp_path / "a-later-day.csv").write_text(BOOK + snapshot(T0 + 200))
    events = list(read_session(session_files([tmp_path])))
    kinds = ["snapshot", "delta", "reset", "snapshot", "delta"]
    assert [event.WhichOneof("event") for event in events] == kinds, "snapshot rows go on with a snapshot"
    (tmp_path / "one.csv").write_text(BOOK + SNAPSHOT + delta)
    events = list(read_session(session_files([tmp_path])))
    assert [event.WhichOneof("event") for event in events] == ["snapshot", "delta", "snapshot"]
    book = OrderBook()
    for event in events:
        book.apply_snapshot(event.snapshot) if event.HasField("snapshot") else book.apply_delta(event.delta)
    assert sorted(book.bids.sizes) == [9_900_000_000, 9_950_000_000]


def test_trades_without_a_number_as_id_are_counted_and_a_time_that_was_filled_in_is_estimated(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        TRADES
        + "".join(
            f"okex,X/Y,{T0},{T0},{name},{side},1,2\n" for name, side in (("", "buy"), ("4d", "sell"), ("7", "unknown"))
        )
    )
    events = list(read_session([path]))
    assert [event.trade.trade_id for event in events] == [1, 2, 3]
    assert [event.trade.taker_side for event in events] == [1, 2, 0]
    assert all(event.event_time_estimated for event in events)
    assert instruments([path]) == ["X-Y.OKEX"]


def test_a_file_of_many_symbols_tells_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "binance_incremental_book_L2_2024-08-08_SPOT.csv"
    path.write_text(BOOK + SNAPSHOT + SNAPSHOT.replace("BTCUSDT", "ETHUSDT"))
    assert instruments([path]) == ["BTCUSDT.BINANCE", "ETHUSDT.BINANCE"]
    assert [event.instrument for event in read_session([path], {"ETHUSDT.BINANCE"})] == ["ETHUSDT.BINANCE"]


ROW = f"binance,BTCUSDT,{T0},{T0 + 9},false,bid,99.5,1\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ROW.replace(",1\n", "\n"), "line 5: line: has 7 columns"),
        (ROW.replace("false", "no"), "line 5: is_snapshot: 'no'"),
        (ROW.replace("bid", "buy"), "line 5: side: 'buy' is not bid or ask"),
        (ROW.replace("99.5", "0"), "line 5: price: must be above 0"),
        (ROW.replace("99.5", "x"), "line 5: price: 'x' is not a decimal string"),
        (ROW.replace(",1\n", ",1e-9\n"), "line 5: amount: 1E-9 has more than 8 decimals"),
        (ROW.replace(",1\n", ",1e\n"), "line 5: amount: '1e' is not a number"),
        (ROW.replace(str(T0 + 9), "2024-08-08"), "line 5: local_timestamp: '2024-08-08' is not a time in microseconds"),
        (ROW.replace(f",{T0},", f",{T0}000,"), "line 5: timestamp: .* is not a time in microseconds"),
        (ROW.replace(str(T0 + 9), str(T0 + 1)), "line 5: local_timestamp: is before that of the line above"),
        (ROW.replace("BTCUSDT", ""), "line 5: symbol: is missing"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "b.csv"
    path.write_text(BOOK + SNAPSHOT + row)
    with pytest.raises(SessionError, match=said) as caught:
        list(read_session([path]))
    assert str(path) in str(caught.value)


def test_other_files_of_tardis_are_refused_by_what_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("exchange,symbol,timestamp,local_timestamp,ask_amount,ask_price,bid_price,bid_amount\n")
    with pytest.raises(SessionError, match=r"q\.csv, line 1: .*incremental_book_L2 and trades"):
        instruments([path])
    path.write_text("something,else\n")
    with pytest.raises(SessionError, match=r"q\.csv, line 1: .*incremental_book_L2 and trades"):
        list(read_session([path], told=Kind(Format.TARDIS)))
