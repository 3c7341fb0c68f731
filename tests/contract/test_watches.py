"""What is watched over HTTP, on a real port whose servicer says what the test wants."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import pytest
import websockets
from structlog.testing import capture_logs
from websockets.asyncio.client import ClientConnection

from pretrade.admin.v1 import admin_pb2 as pb
from server.decision.metrics import DecisionMetrics
from server.errors import InternalError, PretradeError, TooManyWatchersError, UnauthenticatedError
from server.http.application import HttpApplication, Limits, Page, Question, Reply
from server.http.asgi import Lateness
from server.http.events import SUBPROTOCOL
from server.http.methods import PATHS, Method
from server.http.port import HttpPort
from server.rpc.call import Call
from server.rpc.events import Event

_METHOD: Final = "/pretrade.admin.v1.AdminService/WatchFeatures"
_PATH: Final = PATHS[_METHOD][0].path
_PATIENCE_SECONDS: Final = 30.0
_TURNS: Final = 2_000
"""Of the event loop. The port could go on in each of them, as the system's buffers have what is sent at once."""
_LARGE: Final = Event("1", json.dumps("x" * 100_000).encode())


class NoDelivery:
    """Nobody asks what became of answers."""

    def sent(self, answer: object) -> None:
        raise AssertionError

    def not_sent(self, answer: object) -> None:
        raise AssertionError


@dataclass
class Watched:
    """A servicer that is told what to answer."""

    pieces: asyncio.Queue[Sequence[Event] | Exception] = field(default_factory=asyncio.Queue)
    requests: list[pb.WatchFeaturesRequest] = field(default_factory=list)
    refusal: PretradeError | None = None
    flood: Event | None = None
    """What is said again and again."""
    watching: int = 0
    written: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def watch(self, request: pb.WatchFeaturesRequest, call: Call) -> AsyncGenerator[Sequence[Event]]:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        self.watching += 1
        try:
            await call.accept()
            while True:
                piece = (self.flood,) if self.flood else await self.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                self.written += 1
        finally:
            self.watching -= 1
            self.left.set()

    def say(self, cursor: str, text: str) -> None:
        self.pieces.put_nowait((Event(cursor, json.dumps(text).encode()),))


@dataclass
class Served:
    """The port."""

    at: str
    port: HttpPort
    watched: Watched
    metrics: DecisionMetrics

    @property
    def web(self) -> str:
        return f"http://{self.at}{_PATH}"

    @property
    def socket(self) -> str:
        return f"ws://{self.at}{_PATH}"


async def page(_: Question) -> Reply:
    return Reply(b"{}")


@asynccontextmanager
async def served(ping_seconds: float = 15.0, **limits: Any) -> AsyncIterator[Served]:
    watched, metrics = Watched(), DecisionMetrics()
    method = Method(
        name=_METHOD,
        request=pb.WatchFeaturesRequest,
        response=pb.WatchFeaturesResponse,
        serialize=None,
        takes_bytes=False,
        answer=None,
        watch=watched.watch,
    )
    application = HttpApplication(
        [(path, method) for path in PATHS[_METHOD]],
        {"/page": Page(page)},
        {_METHOD.rpartition("/")[0]: None},
        Limits(max_message_bytes=65_536, read_seconds=5.0, **limits),
        Lateness(metrics, time.monotonic, time.time, lambda _: None),
        NoDelivery(),
        metrics,
    )
    port = HttpPort(application, time.monotonic, None, ping_seconds)
    opened, number = port.bind("127.0.0.1", 0, is_shared=False)
    running = asyncio.create_task(port.run(opened))
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            yield Served(f"127.0.0.1:{number}", port, watched, metrics)
            await port.refuse(0.0)
            await running
    finally:
        running.cancel()


