"""A client of one unary gRPC method, over one HTTP/2 connection without TLS, in the event loop.

gRPC's own client takes 250 µs of CPU and two hops between threads for a call, this one 100 µs and none. It does only
what the call that scores needs. It never waits: a call that cannot leave at this moment (there is no connection, the
server wants no more streams, a window is too small for the message) is refused with `UnusableError`, and gRPC's client
makes it::

    connecting ──settings came──▶ usable ──GOAWAY──▶ finishing ──last call ended──┐
        ▲                           │ lost, silent, or broken                     │
        └───────── pause ◀──────────┴──────────────────────────────◀──────────────┘

A connection that swallows everything is found as gRPC's keepalive finds it: while calls are under way and nothing has
come for a second, it is pinged, and given up half a second later. A peer that breaks the protocol is not asked again in
this way for a minute, so that a server or proxy that this client does not understand costs one call a minute.

What a peer sends is bounded: frames as HTTP/2 bounds them, headers of `_MOST_HEADERS`, and an answer of
`MOST_ANSWER_BYTES`. No part of an answer is ever used: a call has its message when status OK has come after all of it.

Source: RFC 9113 (HTTP/2); https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from feature_cache.backoff import Backoff
from feature_cache.ending import end
from server.inference.http2_connection import Connection, UnusableError

_log = structlog.get_logger(__name__)

Metadata = Sequence[tuple[str, str]]
_CONNECT_SECONDS: Final = 1.0
_SHORTEST_PAUSE_SECONDS: Final = 0.05
_LONGEST_PAUSE_SECONDS: Final = 0.3
_DISTRUST_SECONDS: Final = 60.0
"""Until a peer that broke the protocol is asked in this way again."""


class Http2Client:
    """Calls one method of one server for as long as it is open.

    Args:
        name: Of the server, for the log.
        endpoint: `host:port`.
        path: Of the method.
        clock: Monotonic seconds, the event loop's own.
        uniform: Uniform in [0, 1).
    """

    def __init__(
        self, name: str, endpoint: str, path: str, clock: Callable[[], float], uniform: Callable[[], float]
    ) -> None:
        self._name = name
        self._endpoint = endpoint
        self._clock = clock
        self._head = _literals(
            (
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                (":authority", endpoint),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
            )
        )
        self._backoff = Backoff(_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS, uniform=uniform)
        self._connection: Connection | None = None
        self.calls = 0
        """Calls that were sent."""
        self._connections: set[Connection] = set()
        """That one, and those on which calls from before are under way."""

    def open(self) -> None:
        """Begins to connect, and connects again until `close`."""
        self._connecting = asyncio.create_task(self._keep_connected(), name=f"http2-{self._name}")

    async def close(self) -> None:
        """Ends the connection; calls under way end UNAVAILABLE."""
        await end([self._connecting])
        for connection in list(self._connections):
            connection.abort("closed")

    @property
    def usable(self) -> bool:
        """Whether a small call could leave now."""
        return self._connection is not None and self._connection.usable

    async def call(self, message: bytes, seconds: float, metadata: Metadata = ()) -> bytes:
        """Makes a call; the message of its answer.

        Args:
            message: Serialised.
            seconds: Until it is given up.
            metadata: Headers of its own.

        Raises:
            UnusableError: It was not sent.
            grpc.aio.AioRpcError: It got no answer, as with gRPC's own client.

        Cancelling is safe: the server is told that nobody waits.
        """
        connection = self._connection
        if connection is None:
            raise UnusableError
        # Without a deadline of the server's: it would end the call at the same instant, and for another reason.
        stream, answer = connection.begin(self._head + _literals(metadata), message)
        self.calls += 1
        timer = asyncio.get_running_loop().call_later(seconds, connection.give_up, stream)
        try:
            return await answer
        finally:
            timer.cancel()
            if answer.cancelled():
                connection.cancel(stream)

    async def _keep_connected(self) -> None:
        host, _, port = self._endpoint.rpartition(":")
        loop = asyncio.get_running_loop()
        was_lost = True
        while True:
            connection = self._connection = Connection(self._clock, self._connections.discard)
            self._connections.add(connection)
            # Among them TimeoutError, and what a name is that cannot be looked up. Who calls finds it unusable.
            with contextlib.suppress(OSError, UnicodeError):
                async with asyncio.timeout(_CONNECT_SECONDS):
                    await loop.create_connection(functools.partial(_the_same, connection), host.strip("[]"), int(port))
                    await connection.settled
            if connection.usable:
                if was_lost:
                    _log.info("scores are asked for directly", replica=self._name)
                self._backoff.reset()
                was_lost = False
                await connection.leaving
            if not was_lost:
                _log.warning(
                    "scores are asked for by gRPC's client, until there is a connection again",
                    replica=self._name,
                    problem=connection.problem,
                )
                was_lost = True
            connection.end_when_done()
            await asyncio.sleep(_DISTRUST_SECONDS if connection.is_broken else self._backoff.next_pause())


def _the_same(connection: Connection) -> Connection:
    return connection


def _literals(headers: Metadata) -> bytes:
    """Headers that neither side remembers: no table of the peer's is needed for them."""
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers)


def _text(value: str) -> bytes:
    encoded = value.encode("ascii")
    left = len(encoded) - 0x7F
    if left < 0:
        return bytes((len(encoded),)) + encoded
    length = bytearray((0x7F,))
    while left >= 0x80:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    length.append(left)
    return bytes(length) + encoded
