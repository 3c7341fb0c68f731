"""The HTTP port: uvicorn serves the application, HTTP and WebSocket, in the server's own process and on its event loop.

The calls are answered by the same servicers as those over gRPC, so that one process has one admission, one window of
idempotency keys and one journal. A port that nobody calls costs the event loop a tick every 0.1 s. (As a process of its
own that calls the gRPC port, HTTP would cost each order a second serialisation and a second hop, and would have to pass
on who calls.)

uvicorn cannot bound how long a new connection stays silent, nor how many there are: `_Protocol` does. To the
application a WebSocket is a GET like any other until it is accepted, and what refuses it is an answer like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any, Final

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from server.errors import DrainingError, UnexpectedMessageError
from server.http.application import HttpApplication
from server.http.asgi import (
    CLIENT_CERTIFICATE,
    AsgiCall,
    CallerGoneError,
    Receive,
    Scope,
    Send,
    forwarded_certificate,
    header,
)
from server.rpc.framing import ARRIVED, PEER

_MOST_CONNECTIONS: Final = 1_024
"""More are closed at once."""
_SILENT_SECONDS: Final = 5.0
"""How long a connection may take to send its first request, and how long it may rest between two."""
_BACKLOG: Final = 128
_OF_TRANSPORT: Final = frozenset((ARRIVED, PEER, CLIENT_CERTIFICATE))
"""Headers that the transport alone writes: a caller's are dropped."""
_BEARER: Final = "bearer."
"""A subprotocol that begins with this is a token: a web page can send it in no other way with a WebSocket."""
_MOST_SENT_BYTES: Final = 4_096
"""In one message of a WebSocket. None is expected."""
_PING_SECONDS: Final = 15.0
_LAST_WORD_SECONDS: Final = 2.0
"""How long what a watch ended with may stay unread, before its connection is closed all the same."""
_LOOK_SECONDS: Final = 0.05
_CERTIFICATE: Final = "certificate"
_ABORT: Final = "abort"


