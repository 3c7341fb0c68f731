"""LOBSTER's pairs of files, written here as documented from a simulated market: no original file was at hand.

The writer keeps a book of its own and prints it after every message, as LOBSTER does: ours has to be that at each line.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from feature_cache.engine.book import CLOSED, OrderBook
from feature_cache.sources.session import Format, Kind, SessionError, instruments, kind_of, read_session, session_files
from feature_cache.sources.simulator import simulate
from pretrade.market.v1 import market_pb2 as pb

DAY = "2012-06-21"
NAME = f"AAPL_{DAY}_34200000_57600000_{{}}_5.csv"
LEVELS = 5
OPEN_NS = 34_200 * 10**9

_Trade = tuple[int, int, int, int]
"""Nanoseconds since midnight, price, size, taker side."""


@dataclass
class Writer:
    """LOBSTER's two files of one day."""

    messages: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    trades: list[_Trade] = field(default_factory=list)
    books: dict[int, dict[int, int]] = field(default_factory=lambda: {1: {}, -1: {}})
    now_ns: int = OPEN_NS

    def say(self, kind: int, size: int, price: int, direction: int) -> None:
        """One message, and the book after it."""
        self.now_ns += 1_001
        seconds, fraction = divmod(self.now_ns, 10**9)
        order = 0 if kind >= 5 else len(self.messages) + 1
        self.messages.append(f"{seconds}.{fraction:09},{kind},{order},{size},{price},{direction}\n")
        if kind in (4, 5, 6):
            taker = {4: -direction, 5: -direction, 6: 0}[kind]
            self.trades.append((self.now_ns, price, size, {1: 1, -1: 2, 0: 0}[taker]))
        cells: list[int] = []
        asks, bids = sorted(self.books[-1].items()), sorted(self.books[1].items(), reverse=True)
        for level in range(LEVELS):
            cells += asks[level] if level < len(asks) else (9999999999, 0)
            cells += bids[level] if level < len(bids) else (-9999999999, 0)
        self.rows.append(",".join(map(str, cells)) + "\n")

    def set(self, price: int, direction: int, size: int, executed: bool) -> None:
        """Brings a level to a size, by the message that would have done it."""
        book = self.books[direction]
        before = book.pop(price, 0)
        if size:
            book[price] = size
        if size > before:
            self.say(1, size - before, price, direction)
        elif size < before:
            self.say(4 if executed else 2 if size else 3, before - size, price, direction)

    def save(self, folder: Path, name: str = NAME, pack: bool = False) -> list[Path]:
        for kind, lines in (("message", self.messages), ("orderbook", self.rows)):
            text = "".join(lines).encode()
            path = folder / (name.format(kind) + (".gz" if pack else ""))
            path.write_bytes(gzip.compress(text) if pack else text)
        return session_files([folder])


