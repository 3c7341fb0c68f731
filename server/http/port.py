"""The HTTP port: uvicorn serves the application, in the server's own process and on its event loop.

The calls are answered by the same servicers as those over gRPC, so that one process has one admission, one window of
idempotency keys and one journal. A port that nobody calls costs the event loop a tick every 0.1 s. (As a process of its
own that calls the gRPC port, HTTP would cost each order a second serialisation and a second hop, and would have to pass
on who calls.)

uvicorn cannot bound how long a new connection stays silent, nor how many there are: `_Protocol` does.
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

from server.errors import DrainingError
from server.http.application import HttpApplication
from server.http.asgi import CLIENT_CERTIFICATE, AsgiCall, CallerGoneError, Receive, Scope, Send, forwarded_certificate
from server.rpc.framing import ARRIVED, PEER

_MOST_CONNECTIONS: Final = 1_024
"""More are closed at once."""
_SILENT_SECONDS: Final = 5.0
"""How long a connection may take to send its first request, and how long it may rest between two."""
_BACKLOG: Final = 128
_OF_TRANSPORT: Final = frozenset((ARRIVED, PEER, CLIENT_CERTIFICATE))
"""Headers that the transport alone writes: a caller's are dropped."""
_CERTIFICATE: Final = "certificate"


class HttpPort:
    """The port, from `open` until `end`. As an ASGI application it is what uvicorn calls.

    Args:
        application: Answers.
        clock: Monotonic seconds, the event loop's own.
        context: Of TLS; None without.
    """

    def __init__(
        self, application: HttpApplication, clock: Callable[[], float], context: ssl.SSLContext | None
    ) -> None:
        self._application = application
        self._clock = clock
        self._calls: dict[AsgiCall, None] = {}
        self._context = context
        self._server = _Server(
            uvicorn.Config(
                self,
                http=_Protocol,
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
        """Takes no more connections, and gives the calls under way so many seconds."""
        self._server.should_exit = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await self._ended.wait()
                return
        for call in list(self._calls):
            call.end(DrainingError("STOPPED", "the server has stopped"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._ended.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one call."""
        if scope["type"] != "http":
            return
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue(1)
        told = _told(scope)
        call = AsgiCall(inbox.get, told["headers"], self._clock())
        self._calls[call] = None
        listening = asyncio.create_task(_listen(call, receive, inbox), name="http-caller")
        try:
            await self._application.serve(call, told, send)
        finally:
            listening.cancel()
            del self._calls[call]


async def _listen(call: AsgiCall, receive: Receive, inbox: asyncio.Queue[dict[str, Any]]) -> None:
    """Passes a request on, and ends the call when its caller has gone."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            call.end(CallerGoneError())
            return
        await inbox.put(message)


def _told(scope: Scope) -> dict[str, Any]:
    """A scope with what the transport knows of the caller, and without what the caller says of that."""
    headers = [(name, value) for name, value in scope["headers"] if name not in _OF_TRANSPORT]
    if scope["client"] is not None:
        headers.append((PEER, scope["client"][0].encode()))
    certificate = scope["state"].get(_CERTIFICATE)
    if certificate is not None:
        headers.append(forwarded_certificate(certificate))
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
        encrypted = transport.get_extra_info("ssl_object")
        der = None if encrypted is None else encrypted.getpeercert(binary_form=True)
        if der is not None:
            self.app_state = {**self.app_state, _CERTIFICATE: ssl.DER_cert_to_PEM_cert(der)}
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