class HttpPort:
    """The port, from `open` until `end`. As an ASGI application it is what uvicorn calls.

    Args:
        application: Answers.
        clock: Monotonic seconds, the event loop's own.
        context: Of TLS; None without.
        ping_seconds: How long after the last pong a WebSocket is pinged, and how long a pong may take.
    """

    def __init__(
        self,
        application: HttpApplication,
        clock: Callable[[], float],
        context: ssl.SSLContext | None,
        ping_seconds: float = _PING_SECONDS,
    ) -> None:
        self._application = application
        self._clock = clock
        self._calls: dict[AsgiCall, None] = {}
        self._context = context
        self._server = _Server(
            uvicorn.Config(
                self,
                http=_Protocol,
                ws=_WebSocketProtocol,
                ws_max_size=_MOST_SENT_BYTES,
                ws_ping_interval=ping_seconds,
                ws_ping_timeout=ping_seconds,
                ws_per_message_deflate=False,
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                timeout_keep_alive=round(_SILENT_SECONDS),
                backlog=_BACKLOG,
            )
        )
        self._ended = asyncio.Event()

    def bind(self, host: str, port: int, is_shared: bool) -> tuple[socket.socket, int]:
        """Opens the port, on which callers wait until `run`; returns it.

        Args:
            host: Address.
            port: 0 for any free one.
            is_shared: Whether several processes listen on it.

        Raises:
            OSError: It cannot be bound.
        """
        try:
            opened = socket.create_server((host, port), family=_family(host), backlog=_BACKLOG, reuse_port=is_shared)
        except OSError as error:
            raise OSError(f"http: cannot listen on {host}:{port}: {error}") from error
        return opened, int(opened.getsockname()[1])

    async def run(self, opened: socket.socket) -> None:
        """Serves until `refuse`."""
        config = self._server.config
        config.load()
        config.ssl = self._context
        try:
            await self._server.serve([opened])
        finally:
            self._ended.set()
            opened.close()

    async def refuse(self, grace_seconds: float) -> None:
        """Takes no more connections, ends what is watched, and gives the other calls under way so many seconds."""
        self._server.should_exit = True
        until = self._clock() + grace_seconds
        while not self._ended.is_set() and self._clock() < until:
            for call in list(self._calls):
                if not call.is_unary:  # whoever watches goes on elsewhere
                    call.end(DrainingError("DRAINING", "the server is about to stop: go on at another one"))
            await asyncio.sleep(_LOOK_SECONDS)
        for call in list(self._calls):
            call.end(DrainingError("STOPPED", "the server has stopped"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._ended.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one call."""
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue(1)
        told = _told(scope)
        call = AsgiCall(inbox.get, told["headers"], self._clock())
        self._calls[call] = None
        listening = asyncio.create_task(_listen(call, receive, inbox), name="http-caller")
        try:
            await self._application.serve(call, told, send if scope["type"] == "http" else _of_socket(send))
        finally:
            listening.cancel()
            del self._calls[call]
            if not call.is_unary:  # what was written for a caller that does not read would keep its connection for ever
                asyncio.get_running_loop().call_later(_LAST_WORD_SECONDS, scope["state"][_ABORT])


async def _listen(call: AsgiCall, receive: Receive, inbox: asyncio.Queue[dict[str, Any]]) -> None:
    """Passes a request on, and ends the call when its caller has gone."""
    while True:
        message = await receive()
        match message["type"]:
            case "http.disconnect" | "websocket.disconnect":
                call.end(CallerGoneError())
                return
            case "websocket.receive":
                call.end(UnexpectedMessageError())
            case "http.request":
                await inbox.put(message)


def _of_socket(send: Send) -> Send:
    """Takes what is sent to a caller over HTTP, and what is sent to one over a WebSocket, from the same application."""

    async def to_socket(message: dict[str, Any]) -> None:
        if message["type"].startswith("http."):  # refuses it
            message = message | {"type": f"websocket.{message['type']}"}
        try:
            await send(message)
        except RuntimeError as error:  # uvicorn has closed it, and the caller's leaving is not known here yet
            raise ConnectionResetError from error

    return to_socket


def _told(scope: Scope) -> dict[str, Any]:
    """A scope with what the transport knows of the caller, and without what the caller says of that."""
    headers = [(name, value) for name, value in scope["headers"] if name not in _OF_TRANSPORT]
    if scope["client"] is not None:
        headers.append((PEER, scope["client"][0].encode()))
    certificate = scope["state"].get(_CERTIFICATE)
    if certificate is not None:
        headers.append(forwarded_certificate(certificate))
    if scope["type"] == "websocket":
        offered = next((one for one in scope["subprotocols"] if one.startswith(_BEARER)), None)
        if offered is not None and not header(headers, b"authorization"):
            headers.append((b"authorization", b"Bearer " + offered.removeprefix(_BEARER).encode()))
        return {**scope, "headers": headers, "method": "GET"}
    return {**scope, "headers": headers}


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class _Server(uvicorn.Server):
    """uvicorn, which leaves signals to the process that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured."""
        yield


class _Protocol(H11Protocol):
    """One connection."""

    _head: asyncio.TimerHandle | None = None
    """Ends it unless the head of a request is there by then."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes it, or closes it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
            return
        self.app_state = {**self.app_state, _ABORT: transport.abort}
        encrypted = transport.get_extra_info("ssl_object")
        der = None if encrypted is None else encrypted.getpeercert(binary_form=True)
        if der is not None:
            self.app_state[_CERTIFICATE] = ssl.DER_cert_to_PEM_cert(der)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """A piece of a request."""
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has ended."""
        self._forget_head()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head is None:
            self._head = self.loop.call_later(_SILENT_SECONDS, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class _WebSocketProtocol(WebSocketsSansIOProtocol):
    """One connection, from the handshake of a WebSocket on."""

    def pause_writing(self) -> None:
        """Reads no more from a caller that does not read: each of its pings would have to be answered."""
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        """Reads again."""
        super().resume_writing()
        if not self.read_paused:
            self.transport.resume_reading()

    def keepalive_timeout(self) -> None:
        """The caller is gone, and will not take a last word either."""
        self.transport.abort()
