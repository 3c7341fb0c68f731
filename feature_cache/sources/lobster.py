"""LOBSTER's reconstructed NASDAQ books as market events: a file of messages and one of book states, line by line.

    AAPL_2012-06-21_34200000_57600000_message_10.csv     time, type, order id, size, price, direction
    AAPL_2012-06-21_34200000_57600000_orderbook_10.csv   ask price, ask size, bid price, bid size, … per level

Ticker and day are those of the name. Times are seconds after midnight in New York, prices dollars times 10,000, sizes
shares. Line k of the book file is the book after message k, as deep as was asked for: that is what our book is at every
line. A level that a better one pushes out of sight is removed, since nobody says what becomes of it. Places without a
level have the size 0.

| type | message | events |
|---|---|---|
| 1, 2, 3 | order submitted, reduced, deleted | the change of the book |
| 4 | visible order executed | a trade, and the change of the book |
| 5 | hidden order executed | a trade |
| 6 | cross trade, as in an auction | a trade in which nobody took |
| 7 | halt (price -1), quotes resume (0), trading resumes (1) | a reset; nothing; a snapshot |

The direction is that of the resting order (1 buy, -1 sell), so the taker is on the other side. While trading is halted
the book is unknown, whatever the file shows. It is reset after the last line, too, since the next day begins elsewhere.
There is no time of receipt: it is that of the event.

Source: LOBSTER, "Data structure", and the readme of the sample files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from feature_cache.engine.book import CLOSED
from feature_cache.feeds import wire
from feature_cache.feeds.wire import FeedError
from feature_cache.sources.files import Progress, SessionError, in_order, read_lines
from pretrade.market.v1 import market_pb2 as pb

VENUE: Final = "NASDAQ"
PRICE_DECIMALS: Final = 4

_NAME: Final = re.compile(
    r"(?P<ticker>[A-Z0-9-]+)_(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})_[0-9]+_[0-9]+_(?P<kind>message|orderbook)_[0-9]+\.csv"
    r"(?:\.gz)?"
)
_TRADES: Final = (4, 5, 6)
_HALT: Final = 7
_TAKER_SIDES: Final = {1: pb.TAKER_SIDE_SELL, -1: pb.TAKER_SIDE_BUY}
_NO_LEVEL: Final = 9_999_999_999
_COLUMNS: Final = (6, 7)
"""Of a message; newer files also say who made the order."""

_Levels = dict[int, int]


class _Message(NamedTuple):
    time_ns: int
    """Since midnight."""
    type: int
    size: int
    price: int
    direction: int


@dataclass(slots=True)
class _Ticker:
    """What was published of one ticker, over all days."""

    instrument: str
    update_id: int = 0
    trade_id: int = 0
    is_known: bool = False
    is_halted: bool = False
    bids: _Levels = field(default_factory=dict)
    asks: _Levels = field(default_factory=dict)


class LobsterFiles:
    """Pairs of files of any tickers and days.

    Args:
        files: In any order.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)

    def instruments(self) -> set[str]:
        """What the files are about.

        Raises:
            SessionError: A file is not called as LOBSTER does, or one of a pair is missing.
        """
        return {_instrument(messages) for messages, _ in self._pairs()}

    def events(self, only: Collection[str] | None, progress: Progress | None) -> Iterator[pb.MarketEvent]:
        """See `session.read_session`."""
        tickers: dict[str, _Ticker] = {}
        sources = []
        for messages, books in self._pairs():
            instrument = _instrument(messages)
            if only is None or instrument in only:
                ticker = tickers.setdefault(instrument, _Ticker(instrument))
                midnight_ns = _midnight_ns(messages)
                sources.append((midnight_ns, _events(messages, books, ticker, midnight_ns, progress)))
        return in_order(sources, attrgetter("receive_time_ns"))

    def _pairs(self) -> list[tuple[Path, Path]]:
        """Files of messages with those of the books, by day."""
        found: Mapping[tuple[str, Path], dict[str, Path]] = defaultdict(dict)
        for path in self._files:
            named = _named(path)
            other = path.with_name(path.name.replace(f"_{named['kind']}_", "_*_").removesuffix(".gz"))
            found[named["day"], other][named["kind"]] = path
        for pair in found.values():
            for kind, has in (("message", "orderbook"), ("orderbook", "message")):
                if kind not in pair:
                    raise SessionError(f"{pair[has]}: its {kind} file is missing, whose name only differs in that word")
        return [(pair["message"], pair["orderbook"]) for _, pair in sorted(found.items())]


def is_lobster(path: Path) -> bool:
    """Whether a file is called as LOBSTER's are."""
    return _NAME.fullmatch(path.name) is not None


def _events(
    messages: Path, books: Path, ticker: _Ticker, midnight_ns: int, progress: Progress | None
) -> Iterator[pb.MarketEvent]:
    """The events of one day."""
    before = midnight_ns
    shown = b""
    ticker.is_halted = False
    for message_line, book_line in zip_longest(read_lines(messages, progress), read_lines(books, progress)):
        if message_line is None or book_line is None:
            raise SessionError(_shorter(messages, books, message_line is None))
        number, text = message_line
        try:
            message = _message(text)
            time_ns = midnight_ns + message.time_ns
            if time_ns < before:
                raise FeedError("time", "is before that of the line above it")
        except (FeedError, UnicodeDecodeError) as error:
            raise SessionError(f"{messages}, line {number}: {error}") from error
        before = time_ns
        yield from _said(message, ticker, time_ns)
        if ticker.is_halted or (ticker.is_known and book_line[1] == shown):
            continue
        shown = book_line[1]
        try:
            asks, bids = _levels(shown)
        except (FeedError, UnicodeDecodeError) as error:
            raise SessionError(f"{books}, line {book_line[0]}: {error}") from error
        yield from _change(ticker, bids, asks, time_ns)
    if ticker.is_known:
        ticker.is_known = False
        yield _reset(ticker, CLOSED, before)


