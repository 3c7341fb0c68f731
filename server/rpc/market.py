"""What people look at of a market and no decision needs.

Bars are in the database that the keeper of bars writes, books in Redis, where feature workers publish them.
"""

from __future__ import annotations

from typing import Final

import structlog
from redis.exceptions import RedisError

from feature_cache.store.books import BookReader, Level, PublishedBook
from pretrade.admin.v1 import admin_pb2 as pb
from server.audit.reading.reading import Question, Reading
from server.errors import BarsUnavailableError, InvalidRequestError
from server.rpc.feature_status import BOOKS
from server.rpc.instruments import check_followed

_log = structlog.get_logger(__name__)

MOST_LEVELS: Final = 100
_NO_BOOK: Final = (
    "No feature worker publishes this book. A worker that has the instrument does, unless "
    "PRETRADE_WORKER_BOOK_LEVELS is 0."
)
_NO_REDIS: Final = "Redis, where feature workers publish books, does not answer."


class MarketReading:
    """Answers `AdminService.ListBars` and `AdminService.GetBook`.

    Args:
        instruments: Those that the server follows.
        bars: Answers which bars there are, in a process of its own.
        books: Reads books from Redis.
    """

    def __init__(self, instruments: tuple[str, ...], bars: Reading, books: BookReader) -> None:
        self._instruments = instruments
        self._bars = bars
        self._books = books
        self.without_bars = 0
        """Calls that were refused because the database of bars could not be read."""
        self.without_books = 0
        """Answers without a book because Redis was away."""

    async def bars(self, request: pb.ListBarsRequest) -> pb.ListBarsResponse:
        """One page of an instrument's bars.

        Raises:
            UnknownInstrumentError: The server does not follow it.
            InvalidRequestError: A field breaks a rule.
            BarsUnavailableError, AuditBusyError: They cannot be read now.
        """
        check_followed("instrument", request.instrument, self._instruments)
        try:
            answer = await self._bars.ask(Question.BARS, request.SerializeToString())
        except BarsUnavailableError as error:
            self.without_bars += 1
            _log.warning("bars cannot be read", problem=str(error))
            raise
        return pb.ListBarsResponse.FromString(answer)

    async def book(self, request: pb.GetBookRequest) -> pb.GetBookResponse:
        """The best levels of an instrument's book, or why there is none.

        Raises:
            UnknownInstrumentError: The server does not follow it.
            InvalidRequestError: A field breaks a rule.
        """
        check_followed("instrument", request.instrument, self._instruments)
        if request.levels > MOST_LEVELS:
            raise InvalidRequestError(f"levels: must be 1 to {MOST_LEVELS}; 0 for all that are published")
        response = pb.GetBookResponse(instrument=request.instrument, problem=_NO_BOOK)
        try:
            book = await self._books.read(request.instrument)
        except (RedisError, OSError) as error:
            self.without_books += 1
            _log.warning("books cannot be read", problem=repr(error))
            response.problem = _NO_REDIS
            return response
        if book is not None:
            _add(response, book, request.levels or MOST_LEVELS)
        return response


def _add(response: pb.GetBookResponse, book: PublishedBook, levels: int) -> None:
    response.book = BOOKS[book.state]
    response.problem = f"The book is unknown: {book.unknown_because}." if book.unknown_because else ""
    response.bids.extend(map(_level, book.bids[:levels]))
    response.asks.extend(map(_level, book.asks[:levels]))
    response.event_time.FromNanoseconds(book.event_time_ns)
    response.published_at.FromNanoseconds(book.written_ns)


def _level(level: Level) -> pb.BookLevel:
    price, size = level
    return pb.BookLevel(price=price, size=size)
