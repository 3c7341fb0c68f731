"""Raw lines of a venue: `<local receive time, ns since the Unix epoch> <message as received>`.

Binance's files hold one symbol each, with which their names begin: `btcusdt_20240808.gz`, `btcusd_perp_20240808.gz`.
The snapshot of the book is one of the lines, as the REST interface sent it. Kraken's and Coinbase's files hold any
pairs, and all are read by one feed, as what came over one connection. A REST snapshot of Coinbase's channel `full` does
not name its product: then the file's name has to begin with it, `BTC-USD_20240808.gz`.

Times decide, not names: the files may be of days or hours, or books and trades may have files of their own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Protocol

import orjson

from feature_cache.feeds import binance_streams, coinbase, kraken
from feature_cache.feeds.wire import FeedError
from feature_cache.sources.files import Progress, SessionError, in_order, read_lines
from pretrade.market.v1 import market_pb2 as pb

_MESSAGES: Final = 200
"""So many tell what a file is; the first of a venue already does, but for those that it answers to requests."""
_COIN_M_SYMBOL: Final = re.compile(r"[A-Z0-9]+USD_(PERP|[0-9]{6})", re.ASCII)
_KRAKENS: Final = frozenset({"channel", "event", "success"})
_COINBASES: Final = frozenset({"type", "product_id"})
_FULL: Final = frozenset({"received", "open", "change", "done", "activate"})

_Line = tuple[int, int, bytes, Path]
"""Receive time, number in the file, message, file."""


class _Feed(Protocol):
    def decode(self, message: bytes, receive_time_ns: int) -> list[pb.MarketEvent]: ...


class RawFiles:
    """Files of one venue that belong together.

    Args:
        venue: One of `conversation.VENUES`.
        name: What the names of Binance's files begin with, see `symbol_of`; unused for others.
        files: In any order.
    """

    def __init__(self, venue: str, name: str, files: Iterable[Path]) -> None:
        self._venue = venue
        self._name = name
        self._files = list(files)

    def instruments(self) -> set[str]:
        """What the files are about.

        Raises:
            SessionError: A file cannot be read.
        """
        if self._venue in binance_streams.VENUES:
            return {f"{self._name}.{self._venue}"}
        instrument_of = kraken.instrument_of if self._venue == kraken.VENUE else coinbase.instrument_of
        names = {name for path in self._files for _, _, message, _ in _lines(path) for name in _names(message)}
        return {instrument_of(name) for name in names}

    def events(self, only: Collection[str] | None, progress: Progress | None) -> Iterator[pb.MarketEvent]:
        """See `session.read_session`."""
        if self._venue in binance_streams.VENUES and only is not None and not self.instruments() & set(only):
            return
        feed = self._feed()
        files = sorted(((_began(path), path) for path in self._files), key=itemgetter(0))
        lines = in_order(((begins, _lines(path, progress)) for begins, path in files), itemgetter(0))
        for receive_time_ns, number, message, path in lines:
            try:
                if isinstance(feed, coinbase.CoinbaseFull) and b'"bids"' in message:
                    events = feed.snapshot(_product_of(path, number), message, receive_time_ns)
                else:
                    events = feed.decode(message, receive_time_ns)
            except FeedError as error:
                raise SessionError(f"{path}, line {number}: {error}{self._hint(error, message)}") from error
            for event in events:
                if only is None or event.instrument in only:
                    yield event

    def _feed(self) -> _Feed:
        if self._venue in binance_streams.VENUES:
            return binance_streams.BinanceStreams(self._venue, self._name)
        bodies = [body for path in self._files for body in _bodies(path)]
        if self._venue == kraken.VENUE:
            is_v2 = any(isinstance(body, dict) and ("channel" in body or "method" in body) for body in bodies)
            return kraken.KrakenV2() if is_v2 else kraken.KrakenV1()
        return coinbase.CoinbaseFull() if any(map(_is_full, bodies)) else coinbase.CoinbaseLevel2()

    def _hint(self, error: FeedError, message: bytes) -> str:
        try:
            said = _venue_of(orjson.loads(message))
        except orjson.JSONDecodeError:
            return ""
        if said not in (None, self._venue):
            return f"; it looks like a message of {said}, and was read as one of {self._venue}"
        return ", with which the file's name begins" if error.field == "s" and "expected" in error.rule else ""


def venue_of(path: Path) -> str:
    """The venue that a file's first messages are of; Binance spot where they do not tell."""
    return next((venue for body in _bodies(path) if (venue := _venue_of(body)) is not None), binance_streams.SPOT)


