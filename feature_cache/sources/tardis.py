"""Tardis.dev's downloadable CSV files as market events: `incremental_book_L2` and `trades`.

    exchange,symbol,timestamp,local_timestamp,is_snapshot,side,price,amount
    exchange,symbol,timestamp,local_timestamp,id,side,price,amount

Times are microseconds since the Unix epoch: the exchange's, and that of receipt, which the rows are sorted by. Where
the exchange sends none the two are equal; those event times count as estimated.

Rows of one symbol with the same `local_timestamp` came in one message, and are one event: only after the last of them
is the book consistent. Amounts are absolute, and 0 removes a level. The first row with `is_snapshot` after one without
begins the book anew. That is a reset, too, but at the begin of a file: those of a day begin with a snapshot of a book
that was known all along. Rows before the first snapshot are about no known book, and are left out.

A trade has the exchange's id where that is a number, else its number in the recording: ids must increase.

Source: Tardis.dev, "Downloadable CSV files: data types", and "How can I reconstruct a full order book".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple

from feature_cache.feeds import binance_streams, coinbase, kraken, wire
from feature_cache.feeds.wire import FeedError
from feature_cache.sources.files import Progress, SessionError, in_order, read_lines
from pretrade.market.v1 import market_pb2 as pb

HEADER: Final = b"exchange,symbol,timestamp,local_timestamp,"
"""How the first line of every file of Tardis begins."""
DECIMALS: Final = 8

_BOOK: Final = HEADER + b"is_snapshot,side,price,amount"
_TRADES: Final = HEADER + b"id,side,price,amount"
_LATEST_US: Final = 9_000_000_000_000_000
_OURS: Final = {
    "binance": binance_streams.SPOT,
    "binance-futures": binance_streams.USD_M,
    "binance-delivery": binance_streams.COIN_M,
    "coinbase": coinbase.VENUE,
    "kraken": kraken.VENUE,
}
"""Exchanges that `pretrade ingest` knows; others are venues by their own names, in capitals."""
_OF_ONE_SYMBOL: Final = re.compile(
    r".*_(?:incremental_book_L2|trades)_[0-9]{4}-[0-9]{2}-[0-9]{2}_(?!(?:SPOT|FUTURES|OPTIONS|PERPETUALS|COMBOS)\.)"
)
"""How Tardis's clients call a file that does not hold all symbols of a kind."""
_FLAGS: Final = {"true": True, "false": False}
_TAKER_SIDES: Final = {
    "buy": pb.TAKER_SIDE_BUY,
    "sell": pb.TAKER_SIDE_SELL,
    "unknown": pb.TAKER_SIDE_UNSPECIFIED,
}


class _Row(NamedTuple):
    instrument: str
    event_time_ns: int
    receive_time_ns: int
    extra: str
    """`is_snapshot` or `id`."""
    side: str
    ticks: int
    lots: int
    is_estimated: bool

    def event(self) -> pb.MarketEvent:
        """Its times, without a body."""
        event = wire.new_event(self.instrument, DECIMALS, DECIMALS, self.receive_time_ns)
        event.event_time_ns = self.event_time_ns
        event.event_time_estimated = self.is_estimated
        return event


@dataclass(slots=True)
class _Symbol:
    """What is known of one symbol."""

    update_id: int = 0
    """The last; 0 before the first snapshot."""
    is_in_snapshot: bool = False
    """Whether the last rows were of a snapshot."""
    trade_id: int = 0
    has_own_ids: bool | None = None


class TardisFiles:
    """Files of any exchanges, symbols and days.

    Args:
        files: In any order.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)

    def instruments(self) -> set[str]:
        """What the files are about.

        Raises:
            SessionError: A file cannot be read.
        """
        found: set[str] = set()
        for path in self._files:
            for _, line in _lines(path, None):
                exchange, _, rest = line.partition(b",")
                found.add(
                    _instrument(exchange.decode(errors="replace"), rest.partition(b",")[0].decode(errors="replace"))
                )
                if _OF_ONE_SYMBOL.match(path.name):
                    break
        return found

    def events(self, only: Collection[str] | None, progress: Progress | None) -> Iterator[pb.MarketEvent]:
        """See `session.read_session`."""
        symbols: Mapping[str, _Symbol] = defaultdict(_Symbol)
        sources = ((_began(path), self._events_of(path, symbols, only, progress)) for path in self._files)
        return in_order(sorted(sources, key=lambda source: source[0]), attrgetter("receive_time_ns"))

    def _events_of(
        self, path: Path, symbols: Mapping[str, _Symbol], only: Collection[str] | None, progress: Progress | None
    ) -> Iterator[pb.MarketEvent]:
        is_book = _header(path) == _BOOK
        rows = _rows(path, progress, is_book)
        wanted = rows if only is None else (row for row in rows if row.instrument in only)
        if not is_book:
            for row in wanted:
                yield _trade(row, symbols[row.instrument])
            return
        met: set[str] = set()
        for (name, _, _), message in groupby(wanted, key=attrgetter("instrument", "receive_time_ns", "extra")):
            yield from _change(list(message), symbols[name], continues=name not in met)
            met.add(name)


def is_tardis(path: Path) -> bool:
    """Whether a file begins as Tardis's do."""
    try:
        return next((line for _, line in read_lines(path)), b"").startswith(HEADER)
    except SessionError:
        return False