def of_market(seed: int, seconds: float) -> Writer:
    """A simulated market, level by level; halted in the middle."""
    writer = Writer()
    last_trade = 0
    events = list(simulate(seed, ["AAPL.SIM"], duration_seconds=seconds))
    for number, event in enumerate(events):
        scale = 10 ** (event.price_decimals - 4)
        kind = event.WhichOneof("event")
        if kind == "trade":
            last_trade = event.trade.price_ticks // scale
        if kind in ("snapshot", "delta"):
            body = getattr(event, kind)
            sides = ((1, body.bid_ticks, body.bid_lots), (-1, body.ask_ticks, body.ask_lots))
            changes = [(p // scale, side, s) for side, ps, ss in sides for p, s in zip(ps, ss, strict=True)]
            # What leaves goes first, so that no line shows a crossed book.
            for price, side, size in sorted(changes, key=lambda one: one[2] > writer.books[one[1]].get(one[0], 0)):
                writer.set(price, side, size, executed=price == last_trade)
            last_trade = 0
        if number % 50 == 0:
            writer.say(5, 10, min(writer.books[-1], default=1_000_000) - 50, -1)
        if number == len(events) // 2:
            writer.say(7, 0, -1, -1)
            writer.set(min(writer.books[1]), 1, 0, executed=False)
            writer.say(6, 500, max(writer.books[1]), -1)
            writer.say(7, 0, 0, -1)
            writer.say(7, 0, 1, -1)
    return writer


def midnight_ns() -> int:
    return int(datetime.fromisoformat(DAY).replace(tzinfo=ZoneInfo("America/New_York")).timestamp()) * 10**9


def row(book: OrderBook) -> str:
    cells: list[int] = []
    asks, bids = book.asks.top(LEVELS + 1), book.bids.top(LEVELS + 1)
    assert len(asks) <= LEVELS
    assert len(bids) <= LEVELS
    for level in range(LEVELS):
        cells += asks[level] if level < len(asks) else (9999999999, 0)
        cells += bids[level] if level < len(bids) else (-9999999999, 0)
    return ",".join(map(str, cells)) + "\n"


@pytest.mark.parametrize("pack", [False, True])
def test_the_book_is_that_of_the_file_at_every_line(tmp_path: Path, pack: bool) -> None:
    writer = of_market(5, 10)
    files = writer.save(tmp_path, pack=pack)
    assert {kind_of(path) for path in files} == {Kind(Format.LOBSTER)}
    assert instruments(files) == ["AAPL.NASDAQ"]
    times = [int(line.partition(",")[0].replace(".", "")) + midnight_ns() for line in writer.messages]
    by_time = {time: list(events) for time, events in groupby(read_session(files), lambda one: one.event_time_ns)}
    assert set(by_time) <= set(times)
    closed = by_time[times[-1]].pop()
    assert (closed.WhichOneof("event"), closed.reset.reason) == ("reset", CLOSED)
    book, halted, compared = OrderBook(), False, 0
    for time, message, wanted in zip(times, writer.messages, writer.rows, strict=True):
        for event in by_time.get(time, []):
            assert (event.receive_time_ns, event.event_time_estimated) == (time, False)
            take(book, event)
        _, kind, _, _, price, _ = message.strip().split(",")
        if kind == "7":
            halted = price != "1"
        assert book.valid is not halted
        if not halted:
            compared += 1
            assert row(book) == wanted
    assert compared > 1000
    kinds = {line.split(",")[1] for line in writer.messages}
    assert kinds == {"1", "2", "3", "4", "5", "6", "7"}


def take(book: OrderBook, event: pb.MarketEvent) -> None:
    kind = event.WhichOneof("event")
    if kind == "snapshot":
        assert book.apply_snapshot(event.snapshot)
    elif kind == "delta":
        assert book.apply_delta(event.delta)
    elif kind == "reset":
        book.reset()


def test_executions_are_trades_of_the_side_that_took(tmp_path: Path) -> None:
    writer = of_market(6, 5)
    trades = [event for event in read_session(writer.save(tmp_path)) if event.HasField("trade")]
    found = [
        (one.event_time_ns - midnight_ns(), one.trade.price_ticks, one.trade.lots, int(one.trade.taker_side))
        for one in trades
    ]
    assert found == writer.trades
    assert {side for *_, side in found} == {0, 1, 2}
    assert [one.trade.trade_id for one in trades] == list(range(1, len(trades) + 1))
    assert {(one.price_decimals, one.size_decimals) for one in trades} == {(4, 0)}


def test_days_follow_one_another_with_a_reset_between_them_and_ids_go_on(tmp_path: Path) -> None:
    writer = small()
    writer.save(tmp_path, f"AAPL_2012-06-22_34200000_57600000_{{}}_{LEVELS}.csv")
    files = writer.save(tmp_path)
    events = list(read_session(files))
    assert [event.WhichOneof("event") for event in events] == ["snapshot", "delta", "trade", "reset"] * 2
    assert (events[0].snapshot.last_update_id, events[4].snapshot.last_update_id) == (1, 3)
    assert events[4].event_time_ns - events[0].event_time_ns == 24 * 3600 * 10**9
    assert [event.trade.trade_id for event in events if event.HasField("trade")] == [1, 2]


def test_the_clock_is_that_of_new_york_in_winter_too(tmp_path: Path) -> None:
    small().save(tmp_path, "AAPL_2012-01-03_34200000_57600000_{}_5.csv")
    first = next(iter(read_session(session_files([tmp_path]))))
    assert first.event_time_ns // 10**9 == datetime.fromisoformat("2012-01-03T14:30:00+00:00").timestamp()


def small() -> Writer:
    writer = Writer()
    writer.set(1_000_000, 1, 100, executed=False)
    writer.set(1_000_100, -1, 100, executed=False)
    writer.say(5, 7, 1_000_050, 1)
    return writer


def broken(messages: Iterable[str] | None = None, rows: Iterable[str] | None = None) -> Writer:
    writer = small()
    writer.messages = list(messages) if messages is not None else writer.messages
    writer.rows = list(rows) if rows is not None else writer.rows
    return writer


M, R = small().messages, small().rows


@pytest.mark.parametrize(
    ("writer", "said"),
    [
        (broken([M[0], "34200.1,1,2\n", M[2]]), r"message_5\.csv, line 2: line: has 3 columns"),
        (broken([M[0], "noon,1,2,3,4,1\n", M[2]]), r"message_5\.csv, line 2: time: 'noon' is not seconds"),
        (broken([M[0], "34200.1,8,2,3,4,1\n", M[2]]), r"message_5\.csv, line 2: type: 8 is not from 1 to 7"),
        (broken([M[0], "34200.1,x,2,3,4,1\n", M[2]]), r"message_5\.csv, line 2: type: 'x' is not a whole number"),
        (broken([M[0], "34200.1,4,2,3,0,1\n", M[2]]), r"message_5\.csv, line 2: price: must be above 0"),
        (broken([M[0], "34200.1,4,2,3,9,0\n", M[2]]), r"message_5\.csv, line 2: direction: 0 is neither 1 nor -1"),
        (broken([M[0], "34200.1,7,0,0,5,-1\n", M[2]]), r"message_5\.csv, line 2: price: 5 is not -1, 0 or 1"),
        (broken([M[0], "34199.1,1,2,3,4,1\n", M[2]]), r"message_5\.csv, line 2: time: is before that of the line"),
        (broken(M[:2]), r"message_5\.csv: ends before .*orderbook_5\.csv"),
        (broken(None, R[:2]), r"orderbook_5\.csv: ends before .*message_5\.csv"),
        (broken(None, [R[0], "1,2,3\n", R[2]]), r"orderbook_5\.csv, line 2: line: has 3 columns"),
        (broken(None, [R[0], "1,2,-3,4\n", R[2]]), r"orderbook_5\.csv, line 2: column 3: -3, 4 is no price and size"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, writer: Writer, said: str) -> None:
    files = writer.save(tmp_path)
    with pytest.raises(SessionError, match=said):
        list(read_session(files))


def test_newer_files_say_who_made_the_order(tmp_path: Path) -> None:
    files = broken([line.replace("\n", ",NSDQ\n") for line in M]).save(tmp_path)
    assert len(list(read_session(files))) == 4


def test_a_pair_that_is_not_whole_and_a_name_without_a_day_are_refused(tmp_path: Path) -> None:
    files = small().save(tmp_path)
    with pytest.raises(SessionError, match=r"message_5\.csv: its orderbook file is missing"):
        instruments(files[:1])
    other = files[0].rename(tmp_path / "aapl.csv")
    with pytest.raises(SessionError, match=r"aapl\.csv: ticker and day stand in the name"):
        instruments([other], Kind(Format.LOBSTER))
    impossible = small().save(tmp_path, "AAPL_2012-13-40_34200000_57600000_{}_5.csv")
    with pytest.raises(SessionError, match="2012-13-40 is no day"):
        list(read_session([path for path in impossible if "2012-13" in path.name]))