def symbol_of(path: Path, venue: str) -> str:
    """The symbol of Binance's with which a file's name begins, in capitals."""
    name = _first_word(path)
    if venue not in (binance_streams.USD_M, binance_streams.COIN_M):
        return name
    # `BTCUSDT_240927` may be a contract that ends then, or BTCUSDT of that day: the messages tell.
    said = (body.get("s") for body in map(_unwrapped, _bodies(path)) if body is not None)
    symbol = next((one for one in said if isinstance(one, str)), name)
    return symbol if re.match(rf"{re.escape(symbol)}(?![A-Z0-9])", path.name.upper()) else name


def _product_of(path: Path, number: int) -> str:
    """The product of a book of Coinbase's channel `full`, which does not say it: the file's name does.

    Raises:
        SessionError: The messages beside it are of other products.
    """
    product = _first_word(path)
    said = {body["product_id"] for body in _bodies(path) if isinstance(body, dict) and "product_id" in body}
    if said and product not in said:
        raise SessionError(
            f"{path}, line {number}: this book does not say its product, so that the file's name must begin with it, as"
            f" {min(map(str, said))}_… does"
        )
    return product


def _first_word(path: Path) -> str:
    return path.name.partition("_")[0].partition(".")[0].upper()


def _venue_of(body: Any) -> str | None:
    """None where a message does not tell."""
    if isinstance(body, list):
        return kraken.VENUE
    if not isinstance(body, dict):
        return None
    if _KRAKENS.intersection(body):
        return kraken.VENUE
    if _COINBASES.intersection(body):
        return coinbase.VENUE
    data = _unwrapped(body)
    return None if data is None else _binance_of(data)


def _binance_of(data: dict[str, Any]) -> str | None:
    symbol = data.get("s", data.get("symbol"))
    if isinstance(symbol, str) and _COIN_M_SYMBOL.fullmatch(symbol):
        return binance_streams.COIN_M
    kind = data.get("e")
    if (
        "pu" in data
        or kind == "bookTicker"
        or (kind in ("trade", "aggTrade") and "M" not in data)
        or ("lastUpdateId" in data and "E" in data)
    ):
        return binance_streams.USD_M
    return binance_streams.SPOT if kind is not None or "u" in data or "lastUpdateId" in data else None


def _unwrapped(body: Any) -> dict[str, Any] | None:
    data = body.get("data", body) if isinstance(body, dict) else None
    return data if isinstance(data, dict) else None


def _is_full(body: Any) -> bool:
    """Whether only the channel `full` of Coinbase has such a message."""
    return isinstance(body, dict) and (body.get("type") in _FULL or ("type" not in body and "bids" in body))


def _names(message: bytes) -> set[str]:
    """The pairs that a message of Kraken or Coinbase is about."""
    try:
        body = orjson.loads(message)
    except orjson.JSONDecodeError:
        return set()  # an error where the events are read
    if isinstance(body, list):
        return {body[-1]} if len(body) > 3 and isinstance(body[-1], str) else set()
    if not isinstance(body, dict):
        return set()
    if body.get("channel") in ("book", "trade") and isinstance(body.get("data"), list):
        return {entry["symbol"] for entry in body["data"] if isinstance(entry, dict) and "symbol" in entry}
    product = body.get("product_id")
    return {product} if isinstance(product, str) else set()


def _bodies(path: Path) -> Iterator[Any]:
    """What the first lines of a file hold, as far as it can be read: what cannot is an error where events are."""
    try:
        for (_, _, message, _), _ in zip(_lines(path), range(_MESSAGES), strict=False):
            yield orjson.loads(message)
    except (SessionError, orjson.JSONDecodeError):
        return


def _began(path: Path) -> int:
    """When the first line was received; 0 for a file that cannot be read, which is an error when it is."""
    try:
        return next((line[0] for line in _lines(path)), 0)
    except SessionError:
        return 0


def _lines(path: Path, progress: Progress | None = None) -> Iterator[_Line]:
    for number, line in read_lines(path, progress):
        receive_time, _, message = line.partition(b" ")
        if not receive_time.isdigit():
            other = " (nor is it a file of Tardis.dev, LOBSTER or the recorder)" if number == 1 else ""
            raise SessionError(f"{path}, line {number}: does not begin with the receive time, in nanoseconds{other}")
        yield int(receive_time), number, message, path