def _change(rows: list[_Row], symbol: _Symbol, *, continues: bool) -> Iterator[pb.MarketEvent]:
    """The events of one message about a book.

    Args:
        rows: What it says.
        symbol: What is known before it.
        continues: Whether it is the first of a file, so that a snapshot is no sign of a loss.
    """
    first = rows[0]
    is_snapshot = _FLAGS[first.extra]
    begins = is_snapshot and not symbol.is_in_snapshot
    symbol.is_in_snapshot = is_snapshot
    if not symbol.update_id and not is_snapshot:
        return
    if begins and symbol.update_id and not continues:
        reset = first.event()
        reset.reset.reason = "reconnect"
        yield reset
    symbol.update_id += 1
    event = first.event()
    if begins:
        event.snapshot.last_update_id = symbol.update_id
        body: pb.BookSnapshot | pb.BookDelta = event.snapshot
    else:
        event.delta.first_update_id = event.delta.last_update_id = symbol.update_id
        body = event.delta
    for row in rows:
        is_bid = row.side == "bid"
        (body.bid_ticks if is_bid else body.ask_ticks).append(row.ticks)
        (body.bid_lots if is_bid else body.ask_lots).append(row.lots)
    yield event


def _trade(row: _Row, symbol: _Symbol) -> pb.MarketEvent:
    own = row.extra.isascii() and row.extra.isdigit() and 0 < int(row.extra[:19]) <= wire.MAX_FIXED
    if symbol.has_own_ids is None:
        symbol.has_own_ids = own
    symbol.trade_id = int(row.extra) if own and symbol.has_own_ids else symbol.trade_id + 1
    event = row.event()
    event.trade.trade_id = symbol.trade_id
    event.trade.price_ticks = row.ticks
    event.trade.lots = row.lots
    event.trade.taker_side = _TAKER_SIDES[row.side]
    return event


def _rows(path: Path, progress: Progress | None, is_book: bool) -> Iterator[_Row]:
    """Checked rows, sorted by the time of receipt."""
    before = 0
    for number, line in _lines(path, progress):
        try:
            row = _parsed(line, is_book)
            if row.receive_time_ns < before:
                raise FeedError("local_timestamp", "is before that of the line above it")
        except (FeedError, UnicodeDecodeError) as error:
            raise SessionError(f"{path}, line {number}: {error}") from error
        before = row.receive_time_ns
        yield row


def _parsed(line: bytes, is_book: bool) -> _Row:
    fields = line.decode().rstrip("\r\n").split(",")
    if len(fields) != 8:
        raise FeedError("line", f"has {len(fields)} columns, not the 8 of its header")
    exchange, symbol, timestamp, local_timestamp, extra, side, price, amount = fields
    if not symbol or not exchange:
        raise FeedError("symbol" if exchange else "exchange", "is missing")
    if is_book and extra not in _FLAGS:
        raise FeedError("is_snapshot", f"{extra!r:.40} is neither true nor false")
    if side not in (("bid", "ask") if is_book else _TAKER_SIDES):
        raise FeedError("side", f"{side!r:.40} is not {'bid or ask' if is_book else 'buy, sell or unknown'}")
    ticks, lots = _fixed(price, "price"), _fixed(amount, "amount")
    if not ticks:
        raise FeedError("price", "must be above 0")
    if not lots and not is_book:
        raise FeedError("amount", "must be above 0")
    return _Row(
        _instrument(exchange, symbol),
        _time_ns(timestamp, "timestamp"),
        _time_ns(local_timestamp, "local_timestamp"),
        extra,
        side,
        ticks,
        lots,
        timestamp == local_timestamp,
    )


def _fixed(text: str, field: str) -> int:
    if "e" not in text:
        return wire.fixed(text, field, DECIMALS)
    # Small numbers are written as JavaScript does: 1e-7.
    try:
        return wire.number(Decimal(text), field, DECIMALS)
    except InvalidOperation as error:
        raise FeedError(field, f"{text!r:.40} is not a number") from error


def _time_ns(text: str, field: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:20]) <= _LATEST_US):
        raise FeedError(field, f"{text!r:.40} is not a time in microseconds since the epoch")
    return int(text) * 1_000


def _instrument(exchange: str, symbol: str) -> str:
    return f"{symbol.replace('/', '-')}.{_OURS.get(exchange, exchange.upper())}"


def _header(path: Path) -> bytes:
    for _, line in read_lines(path):
        header = line.rstrip(b"\r\n")
        if header in (_BOOK, _TRADES):
            return header
        break
    raise SessionError(
        f"{path}, line 1: has the columns of neither of Tardis's files that can be read, incremental_book_L2 and trades"
    )


def _lines(path: Path, progress: Progress | None) -> Iterator[tuple[int, bytes]]:
    """Without the header."""
    _header(path)
    lines = read_lines(path, progress)
    next(lines)
    return lines


def _began(path: Path) -> int:
    """When the first row was received; 0 for a file that cannot be read, which is an error when it is."""
    try:
        return next((_parsed(line, _header(path) == _BOOK).receive_time_ns for _, line in _lines(path, None)), 0)
    except (SessionError, FeedError, UnicodeDecodeError):
        return 0