def _said(message: _Message, ticker: _Ticker, time_ns: int) -> Iterator[pb.MarketEvent]:
    """What a message says by itself: a trade, or a halt."""
    if message.type in _TRADES:
        ticker.trade_id += 1
        event = _event(ticker, time_ns)
        event.trade.trade_id = ticker.trade_id
        event.trade.price_ticks = message.price
        event.trade.lots = message.size
        if message.type != 6:
            event.trade.taker_side = _TAKER_SIDES[message.direction]
        yield event
    elif message.type == _HALT and message.price == -1:
        ticker.is_halted, ticker.is_known = True, False
        yield _reset(ticker, "halt", time_ns)
    elif message.type == _HALT and message.price == 1:
        ticker.is_halted = False


def _change(ticker: _Ticker, bids: _Levels, asks: _Levels, time_ns: int) -> Iterator[pb.MarketEvent]:
    """The book as it is now, or how it differs from before."""
    event = _event(ticker, time_ns)
    if ticker.is_known:
        changed_bids, changed_asks = _changes(ticker.bids, bids), _changes(ticker.asks, asks)
        if not changed_bids and not changed_asks:
            return
        ticker.update_id += 1
        event.delta.first_update_id = event.delta.last_update_id = ticker.update_id
        body: pb.BookSnapshot | pb.BookDelta = event.delta
    else:
        changed_bids, changed_asks = bids, asks
        ticker.update_id += 1
        event.snapshot.last_update_id = ticker.update_id
        body = event.snapshot
    body.bid_ticks.extend(changed_bids)
    body.bid_lots.extend(changed_bids.values())
    body.ask_ticks.extend(changed_asks)
    body.ask_lots.extend(changed_asks.values())
    ticker.bids, ticker.asks, ticker.is_known = bids, asks, True
    yield event


def _changes(before: _Levels, now: _Levels) -> _Levels:
    gone = {price: 0 for price in before if price not in now}
    return gone | {price: size for price, size in now.items() if before.get(price) != size}


def _event(ticker: _Ticker, time_ns: int) -> pb.MarketEvent:
    event = wire.new_event(ticker.instrument, PRICE_DECIMALS, 0, time_ns)
    event.event_time_ns = time_ns
    return event


def _reset(ticker: _Ticker, reason: str, time_ns: int) -> pb.MarketEvent:
    event = _event(ticker, time_ns)
    event.reset.reason = reason
    return event


def _message(text: bytes) -> _Message:
    fields = text.decode().strip().split(",")
    if len(fields) not in _COLUMNS:
        raise FeedError("line", f"has {len(fields)} columns, not the 6 or 7 of a message")
    time_ns = wire.epoch_seconds_ns(fields[0], "time")
    kind, size, price, direction = (
        _whole(fields[i], name) for i, name in ((1, "type"), (3, "size"), (4, "price"), (5, "direction"))
    )
    if not 1 <= kind <= _HALT:
        raise FeedError("type", f"{kind} is not from 1 to 7")
    if kind == _HALT and price not in (-1, 0, 1):
        raise FeedError("price", f"{price} is not -1, 0 or 1, as that of a halt is")
    if kind in _TRADES and not (price > 0 and size > 0):
        raise FeedError("size" if price > 0 else "price", "must be above 0")
    if kind in _TRADES and kind != 6 and direction not in _TAKER_SIDES:
        raise FeedError("direction", f"{direction} is neither 1 nor -1")
    return _Message(time_ns, kind, size, price, direction)


def _levels(text: bytes) -> tuple[_Levels, _Levels]:
    """Sizes of asks and bids by price."""
    fields = text.decode().strip().split(",")
    if len(fields) % 4:
        raise FeedError("line", f"has {len(fields)} columns, not four for each level")
    numbers = [_whole(one, f"column {column}") for column, one in enumerate(fields, start=1)]
    sides: tuple[_Levels, _Levels] = ({}, {})
    for column in range(0, len(numbers), 2):
        price, size = numbers[column : column + 2]
        if abs(price) == _NO_LEVEL or not size:
            continue
        if price <= 0 or size < 0:
            raise FeedError(f"column {column + 1}", f"{price}, {size} is no price and size of a level")
        sides[column // 2 % 2][price] = size
    return sides


def _whole(text: str, field: str) -> int:
    digits = text.strip().removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
        raise FeedError(field, f"{text!r:.40} is not a whole number")
    return int(text)


def _named(path: Path) -> re.Match[str]:
    named = _NAME.fullmatch(path.name)
    if named is None:
        raise SessionError(
            f"{path}: ticker and day stand in the name of a file of LOBSTER, as in"
            " AAPL_2012-06-21_34200000_57600000_message_10.csv"
        )
    return named


def _instrument(path: Path) -> str:
    return f"{_named(path)['ticker']}.{VENUE}"


def _midnight_ns(path: Path) -> int:
    day = _named(path)["day"]
    try:
        midnight = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo("America/New_York"))
    except ValueError as error:
        raise SessionError(f"{path}: {day} is no day") from error
    except ZoneInfoNotFoundError as error:
        raise SessionError("the time of New York is not known here: install the package tzdata") from error
    return int((midnight - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * 10**9


def _shorter(messages: Path, books: Path, is_messages: bool) -> str:
    shorter, longer = (messages, books) if is_messages else (books, messages)
    return f"{shorter}: ends before {longer.name}; line k of one belongs to line k of the other"
