"""Exchanges on loopback: real WebSocket and REST servers that send what the real ones document, driven by the test."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from http import HTTPStatus
from typing import Any, Final, Self
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from feature_cache.engine.book import OrderBook
from feature_cache.feeds import binance_streams
from feature_cache.sources.simulator import simulate
from pretrade.market.v1 import market_pb2 as pb

PATIENCE_SECONDS: Final = 20.0


class ExchangeServer:
    """What every exchange has: connections with their subscriptions, and a REST interface on the same port."""

    def __init__(self) -> None:
        self.connections: set[ServerConnection] = set()
        self.accepted = 0
        """Connections that ever stood."""
        self.requests: list[dict[str, Any]] = []
        """What was received on them."""
        self.rest_requests: list[str] = []
        self.refusals: deque[tuple[HTTPStatus, dict[str, str]]] = deque()
        """Answers with which the next REST requests are refused."""
        self.rest_seconds = 0.0
        """How long an answer of the REST interface takes."""
        self._changed = asyncio.Condition()
        self._server: Server | None = None

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = next(iter(self._server.sockets)).getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def rest_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        async with serve(self._talk, "127.0.0.1", 0, process_request=self._process, close_timeout=1) as self._server:
            yield self

    async def drop(self) -> None:
        """Closes every connection, as exchanges do once a day."""
        for connection in list(self.connections):
            await connection.close(1001)

    async def until(self, count: int, what: str = "requests") -> None:
        """Waits until that many of `requests`, `rest_requests` or `accepted` were seen."""
        async with asyncio.timeout(PATIENCE_SECONDS), self._changed:
            await self._changed.wait_for(lambda: self._count(what) >= count)

    def _count(self, what: str) -> int:
        value = getattr(self, what)
        return value if isinstance(value, int) else len(value)

    async def _talk(self, connection: ServerConnection) -> None:
        self.connections.add(connection)
        self.accepted += 1
        try:
            async for message in connection:
                request = json.loads(message)
                await self.hear(connection, request)
                async with self._changed:
                    self.requests.append(request)
                    self._changed.notify_all()
        except ConnectionClosed:
            pass
        finally:
            self.connections.discard(connection)

    async def _process(self, connection: ServerConnection, request: Request) -> Response | None:
        if "Upgrade" in request.headers:
            return None
        async with self._changed:
            self.rest_requests.append(request.path)
            self._changed.notify_all()
        await asyncio.sleep(self.rest_seconds)
        status, headers = self.refusals.popleft() if self.refusals else (HTTPStatus.OK, {})
        body = b"" if status is not HTTPStatus.OK else json.dumps(self.rest(request.path)).encode()
        fields = {"Content-Length": str(len(body)), "Connection": "close", **headers}
        return Response(status.value, status.phrase, Headers(fields), body)

    async def hear(self, connection: ServerConnection, request: dict[str, Any]) -> None:
        """Answers a request."""
        raise NotImplementedError

    def rest(self, path: str) -> Any:
        """Answers a request of the REST interface."""
        raise NotImplementedError


class BinanceServer(ExchangeServer):
    """A simulated market in Binance's messages; `play` lets it go on.

    Args:
        venue: One of `binance_streams.VENUES`.
        symbols: For example `BTCUSDT`.
        seconds: How long the market lasts.
    """

    def __init__(self, venue: str, symbols: Iterable[str], seconds: float = 60.0) -> None:
        super().__init__()
        self._venue = venue
        names = [f"{symbol}.SIM" for symbol in symbols]
        self._events = simulate(1, names, duration_seconds=seconds)
        self._subscriptions: dict[ServerConnection, set[str]] = {}
        self._last_ids: dict[str, int] = {}
        self.books = {name.partition(".")[0]: OrderBook() for name in names}
        """What the books really are, by symbol."""

    async def hear(self, connection: ServerConnection, request: dict[str, Any]) -> None:
        self._subscriptions.setdefault(connection, set()).update(request["params"])
        await connection.send(json.dumps({"result": None, "id": request["id"]}))

    async def play(self, count: int, lose: str | None = None, garbage: str | None = None) -> None:
        """Sends the next messages to whoever subscribed to them.

        Args:
            count: How many events of the market.
            lose: A kind of message whose next one reaches nobody.
            garbage: Sent instead of the next depth update.
        """
        for _ in range(count):
            event = next(self._events)
            kind = event.WhichOneof("event")
            assert kind is not None
            book = self.books[event.instrument.partition(".")[0]]
            if kind == "snapshot":
                if not book.valid:
                    book.apply_snapshot(event.snapshot)
                continue
            if kind == "delta":
                book.apply_delta(event.delta)
            stream, body = self._message(event, kind)
            if kind == lose:
                lose = None
                continue
            text = json.dumps({"stream": stream, "data": body})
            if garbage is not None and kind == "trade":
                text, garbage = garbage, None
            for connection, streams in list(self._subscriptions.items()):
                if stream in streams and connection in self.connections:
                    await connection.send(text)

    def rest(self, path: str) -> Any:
        symbol = parse_qs(urlsplit(path).query)["symbol"][0]
        book = self.books[symbol].to_snapshot()
        body = {
            "lastUpdateId": book.last_update_id,
            "bids": _pairs(book.bid_ticks, book.bid_lots),
            "asks": _pairs(book.ask_ticks, book.ask_lots),
        }
        return body if self._venue == binance_streams.SPOT else {**body, "E": 1_700_000_000_000, "T": 1_700_000_000_000}

    def _message(self, event: pb.MarketEvent, kind: str) -> tuple[str, dict[str, Any]]:
        symbol = event.instrument.partition(".")[0]
        body: dict[str, Any] = {"s": symbol, "E": event.event_time_ns // 1_000_000}
        if kind == "delta":
            delta = event.delta
            body |= {"e": "depthUpdate", "U": delta.first_update_id, "u": delta.last_update_id}
            body |= {"b": _pairs(delta.bid_ticks, delta.bid_lots), "a": _pairs(delta.ask_ticks, delta.ask_lots)}
            if self._venue != binance_streams.SPOT:
                body["pu"] = self._last_ids.get(symbol, delta.first_update_id - 1)
                self._last_ids[symbol] = delta.last_update_id
            return f"{symbol.lower()}@depth@100ms", body
        if kind == "quote":
            quote = event.quote
            body |= {"u": quote.update_id, "b": _text(quote.bid_ticks), "B": _text(quote.bid_lots)}
            body |= {"a": _text(quote.ask_ticks), "A": _text(quote.ask_lots)}
            if self._venue == binance_streams.SPOT:
                del body["E"]
            else:
                body["e"] = "bookTicker"
            return f"{symbol.lower()}@bookTicker", body
        trade = event.trade
        body |= {"e": "aggTrade", "p": _text(trade.price_ticks), "q": _text(trade.lots), "a": trade.trade_id}
        body |= {"f": trade.trade_id, "l": trade.trade_id, "m": trade.taker_side == pb.TAKER_SIDE_SELL}
        return f"{symbol.lower()}@aggTrade", body


class KrakenServer(ExchangeServer):
    """Kraken's v2 protocol with books of ten levels; `update` changes a bid.

    Args:
        pairs: For example `BTC/USD`.
    """

    def __init__(self, pairs: Iterable[str]) -> None:
        super().__init__()
        self.bids = {
            pair: {Decimal(f"{100 - level}.0"): Decimal("1.50000000") for level in range(12)} for pair in pairs
        }
        self.answer_subscriptions = True
        """Whether a subscription to a book is answered with its snapshot."""
        self._asks = {Decimal(101 + level): Decimal(2) for level in range(12)}

    @property
    def url(self) -> str:
        return f"{super().url}/v2"

    async def hear(self, connection: ServerConnection, request: dict[str, Any]) -> None:
        method, params = request["method"], request["params"]
        channel = params["channel"]
        for pair in params.get("symbol", [None]):
            result = {"channel": channel, "symbol": pair, "depth": 100}
            await _send(connection, {"method": method, "result": result, "success": True})
            if method == "subscribe" and channel == "book" and self.answer_subscriptions:
                bids, asks = self.bids[pair], self._asks
                await _send(connection, self._book("snapshot", pair, bids, asks))
        if channel == "instrument":
            decimals = [{"symbol": pair, "price_precision": 1, "qty_precision": 8} for pair in self.bids]
            await _send(connection, {"channel": channel, "type": "snapshot", "data": {"assets": [], "pairs": decimals}})

    async def update(self, pair: str, price: str, size: str, *, wrong: bool = False, lost: bool = False) -> None:
        """Sets a bid and sends it, with a wrong checksum or not at all if so wished."""
        self.bids[pair][Decimal(price)] = Decimal(size)
        message = self._book("update", pair, {Decimal(price): Decimal(size)}, {}, wrong)
        for connection in list(self.connections):
            if not lost:
                await _send(connection, message)

    def _book(self, kind: str, pair: str, bids: Any, asks: Any, wrong: bool = False) -> dict[str, Any]:
        sides = {"bids": bids, "asks": asks}
        levels = {name: [{"price": p, "qty": q} for p, q in side.items()] for name, side in sides.items()}
        entry = {"symbol": pair, **levels, "checksum": self._checksum(pair) ^ wrong}
        if kind == "update":
            entry["timestamp"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {"channel": "book", "type": kind, "data": [entry]}

    def _checksum(self, pair: str) -> int:
        digits = ""
        for side, descending in ((self._asks, False), (self.bids[pair], True)):
            for price in sorted((price for price in side if side[price]), reverse=descending)[:10]:
                digits += f"{price:.1f}".replace(".", "").lstrip("0") + f"{side[price]:.8f}".replace(".", "").lstrip(
                    "0"
                )
        return zlib.crc32(digits.encode())


class CoinbaseServer(ExchangeServer):
    """Coinbase Exchange's `level2_batch` and `full` of one product with one order a side; `bid` places an order."""

    product = "BTC-USD"

    def __init__(self) -> None:
        super().__init__()
        self.orders = {"b-0": ("buy", "100.00", "1.0"), "a-0": ("sell", "101.00", "2.0")}
        self.sequence = 1000

    async def hear(self, connection: ServerConnection, request: dict[str, Any]) -> None:
        if request["type"] == "subscribe" and "level2_batch" in request["channels"]:
            await _send(
                connection, {"type": "snapshot", "product_id": self.product, **self._levels(), "time": self._now}
            )

    async def bid(self, price: str, size: str, *, lost: bool = False) -> None:
        self.sequence += 1
        order = f"o-{self.sequence}"
        self.orders[order] = ("buy", price, size)
        fields = {"product_id": self.product, "time": self._now}
        message = {"type": "l2update", "changes": [["buy", price, size]], **fields}
        opened = {"type": "open", "sequence": self.sequence, "order_id": order, "side": "buy", "price": price}
        for connection in list(self.connections):
            if not lost:
                full = any("full" in request["channels"] for request in self.requests)
                await _send(connection, {**opened, "remaining_size": size, **fields} if full else message)

    def rest(self, path: str) -> Any:
        sides = {"bids": "buy", "asks": "sell"}
        orders = {
            name: [[price, size, key] for key, (of, price, size) in self.orders.items() if of == side]
            for name, side in sides.items()
        }
        return {"sequence": self.sequence, **orders}

    def _levels(self) -> dict[str, Any]:
        orders = self.orders.values()
        return {
            "bids": [[price, size] for side, price, size in orders if side == "buy"],
            "asks": [[price, size] for side, price, size in orders if side == "sell"],
        }

    @property
    def _now(self) -> str:
        return f"2026-01-02T03:04:{self.sequence % 60:02}.000000Z"


async def _send(connection: ServerConnection, body: dict[str, Any]) -> None:
    # Kraken's numbers keep the decimals with which they are written.
    await connection.send(json.dumps(body, default=float))


def _text(value: int) -> str:
    return f"{Decimal(value).scaleb(-8):f}"


def _pairs(ticks: Iterable[int], lots: Iterable[int]) -> list[list[str]]:
    return [[_text(price), _text(size)] for price, size in zip(ticks, lots, strict=True)]


class RecordedServer(ExchangeServer):
    """Plays what an exchange once sent to whoever subscribes first, as fast as it is taken.

    Args:
        messages: As they were received.
        snapshot: The answer of the REST interface.
    """

    def __init__(self, messages: Iterable[bytes], snapshot: Any = None) -> None:
        super().__init__()
        self._messages = messages
        self._snapshot = snapshot

    async def hear(self, connection: ServerConnection, request: dict[str, Any]) -> None:
        messages, self._messages = self._messages, ()
        for message in messages:
            await connection.send(message, text=True)

    def rest(self, path: str) -> Any:
        return self._snapshot