@asynccontextmanager
async def reading(server: Served, **headers: str) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a watch by server-sent events."""
    async with (
        httpx.AsyncClient(timeout=_PATIENCE_SECONDS) as client,
        client.stream("GET", server.web, headers=headers) as answer,
    ):
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
        lines = answer.aiter_lines()
        assert [await anext(lines), await anext(lines)] == ["retry: 1000", ""]
        yield lines


async def error_of(lines: AsyncIterator[str]) -> dict[str, Any]:
    """The problem that a watch ends with, which has nothing after it."""
    assert await anext(lines) == "event: error"
    problem: dict[str, Any] = json.loads((await anext(lines)).removeprefix("data: "))
    assert [line async for line in lines] == [""]
    return problem


async def closed(connection: ClientConnection) -> tuple[int, str, dict[str, Any]]:
    """Code and reason with which a watch is closed, and the problem before that."""
    problem: dict[str, Any] = json.loads(await connection.recv())["error"]
    with pytest.raises(websockets.ConnectionClosed) as ended:
        await connection.recv()
    assert ended.value.rcvd is not None
    return ended.value.rcvd.code, ended.value.rcvd.reason, problem


async def read_all(connection: ClientConnection) -> None:
    """Reads until it is closed."""
    while True:
        await connection.recv()


def silent(at: str, request: bytes, receive_bytes: int = 4_096) -> socket.socket:
    """A caller that has sent a request and reads nothing of the answer."""
    host, _, port = at.partition(":")
    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    caller.connect((host, int(port)))
    caller.sendall(request)
    caller.setblocking(False)
    return caller


_STREAM: Final = f"GET {_PATH} HTTP/1.1\r\nhost: here\r\n\r\n".encode()
_UPGRADE: Final = (
    f"GET {_PATH} HTTP/1.1\r\nhost: here\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
).encode()


async def read_to_the_end(caller: socket.socket) -> bytes:
    """What a caller can read until its connection has ended, in whatever way."""
    read = b""
    with caller:
        while True:
            try:
                piece = await asyncio.get_running_loop().sock_recv(caller, 65_536)
            except ConnectionResetError:
                return read
            if not piece:
                return read
            read += piece


async def test_events_come_with_the_place_to_go_on_and_all_that_are_there_at_once() -> None:
    async with served() as server:
        server.watched.pieces.put_nowait((Event("a:1", b'{"n":1}'), Event("a:2", b'{"n":2}')))
        async with reading(server) as lines:
            told = [await anext(lines) for _ in range(6)]
        assert told == ["id: a:1", 'data: {"n":1}', "", "id: a:2", 'data: {"n":2}', ""]
        await server.watched.left.wait()
        server.watched.pieces.put_nowait((Event("a:1", b'{"n":1}'), Event("a:2", b'{"n":2}')))
        async with websockets.connect(server.socket) as connection:
            assert [await connection.recv(), await connection.recv()] == ['{"n":1}', '{"n":2}']
        assert server.watched.watching == 0
        assert not server.metrics.errors["INTERNAL"]


async def test_the_last_event_that_was_seen_counts_more_than_the_cursor_of_the_url() -> None:
    async with served() as server:
        async with httpx.AsyncClient() as client, client.stream("GET", f"{server.web}?cursor=1&interval=0.5s"):
            pass
        async with (
            httpx.AsyncClient() as client,
            client.stream("GET", f"{server.web}?cursor=1", headers={"last-event-id": "2"}),
        ):
            pass
        async with websockets.connect(f"{server.socket}?cursor=3"):
            pass
        first, second, third = server.watched.requests
        assert [first.cursor, second.cursor, third.cursor] == ["1", "2", "3"]
        assert first.interval.ToMilliseconds() == 500


async def test_a_silent_watch_has_comments() -> None:
    async with served(beat_seconds=0.05) as server, reading(server) as lines:
        assert [await anext(lines) for _ in range(4)] == [":", "", ":", ""]
        server.watched.say("1", "news")
        while (line := await anext(lines)) in (":", ""):
            pass
        assert line == "id: 1"


@pytest.mark.parametrize("request_", [_STREAM, _UPGRADE], ids=["events", "websocket"])
async def test_who_does_not_read_loses_the_watch_and_the_connection(request_: bytes) -> None:
    with capture_logs() as lines:
        async with served(write_seconds=0.2) as server:
            server.watched.flood = _LARGE
            caller = silent(server.at, request_)
            await server.watched.left.wait()
            assert await read_to_the_end(caller)
            assert server.metrics.errors["SLOW_READER"] == 1
    assert [line["watch"] for line in lines if line["event"] == "a watcher does not read"] == [_METHOD]


async def test_who_does_not_read_a_heartbeat_loses_the_watch() -> None:
    async with served(write_seconds=0.2, beat_seconds=0.01) as server:
        caller = silent(server.at, _STREAM)
        # It is written at once, is more than the system's buffers hold, and has no event after it.
        server.watched.say("1", "x" * 30_000_000)
        await server.watched.left.wait()
        caller.close()
        assert server.metrics.errors["SLOW_READER"] == 1


async def test_a_slow_reader_that_reads_keeps_the_watch() -> None:
    async with served(write_seconds=10.0) as server:
        caller = silent(server.at, _STREAM)
        server.watched.flood = _LARGE
        read = 0
        while read < 3_000_000:
            read += len(await asyncio.get_running_loop().sock_recv(caller, 4_096))
        assert server.watched.watching == 1
        caller.close()
        await server.watched.left.wait()
        assert not server.metrics.errors["SLOW_READER"]


async def test_a_server_that_stops_ends_what_is_watched_at_once() -> None:
    async with served() as server:
        async with reading(server) as lines, websockets.connect(server.socket) as connection:
            stopping = asyncio.create_task(server.port.refuse(10 * _PATIENCE_SECONDS))
            assert (await error_of(lines))["reason"] == "DRAINING"
            code, reason, problem = await closed(connection)
            assert (code, reason, problem["status"]) == (1012, "DRAINING", 503)
        await stopping
        assert server.metrics.errors["DRAINING"] == 2


@pytest.mark.parametrize("request_", [_STREAM, _UPGRADE], ids=["events", "websocket"])
async def test_nobody_who_does_not_read_holds_up_a_server_that_stops(request_: bytes) -> None:
    async with served() as server:
        server.watched.flood = _LARGE
        caller = silent(server.at, request_)
        written, stalled = 0, 0
        while not written or stalled < _TURNS:
            stalled = stalled + 1 if server.watched.written == written else 0
            written = server.watched.written
            await asyncio.sleep(0)
        await server.port.refuse(10 * _PATIENCE_SECONDS)
        caller.close()


async def test_a_watch_ends_at_its_deadline() -> None:
    async with served() as server:
        async with reading(server, **{"grpc-timeout": "100m"}) as lines:
            assert (await error_of(lines))["reason"] == "DEADLINE_EXCEEDED"
        async with websockets.connect(server.socket, additional_headers={"grpc-timeout": "100m"}) as connection:
            code, reason, _ = await closed(connection)
            assert (code, reason) == (1000, "DEADLINE_EXCEEDED")


@pytest.mark.parametrize(
    ("raised", "reason", "code"),
    [
        (UnauthenticatedError("TOKEN_EXPIRED", "the token has expired"), "TOKEN_EXPIRED", 1008),
        (TooManyWatchersError(64), "TOO_MANY_WATCHERS", 1013),
        (InternalError("a fault"), "INTERNAL", 1011),
        (ZeroDivisionError("secret"), "INTERNAL", 1011),
    ],
)
async def test_what_ends_a_watch_is_its_last_event(raised: Exception, reason: str, code: int) -> None:
    async with served() as server:
        for _ in range(2):
            server.watched.pieces.put_nowait(raised)
        async with reading(server) as lines:
            problem = await error_of(lines)
        async with websockets.connect(server.socket) as connection:
            assert await closed(connection) == (code, reason, problem)
        assert problem["reason"] == reason
        assert "secret" not in json.dumps(problem)
        assert server.metrics.errors[reason] == 2


async def test_what_is_refused_before_it_begins_is_a_problem_like_any_other() -> None:
    async with served() as server:
        server.watched.refusal = TooManyWatchersError(64)
        async with httpx.AsyncClient() as client:
            answer = await client.get(server.web)
        assert (answer.status_code, answer.headers["content-type"]) == (429, "application/problem+json")
        assert answer.headers["connection"] == "close", "the port closes it: another call on it would be lost"
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(server.socket)
        assert refused.value.response.status_code == 429
        assert refused.value.response.body == answer.content
        assert refused.value.response.headers["retry-after"] == answer.headers["retry-after"]


async def test_nothing_may_be_sent_by_a_websocket() -> None:
    async with served() as server, websockets.connect(server.socket) as connection:
        await connection.send("hello")
        code, reason, _ = await closed(connection)
        assert (code, reason) == (1008, "UNEXPECTED_MESSAGE")
        await server.watched.left.wait()


async def test_a_message_that_is_too_large_is_not_taken() -> None:
    async with served() as server, websockets.connect(server.socket) as connection:
        server.watched.flood = Event("1", b"{}")  # it is written while the port closes the connection
        server.watched.say("0", "")
        await connection.send("x" * 100_000)
        with pytest.raises(websockets.ConnectionClosedError, match="1009"):
            await read_all(connection)
        await server.watched.left.wait()
        assert not server.metrics.errors["INTERNAL"]


async def test_pings_of_a_caller_that_does_not_read_are_not_taken_for_ever() -> None:
    ping = b"\x89\xfd\0\0\0\0" + b"p" * 125
    most = 16_000_000  # the system's own buffers hold less
    async with served() as server:
        caller = silent(server.at, _UPGRADE)
        sent = stalled = 0
        while stalled < _TURNS:
            try:
                sent += caller.send(ping * 64)
                stalled = 0
            except BlockingIOError:
                stalled += 1
            assert sent < most
            await asyncio.sleep(0)
        caller.close()
        await server.watched.left.wait()


async def test_a_caller_that_answers_no_ping_is_gone() -> None:
    async with served(ping_seconds=0.05) as server:
        server.watched.say("1", "x" * 30_000_000)  # of which a part stays in the port
        caller = silent(server.at, _UPGRADE)
        await server.watched.left.wait()
        caller.close()
        assert not server.metrics.errors.total()


@pytest.mark.parametrize(
    ("offered", "agreed"),
    [([SUBPROTOCOL], SUBPROTOCOL), (["bearer.secret", SUBPROTOCOL], SUBPROTOCOL), (["other"], None), (None, None)],
)
async def test_of_the_subprotocols_that_are_offered_ours_is_agreed_and_never_a_token(
    offered: Any, agreed: str | None
) -> None:
    async with served() as server, websockets.connect(server.socket, subprotocols=offered) as connection:
        assert connection.subprotocol == agreed


async def test_a_websocket_to_a_path_without_events_is_refused() -> None:
    async with served() as server:
        for path in ("/page", "/nothing"):
            with pytest.raises(websockets.InvalidStatus) as refused:
                await websockets.connect(f"ws://{server.at}{path}")
            assert refused.value.response.status_code == 404
        async with httpx.AsyncClient() as client:
            head = await client.head(server.web)
        assert (head.status_code, head.headers["allow"]) == (405, "GET")
