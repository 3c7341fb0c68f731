"""Open loops at thousands of calls a second: HTTP/2 by hand, at some 20 µs of CPU a call.

A caller that is built on a gRPC library takes as much CPU as the server itself, so on a few shared cores it would
measure itself, and h2load sends the calls of a rate in bursts. Here one thread sends each call when it is due, within
0.1 ms, on one of several connections. All calls have the same body. A call whose answer has no message counts as an
error; why it was refused is known to the server alone.
"""

from __future__ import annotations

import itertools
import select
import socket
import struct
from collections import deque
from contextlib import ExitStack
from typing import Final

from loadtest.generators.load import Call
from loadtest.generators.measurement import NO_REPLY, Measurement, clock
from loadtest.generators.open_loop import offsets

NO_DECISION: Final = "NO_DECISION"
"""Error of a call that was answered with a status and nothing else."""
RESET: Final = "RESET"
"""Error of a call that the server broke off."""
WARM_UP_SECONDS: Final = 0.5
"""What is due in it is sent and not counted: connections are new."""
_CONNECTIONS: Final = 8
_SOCKET_SECONDS: Final = 5.0
_GRACE_SECONDS: Final = 1.0
"""How long after its deadline the last call may still be answered."""
_LEAD_SECONDS: Final = 0.05
"""From the connections to the first instant of the schedule."""
_RECEIVED: Final = 1 << 16
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE: Final = 4
_HEADER: Final = struct.Struct("!HBBBI")
_SETTING: Final = struct.Struct("!HI")
_MOST_DATA: Final = 1 << 14
_FIRST_WINDOW: Final = (1 << 16) - 1
_LAST_WINDOW: Final = (1 << 31) - 1
_FIRST_INDEX: Final = 62
"""Of the table of headers that a connection builds up."""


def offer(
    target: str, call: Call, *, rate: float, seconds: float, deadline_seconds: float, seed: int = 1
) -> Measurement:
    """Makes calls at a rate of orders, at random instants as if by many callers, after a warm-up that is not counted.

    Args:
        target: `HOST:PORT`, without TLS.
        call: Sent again and again.
        rate: Orders a second.
        seconds: How long.
        deadline_seconds: Of each call.
        seed: Of the instants.

    Returns:
        Latencies of the calls that got answers, from when each was due.

    Raises:
        RuntimeError: A connection was refused or broke.
    """
    with ExitStack() as opened:
        try:
            caller = _Caller(target, call, deadline_seconds, opened)
            return caller.run(rate, seconds, seed)
        except OSError as error:
            raise RuntimeError(f"open loop against {target}: {error}") from error


class _Caller:
    """All connections, and what was seen of the calls on them."""

    def __init__(self, target: str, call: Call, deadline_seconds: float, opened: ExitStack) -> None:
        host, _, port = target.rpartition(":")
        address = host, int(port)
        headers = _headers(target, call.path, deadline_seconds)
        self._orders = call.orders
        self._grace = deadline_seconds + _GRACE_SECONDS
        self._measured = Measurement()
        self._connections: dict[socket.socket, _Connection] = {}
        for _ in range(_CONNECTIONS):
            opened_socket = opened.enter_context(socket.create_connection(address, _SOCKET_SECONDS))
            self._connections[opened_socket] = _Connection(opened_socket, headers, call.body)

    def run(self, rate: float, seconds: float, seed: int) -> Measurement:
        measured = self._measured
        measured.seconds = seconds
        began = clock() + _LEAD_SECONDS
        self._counted_from = began + WARM_UP_SECONDS
        turns = itertools.cycle(self._connections.values())
        for offset in offsets(rate, WARM_UP_SECONDS + seconds, self._orders, seed):
            due = began + offset
            self._receive(due - clock())
            while (early := due - clock()) > 0:
                self._receive(early)
            next(turns).send(due)
        end = clock() + self._grace
        while any(each.under_way for each in self._connections.values()) and (left := end - clock()) > 0:
            self._receive(left)
        for each in self._connections.values():
            for due in each.under_way.values():
                self._count(due, 0.0, NO_REPLY)
        return measured

    def _receive(self, seconds: float) -> None:
        """Takes what has come, or comes within so many seconds."""
        readable, _, _ = select.select(self._connections, [], [], max(0.0, seconds))
        for each in readable:
            frames = self._connections[each].receive()
            now = clock()
            for due, error in frames:
                self._count(due, now, error)

    def _count(self, due: float, now: float, error: str) -> None:
        if due < self._counted_from:
            return
        if error:
            self._measured.errors[error] += self._orders
        else:
            self._measured.decisions += self._orders
            self._measured.latencies.append(now - due)


class _Connection:
    """One connection: sends calls as far as the server's windows allow, and tells how each ended."""

    def __init__(self, connected: socket.socket, headers: tuple[bytes, bytes], body: bytes) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connected
        self._first, self._headers = headers
        self._body = body
        self._window = _FIRST_WINDOW
        self._stream = 1
        self._received = bytearray()
        self._answered: set[int] = set()
        self._waiting: deque[float] = deque()
        self.under_way: dict[int, float] = {}
        """When each call was due, by its stream."""
        # Headers that are not compressed by a table of ours, and room for all answers of a run.
        settings = _SETTING.pack(1, 0) + _SETTING.pack(_INITIAL_WINDOW_SIZE, _LAST_WINDOW)
        window = (_LAST_WINDOW - _FIRST_WINDOW).to_bytes(4, "big")
        connected.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, window))

    def send(self, due: float) -> None:
        """Sends a call, or as soon as the server has room for it."""
        self._waiting.append(due)
        frames = []
        while self._waiting and self._window >= len(self._body):
            stream, headers = self._stream, self._headers if self._stream > 1 else self._first
            self.under_way[stream] = self._waiting.popleft()
            self._window -= len(self._body)
            self._stream += 2
            frames.append(_frame(_HEADERS, _END_HEADERS, stream, headers))
            for begin in range(0, len(self._body), _MOST_DATA):
                part = self._body[begin : begin + _MOST_DATA]
                last = begin + len(part) == len(self._body)
                frames.append(_frame(_DATA, _END_STREAM if last else 0, stream, part))
        self._socket.sendall(b"".join(frames))

    def receive(self) -> list[tuple[float, str]]:
        """Reads what has come: of each call that ended when it was due, and its error, empty for none.

        Raises:
            ConnectionError: The server ends the connection.
        """
        self._received += self._socket.recv(_RECEIVED) or _ended("the server closed a connection")
        ended, at, received = [], 0, self._received
        while len(received) - at >= _HEADER.size:
            high, low, kind, flags, stream = _HEADER.unpack_from(received, at)
            begin = at + _HEADER.size
            if len(received) < (end := begin + (high << 8 | low)):
                break
            if stream in self.under_way:
                error = self._of_call(kind, flags, stream, end - begin)
                if error is not None:
                    self._answered.discard(stream)
                    ended.append((self.under_way.pop(stream), error))
            elif not stream:
                self._of_connection(kind, flags, bytes(received[begin:end]))
            at = end
        del received[:at]
        return ended

    def _of_call(self, kind: int, flags: int, stream: int, length: int) -> str | None:
        """A frame of a call: the error that the call ended with, empty for none; None while it goes on."""
        if kind == _RST_STREAM:
            return RESET
        if kind == _DATA and length:
            self._answered.add(stream)
        if kind in (_DATA, _HEADERS) and flags & _END_STREAM:
            return "" if stream in self._answered else NO_DECISION
        return None

    def _of_connection(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == _WINDOW_UPDATE:
            self._window += int.from_bytes(payload, "big")
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._socket.sendall(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        elif kind == _GOAWAY:
            _ended(f"the server ended a connection: {payload[8:].decode(errors='replace')}")


def _ended(reason: str) -> bytes:
    raise ConnectionError(reason)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _HEADER.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def _headers(target: str, path: str, deadline_seconds: float) -> tuple[bytes, bytes]:
    """The headers of a connection's first call, which the server is to remember, and of each later one."""
    literals = (
        (_name(4), path),
        (_name(1), target),
        (_name(31), "application/grpc"),
        (b"\x40" + _text("te"), "trailers"),
        (b"\x40" + _text("grpc-timeout"), f"{deadline_seconds * 1e3:.0f}m"),
    )
    post_over_http = b"\x83\x86"
    first = post_over_http + b"".join(name + _text(value) for name, value in literals)
    # The last one is the first of the table; those of HTTP itself must come before others.
    remembered = bytes(0x80 | _FIRST_INDEX + number for number in reversed(range(len(literals))))
    return first, post_over_http + remembered


def _name(index: int) -> bytes:
    """A name of the static table, whose value the server is to remember."""
    return bytes([0x40 | index])


def _text(value: str) -> bytes:
    encoded = value.encode()
    assert len(encoded) < 0x7F
    return bytes([len(encoded)]) + encoded
